"""The axis `scales`: the factor s that multiplies ΔW; see `base.py`."""
