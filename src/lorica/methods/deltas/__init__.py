"""The axis `deltas`: how the update ΔW (out, in) of one weight is parametrised; see `base.py`."""
