"""The axis `kernels`: in which order the products of one layer are computed; see `base.py`."""
