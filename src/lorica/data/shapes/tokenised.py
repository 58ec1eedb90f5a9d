"""Token ids made elsewhere: `labels` of -100 are not trained, and without labels all ids are."""

from __future__ import annotations

from typing import Any

from lorica.data.samples import Encoded, Row
from lorica.data.shapes import Shape


def _is_number(value: Any) -> bool:
    return type(value) is int


def encoded(row: Row) -> Encoded:
    ids = row.items("input_ids", _is_number, "integers")
    if row.values.get("labels") is None:
        return Encoded(ids, None)
    labels = row.items("labels", _is_number, "integers")
    if len(labels) != len(ids):
        raise row.error("labels", f"{len(ids)} input_ids need {len(ids)} labels, not {len(labels)}")
    wrong = next(
        (i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, -100)), None
    )
    if wrong is not None:
        raise row.error(
            "labels",
            f"each label is -100 or the input id of its own place (the model shifts them); at "
            f"{wrong} the id is {ids[wrong]} and the label {labels[wrong]}",
        )
    return Encoded(ids, labels)


shape = Shape(
    name="tokenised",
    columns={"input_ids": ()},
    optional={"labels": ()},
    readers={"causal-lm": encoded},
)
