"""The axis `combine`: how W and ΔW make the effective weight; see `base.py`."""
