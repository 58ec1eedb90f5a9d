"""The axis `objectives`: how the task's loss is changed; see `base.py`."""
