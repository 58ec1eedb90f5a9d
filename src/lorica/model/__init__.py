"""The adapted model: which layers get an adapter, and what an adapted layer computes.

Start with `layer.py` (the layer that replaces a target), then `update.py` (ΔW and the frozen
factors), `attach.py` (how adapters get into a model and out again) and `adapters.py` (the object
that `lorica.attach` returns). `bases/` presents the frozen weight of each kind of layer,
`targets.py` finds the layers, and `summary.py` is what is printed before the first step.
"""
