"""What happens around `optimizer.step`: schedules, changes of weights, checks.

Start with `bind.py`, which builds the optimizer and runs the schedules in its step hooks.
`training.py` is one step as a schedule sees it, `weight_edits.py` merges updates and swaps vectors,
`freezing.py` stops parameters from training for a while, and `checks.py` finds runs in which
nothing trains.
"""
