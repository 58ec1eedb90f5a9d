"""The axis `ranks`: which layer gets which rank and alpha; see `base.py`."""
