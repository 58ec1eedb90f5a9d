"""Running text, for pre-training and domain adaptation: every token is trained."""

from __future__ import annotations

from lorica.data.samples import Document, Row
from lorica.data.shapes import Shape


def document(row: Row) -> Document:
    return Document(row.text("text"))


shape = Shape(name="text", columns={"text": ("content",)}, readers={"causal-lm": document})
