"""The axis `schedules`: what changes between optimizer steps; see `base.py`."""
