"""Tensor functions that know nothing of adapters.

`dtensor_ops.py` reads, writes and reduces parameters that may be sharded, `matmul.py` multiplies
without autocast, and `dropout.py` draws masks that can be drawn again in backward.
"""
