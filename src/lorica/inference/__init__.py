"""Using a model without training it, whether plain, adapted or merged.

`generate.py` writes text, `evaluate.py` computes loss and accuracy on a data set, and `metrics.py`
holds the metrics of each task.
"""
