"""A prompt and its completion, as two texts or as two lists of messages.

Texts are joined as they are, with no template around them and no space between them.
"""

from __future__ import annotations

from lorica.data.chat import messages_of
from lorica.data.samples import ASSISTANT, USER, Chat, Exchange, Row, SourceTarget
from lorica.data.shapes import Shape


def exchange(row: Row) -> Exchange | Chat:
    if isinstance(row.values["prompt"], str):
        return Exchange(((USER, row.text("prompt")), (ASSISTANT, row.text("completion"))))
    prompt, completion = messages_of(row, "prompt"), messages_of(row, "completion")
    return Chat(prompt + completion, trained_from=len(prompt))


def source_target(row: Row) -> SourceTarget:
    return SourceTarget(row.text("prompt"), row.text("completion"))


shape = Shape(
    name="prompt-completion",
    columns={"prompt": (), "completion": ()},
    readers={"causal-lm": exchange, "seq2seq-lm": source_target},
)
