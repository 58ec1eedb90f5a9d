"""One text and its class or figure."""

from __future__ import annotations

from lorica.data.samples import Labelled, Row
from lorica.data.shapes import Shape


def labelled(row: Row) -> Labelled:
    return Labelled(row.text("text"), None, row.values["label"])


LABELS = ("labels", "score", "target", "class", "category", "sentiment", "rating", "stars")

shape = Shape(
    name="text-label",
    columns={"text": ("sentence", "content", "review"), "label": LABELS},
    readers={"sequence-classification": labelled},
    label="label",
)
