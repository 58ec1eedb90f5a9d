"""Two texts and the class or figure of the pair (entailment, paraphrase, similarity)."""

from __future__ import annotations

from lorica.data.samples import Labelled, Row
from lorica.data.shapes import Shape
from lorica.data.shapes.text_label import LABELS


def labelled(row: Row) -> Labelled:
    return Labelled(row.text("sentence1"), row.text("sentence2"), row.values["label"])


shape = Shape(
    name="sentence-pair",
    columns={
        "sentence1": ("premise", "question1", "question"),
        "sentence2": ("hypothesis", "question2", "sentence"),
        "label": LABELS,
    },
    readers={"sequence-classification": labelled},
    label="label",
)
