"""Figures of an evaluation, from predictions and labels. Plain numpy, float64.

What is undefined (a correlation with a constant, a class never seen nor predicted) is 0, so that a
comparison of checkpoints never meets a NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

MOST_CLASSES = 200  # of which the confusion is kept
IMBALANCED = 0.6  # share of one class above which accuracy rewards a constant answer


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


# -- tags that mark spans --------------------------------------------------------------------------

_MARK = re.compile(r"[BIELSU]-(.+)")
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ELSU")  # BILOU's L and U are BIOES's E and S


def mark_spans(names: Sequence[str]) -> bool:
    """Whether class names are tags of spans: `O`, and types behind `B-` and `I-` (or BIOES's and
    BILOU's letters).

    Example:
        >>> mark_spans(["O", "B-PER", "I-PER"]), mark_spans(["NOUN", "VERB"])
        (True, False)
    """
    marked = [name for name in names if name != "O"]
    begins = any(name[:2] in ("B-", "I-") for name in marked)
    return begins and all(map(_MARK.fullmatch, marked))


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, end) of each span that a sentence's tags mark, `end` not included.

    A span begins at `B-` (or `S-`), and at any other mark of a type that doesn't continue the one
    before: after `O`, after another type, after an end. That reads IOB1, IOB2, BIOES and BILOU
    alike, as CoNLL's script and seqeval's default mode do.

    Example:
        >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    kind, first, ended = "", 0, True
    for at, tag in enumerate([*tags, "O"]):
        mark, _, here = ("", "", "") if tag == "O" else tag.partition("-")
        if kind and (here != kind or ended or mark in _BEGINS):
            found.add((kind, first, at))
            kind = ""
        if here and not kind:
            kind, first = here, at
        ended = mark in _ENDS
    return found


def span_figures(
    predicted: Iterable[Sequence[str]], labels: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of whole spans over all sentences: type and both ends must agree.

    Args:
        predicted, labels: the tags of each sentence, in the same order.

    Example:
        >>> span_figures([["B-PER", "O"]], [["B-PER", "B-LOC"]])["recall"]
        0.5
    """
    hits = said = true = 0
    for mine, theirs in zip(predicted, labels, strict=True):
        a, b = spans(mine), spans(theirs)
        hits, said, true = hits + len(a & b), said + len(a), true + len(b)
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / true if true else 0.0,
        "f1": 2 * hits / (said + true) if said + true else 0.0,
    }


# -- one class for everything ----------------------------------------------------------------------


@dataclass(frozen=True)
class Degenerate:
    """An evaluation in which every prediction is the same class, and the labels have others.

    Attributes:
        label: the class's name.
        share: of the labels that are this class, 0 to 1.
        predictions: how many there are.
    """

    label: str
    share: float
    predictions: int

    @classmethod
    def of(cls, predicted: Numbers, labels: Numbers, names: Sequence[str]) -> Degenerate | None:
        """None: the predictions differ, or there is nothing to tell apart.

        Example:
            >>> Degenerate.of(np.array([1, 1]), np.array([0, 1]), ["bad", "good"]).as_dict()
            {'class': 'good', 'share': 0.5}
        """
        kept = labels != -100
        predicted, labels = predicted[kept], labels[kept]
        if not len(predicted) or len(np.unique(predicted)) > 1 or len(np.unique(labels)) < 2:
            return None
        share = float((labels == predicted[0]).mean())
        return cls(names[int(predicted[0])], share, len(labels))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"class": self.label, "share": self.share}

    def __str__(self) -> str:
        return (
            f"all {self.predictions:,} predictions are `{self.label}`, which {self.share:.0%} of"
            " the labels are, so the figures say nothing of what was learned"
        )


# -- tasks -----------------------------------------------------------------------------------------


def majority(labels: Numbers) -> float:
    """Share of the most frequent of class numbers (n,); -100 is left aside."""
    counts = np.unique(labels[labels != -100], return_counts=True)[1]
    return float(counts.max() / counts.sum()) if len(counts) else 0.0


class Scores:
    """What a task is measured by, beside its loss.

    Args:
        task: as `lorica.data` names it.
        classes: their names; none for a regression or a language model.
        majority: share of the most frequent class among the labels that are trained on. Above
            `IMBALANCED` the best checkpoint is chosen by Matthews' correlation: there accuracy
            rewards answering with that class alone.

    Attributes:
        best: the figure that the best checkpoint is chosen by, and whether more of it is better.
        why: the reason for it, where it depends on the data; else empty.
        names: the figures there are, the loss among them.
        confused: of the last evaluation, `classes` (names) and `counts`, a list of (label,
            prediction, how many) by class number; None: there was none, or there are no classes, or
            too many to look at.
    """

    falling = frozenset({"loss", "perplexity", "mse"})  # less of these is better

    def __init__(self, task: str, classes: Sequence[str] = (), majority: float = 0.0) -> None:
        self.classes = tuple(classes)
        self.measure: Callable[[Numbers, Numbers], dict[str, float]] | None = None
        self.best: tuple[str, bool] = ("loss", False)
        self.why = ""
        self.argmax = bool(classes)
        self.confused: dict[str, Any] | None = None
        self.names: tuple[str, ...] = ("loss", "perplexity")
        if task == "token-classification":
            self.measure, self.best = self._tags, ("f1", True)
            self.names = ("f1", "accuracy", "loss")
            if mark_spans(self.classes):
                self.measure, self.why = (
                    self._spans,
                    "the tags mark spans, and f1 counts whole ones",
                )
                self.names = ("f1", "precision", "recall", "accuracy", "loss")
        elif task == "sequence-classification" and classes:
            self.measure = self._classification
            self.best = ("accuracy", True)
            if majority > IMBALANCED:
                self.best = ("matthews", True)
                self.why = (
                    f"{majority:.0%} of the training labels are one class, so a model that gives no"
                    f" other answer has an accuracy of about {majority:.2f} and a Matthews"
                    " correlation of 0"
                )
            self.names = ("accuracy", "f1", "matthews", "loss")
        elif task == "sequence-classification":
            self.measure, self.best = self._regression, ("pearson", True)
            self.names = ("pearson", "spearman", "mse", "loss")

    def _classification(self, predicted: Numbers, labels: Numbers) -> dict[str, float]:
        return {
            "accuracy": accuracy(predicted, labels),
            "f1": f1(predicted, labels, len(self.classes)),
            "matthews": matthews(predicted, labels),
        }

    def _regression(self, predicted: Numbers, labels: Numbers) -> dict[str, float]:
        predicted, labels = predicted.reshape(-1), labels.reshape(-1)
        return {
            "pearson": pearson(predicted, labels),
            "spearman": spearman(predicted, labels),
            "mse": mse(predicted, labels),
        }

    def _tags(self, predicted: Numbers, labels: Numbers) -> dict[str, float]:
        kept = labels != -100
        predicted, labels = predicted[kept], labels[kept]
        # Not two-class F1, even where there are two tags: neither is the positive one.
        return {"accuracy": accuracy(predicted, labels), "f1": f1(predicted, labels, 0)}

    def _spans(self, predicted: Numbers, labels: Numbers) -> dict[str, float]:
        kept = labels != -100
        mine, theirs = (
            [[self.classes[i] for i in row[k]] for row, k in zip(part, kept, strict=True)]
            for part in (predicted, labels)
        )
        same = accuracy(predicted[kept], labels[kept])
        return {"accuracy": same, **span_figures(mine, theirs)}

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Logits -> what is kept of them between batches: class numbers, or the figures."""
        first = logits[0] if isinstance(logits, (tuple, list)) else logits
        return first.argmax(-1) if self.argmax else first

    def _confused(self, predicted: Numbers, labels: Numbers) -> dict[str, Any]:
        kept = labels != -100
        counts = confusion(predicted[kept], labels[kept])
        cells = [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)]
        return {"classes": list(self.classes), "counts": cells}

    def degenerate(self, predicted: Numbers, labels: Numbers) -> Degenerate | None:
        """Where every prediction is one class; see `Degenerate`."""
        return Degenerate.of(predicted, labels, self.classes) if self.classes else None

    def __call__(self, prediction: Any) -> dict[str, Any]:
        """For the Trainer: the figures, and `degenerate` where there is one."""
        assert self.measure is not None
        predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if 0 < len(self.classes) <= MOST_CLASSES:
            self.confused = self._confused(predicted, labels)
        alike = self.degenerate(predicted, labels)
        told = {} if alike is None else {"degenerate": {**alike.as_dict(), "text": str(alike)}}
        return {**self.measure(predicted, labels), **told}
