"""The axis `groups`: which parameters train, and at which rate; see `base.py`."""
