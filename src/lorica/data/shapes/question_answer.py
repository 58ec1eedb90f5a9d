"""A question and its answer: a turn of each under a chat template, else a plain format.

The plain format is `Question: {question}`, a line end, and `Answer: {answer}`. A `context` is read
before its question, `system` before everything, and `history` holds earlier [question, answer]
pairs, whose answers are turns of the assistant like the last one.
"""

from __future__ import annotations

from lorica.data.samples import ASSISTANT, USER, Chat, Exchange, Row, SourceTarget
from lorica.data.shapes import Shape
from lorica.data.shapes.alpaca import history


def chat(row: Row) -> Chat:
    system = row.optional("system")
    messages = [{"role": "system", "content": system}] if system else []
    plain: list[tuple[str, str]] = []
    opening = f"{system}\n\n" if system else ""
    earlier = [("", question, answer) for question, answer in history(row)]
    for context, question, answer in [*earlier, (*_asked(row), row.text("answer", numbers=True))]:
        asked = f"{context}\n\n{question}" if context else question
        messages.append({"role": USER, "content": asked})
        messages.append({"role": ASSISTANT, "content": answer})
        shown = f"Context: {context}\n" if context else ""
        plain.append((USER, f"{opening}{shown}Question: {question}\nAnswer:"))
        plain.append((ASSISTANT, f" {answer}"))
        opening = "\n\n"
    return Chat(messages, plain=Exchange(tuple(plain), worded=True))


def source_target(row: Row) -> SourceTarget:
    parts = [row.optional("system"), *(text for pair in history(row) for text in pair)]
    source = "\n".join(part for part in [*parts, *_asked(row)] if part)
    return SourceTarget(source, row.text("answer", numbers=True))


def _asked(row: Row) -> tuple[str, str]:
    return row.optional("context"), row.text("question", numbers=True)


shape = Shape(
    name="question-answer",
    columns={"question": ("query", "problem"), "answer": ("response",)},
    optional={
        "context": ("passage",),
        "system": ("system_prompt",),
        "history": (),
    },
    readers={"causal-lm": chat, "seq2seq-lm": source_target},
)
