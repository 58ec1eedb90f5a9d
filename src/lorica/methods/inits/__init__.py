"""The axis `inits`: how A and B are filled at the start; see `base.py`."""
