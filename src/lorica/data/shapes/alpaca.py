"""Instructions in the alpaca layout: `instruction`, perhaps with an `input`, and the `output`.

`system` stands before everything; `history` is a list of earlier [instruction, output] pairs, whose
outputs are turns of the assistant like the last one. Under a chat template the user's turn is the
instruction, a line end and the input; a model without one gets the plain format below.
"""

from __future__ import annotations

from typing import Any

from lorica.data.samples import ASSISTANT, USER, Chat, Exchange, Row, SourceTarget
from lorica.data.shapes import Shape

PREFACE = "Here is a task. Write a response that carries it out."


def chat(row: Row) -> Chat:
    system = row.optional("system")
    messages = [{"role": "system", "content": system}] if system else []
    plain: list[tuple[str, str]] = []
    opening = f"{system or PREFACE}\n\n"
    turns = [(task, "", answer) for task, answer in history(row)]
    for task, given, answer in [*turns, (*_request(row), row.text("output", numbers=True))]:
        messages.append({"role": USER, "content": f"{task}\n{given}" if given else task})
        messages.append({"role": ASSISTANT, "content": answer})
        plain.append((USER, opening + _plain(task, given)))
        plain.append((ASSISTANT, answer))
        opening = "\n\n"
    return Chat(messages, plain=Exchange(tuple(plain), worded=True))


def source_target(row: Row) -> SourceTarget:
    parts = [row.optional("system")]
    parts += [text for pair in history(row) for text in pair]
    return SourceTarget(
        "\n".join(part for part in [*parts, *_request(row)] if part),
        row.text("output", numbers=True),
    )


def _request(row: Row) -> tuple[str, str]:
    return row.text("instruction", numbers=True), row.optional("input")


def history(row: Row) -> list[tuple[str, str]]:
    """Earlier exchanges of a row: its `history`, a list of pairs of texts."""
    if not row.values.get("history"):
        return []

    def is_pair(value: Any) -> bool:
        return isinstance(value, list) and [type(part) for part in value] == [str, str]

    return [(task, answer) for task, answer in row.items("history", is_pair, "pairs of texts")]


def _plain(task: str, given: str) -> str:
    shown = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{task}\n\n{shown}### Response:\n"


shape = Shape(
    name="alpaca",
    columns={"instruction": (), "output": ("response", "completion", "answer")},
    optional={"input": ("context",), "system": ("system_prompt",), "history": ()},
    readers={"causal-lm": chat, "seq2seq-lm": source_target},
)
