"""A question and its answer: a turn of each under a chat template, else a plain format.

The plain format is `Question: {question}`, a line end, and `Answer: {answer}`.
"""

from __future__ import annotations

from lorica.data.samples import ASSISTANT, USER, Chat, Exchange, Row, SourceTarget
from lorica.data.shapes import Shape


def chat(row: Row) -> Chat:
    question, answer = row.text("question"), row.text("answer")
    return Chat(
        [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}],
        plain=Exchange(((USER, f"Question: {question}\nAnswer:"), (ASSISTANT, f" {answer}"))),
    )


def source_target(row: Row) -> SourceTarget:
    return SourceTarget(row.text("question"), row.text("answer"))


shape = Shape(
    name="question-answer",
    columns={"question": ("query", "problem"), "answer": ("response",)},
    readers={"causal-lm": chat, "seq2seq-lm": source_target},
)
