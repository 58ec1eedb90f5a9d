"""Figures of an evaluation, from predictions and labels. Plain numpy, float64.

What is undefined (a correlation with a constant, a class never seen nor predicted) is 0, so that a
comparison of checkpoints never meets a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


def confusion(predicted: Numbers, labels: Numbers) -> NDArray[np.float64]:
    """Counts (classes, classes): row the label, column the prediction.

    Example:
        >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1])).astype(int).tolist()
        [[1, 1], [0, 1]]
    """
    classes = int(max(predicted.max(), labels.max())) + 1
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.float64)


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """Fraction of predictions (n,) that are the label."""
    return float((predicted == labels).mean())


def f1(predicted: Numbers, labels: Numbers, classes: int) -> float:
    """2PR/(P+R) of class 1 where there are two classes, else the mean over those that occur in the
    labels or the predictions."""
    counts = confusion(predicted, labels)
    hits = np.diag(counts)
    occur = counts.sum(0) + counts.sum(1)
    each = np.divide(2 * hits, occur, out=np.zeros_like(hits), where=occur > 0)
    if classes == 2:
        return float(each[1]) if len(each) > 1 else 0.0
    return float(each[occur > 0].mean())


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """Matthews' correlation, in the form for any number of classes (R_K)."""
    counts = confusion(predicted, labels)
    said, true, n = counts.sum(0), counts.sum(1), counts.sum()
    cross = np.diag(counts).sum() * n - said @ true
    spread = (n * n - said @ said) * (n * n - true @ true)
    return float(cross / math.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: Numbers, labels: Numbers) -> float:
    """Linear correlation of two series (n,)."""
    a = predicted.astype(np.float64) - predicted.mean(dtype=np.float64)
    b = labels.astype(np.float64) - labels.mean(dtype=np.float64)
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else 0.0


def spearman(predicted: Numbers, labels: Numbers) -> float:
    """Correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Numbers) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[place]


def mse(predicted: Numbers, labels: Numbers) -> float:
    """Mean square of the differences."""
    gap = predicted.astype(np.float64) - labels.astype(np.float64)
    return float((gap * gap).mean())


def _classification(predicted: Numbers, labels: Numbers, classes: int) -> dict[str, float]:
    return {
        "accuracy": accuracy(predicted, labels),
        "f1": f1(predicted, labels, classes),
        "matthews": matthews(predicted, labels),
    }


def _regression(predicted: Numbers, labels: Numbers, classes: int) -> dict[str, float]:
    predicted, labels = predicted.reshape(-1), labels.reshape(-1)
    return {
        "pearson": pearson(predicted, labels),
        "spearman": spearman(predicted, labels),
        "mse": mse(predicted, labels),
    }


def _tags(predicted: Numbers, labels: Numbers, classes: int) -> dict[str, float]:
    kept = labels != -100
    predicted, labels = predicted[kept], labels[kept]
    # Not two-class F1, even where there are two tags: neither is the positive one.
    return {"accuracy": accuracy(predicted, labels), "f1": f1(predicted, labels, 0)}


class Scores:
    """What a task is measured by, beside its loss.

    Args:
        task: as `lorica.data` names it.
        classes: how many there are; 0 for a regression or a language model.

    Attributes:
        best: the figure that the best checkpoint is chosen by, and whether more of it is better.
        names: the figures there are, the loss among them.
    """

    falling = frozenset({"loss", "perplexity", "mse"})  # less of these is better

    def __init__(self, task: str, classes: int) -> None:
        self.classes = classes
        self.measure: Callable[[Numbers, Numbers, int], dict[str, float]] | None = None
        self.best: tuple[str, bool] = ("loss", False)
        self.argmax = classes > 0
        self.names: tuple[str, ...] = ("loss", "perplexity")
        if task == "token-classification":
            self.measure, self.best = _tags, ("f1", True)
            self.names = ("f1", "accuracy", "loss")
        elif task == "sequence-classification" and classes:
            self.measure, self.best = _classification, ("accuracy", True)
            self.names = ("accuracy", "f1", "matthews", "loss")
        elif task == "sequence-classification":
            self.measure, self.best = _regression, ("pearson", True)
            self.names = ("pearson", "spearman", "mse", "loss")

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Logits -> what is kept of them between batches: class numbers, or the figures."""
        first = logits[0] if isinstance(logits, (tuple, list)) else logits
        return first.argmax(-1) if self.argmax else first

    def __call__(self, prediction: Any) -> dict[str, float]:
        assert self.measure is not None
        return self.measure(
            np.asarray(prediction.predictions), np.asarray(prediction.label_ids), self.classes
        )
