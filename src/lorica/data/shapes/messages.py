"""Conversations as lists of messages with `role` and `content` (and `tool_calls`).

The turns of `conversations` (`from` and `value`, `human` and `gpt`) are read here too.
"""

from __future__ import annotations

from lorica.data.samples import Chat, Row
from lorica.data.shapes import Shape
from lorica.data.turns import tools_of, turns_of, with_system


def chat(row: Row) -> Chat:
    messages, flags = with_system(row, turns_of(row, "messages"))
    return Chat(messages, tools_of(row), flags=flags)


shape = Shape(
    name="messages",
    columns={"messages": ("chat", "dialog", "dialogue")},
    optional={"system": ("system_prompt",), "tools": ("functions",)},
    readers={"causal-lm": chat},
)
