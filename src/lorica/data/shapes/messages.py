"""Conversations as lists of messages with `role` and `content` (and `tool_calls`)."""

from __future__ import annotations

from lorica.data.chat import messages_of, tools_of
from lorica.data.samples import Chat, Row
from lorica.data.shapes import Shape


def chat(row: Row) -> Chat:
    return Chat(messages_of(row, "messages"), tools_of(row))


shape = Shape(
    name="messages", columns={"messages": ()}, optional=("tools",), readers={"causal-lm": chat}
)
