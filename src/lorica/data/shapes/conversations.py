"""Conversations in ShareGPT's layout: turns with `from` and `value`, or human/assistant pairs.

`human` and `gpt` are the user and the assistant; a `function_call` is an assistant's turn whose
value is the call as JSON (`{"name": ..., "arguments": {...}}`), an `observation` the tool's answer.
"""

from __future__ import annotations

import json
from typing import Any

from lorica.data.chat import as_list, tools_of
from lorica.data.samples import ASSISTANT, USER, Chat, Row
from lorica.data.shapes import Shape
from lorica.data.words import excerpt, listing
from lorica.text import nearest

_ROLES = {
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": ASSISTANT,
}


def chat(row: Row) -> Chat:
    turns = as_list(row, "conversations")
    messages: list[dict[str, Any]] = []
    if system := row.optional("system"):
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns):
        messages += _pair(row, turn, number) if "human" in turn else [_turn(row, turn, number)]
    return Chat(messages, tools_of(row))


def _pair(row: Row, turn: dict[str, Any], number: int) -> list[dict[str, Any]]:
    if not isinstance(turn["human"], str) or not isinstance(turn.get("assistant"), str):
        raise row.error(
            "conversations", f"turn {number} must have texts as `human` and `assistant`"
        )
    return [
        {"role": USER, "content": turn["human"]},
        {"role": ASSISTANT, "content": turn["assistant"]},
    ]


def _turn(row: Row, turn: dict[str, Any], number: int) -> dict[str, Any]:
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in _ROLES or not isinstance(value, str):
        raise row.error(
            "conversations",
            f"turn {number}, {excerpt(turn)}, must have a text as `value`, and as `from` one of "
            + listing(_ROLES)
            + (nearest(speaker, _ROLES).rstrip("?") if isinstance(speaker, str) else ""),
        )
    message: dict[str, Any] = {"role": _ROLES[speaker], "content": value}
    if speaker == "function_call":
        message["content"] = ""
        message["tool_calls"] = [_call(row, value, number)]
    return message


def _call(row: Row, value: str, number: int) -> dict[str, Any]:
    try:
        call = json.loads(value)
        return {
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise row.error(
            "conversations",
            f"turn {number} is a function_call, so its value must be JSON like "
            f'{{"name": "f", "arguments": {{}}}}, not {excerpt(value)}',
        ) from error


shape = Shape(
    name="conversations",
    columns={"conversations": ()},
    optional=("system", "tools"),
    readers={"causal-lm": chat},
)
