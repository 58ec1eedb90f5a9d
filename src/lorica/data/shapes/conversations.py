"""Conversations in ShareGPT's layout: turns with `from` and `value`, or human/assistant pairs.

`human` and `gpt` are the user and the assistant; a `function_call` is an assistant's turn whose
value is the call as JSON (`{"name": ..., "arguments": {...}}`), an `observation` the tool's answer.
The turns of `messages` (`role` and `content`) are read here too.
"""

from __future__ import annotations

from lorica.data.samples import Chat, Row
from lorica.data.shapes import Shape
from lorica.data.turns import tools_of, turns_of, with_system


def chat(row: Row) -> Chat:
    messages, flags = with_system(row, turns_of(row, "conversations"))
    return Chat(messages, tools_of(row), flags=flags)


shape = Shape(
    name="conversations",
    columns={"conversations": ("conversation",)},
    optional={"system": ("system_prompt",), "tools": ("functions",)},
    readers={"causal-lm": chat},
)
