"""The axis `rules`: how a gradient becomes a step; see `base.py`."""
