"""From the turns of a file to messages for a chat template: roles, contents, calls and flags.

Files name the same things differently: `role` or `from`, `content` or `value`, `assistant` or
`gpt`. All of these are read under any column that holds a conversation. A turn may also say whether
it is trained; `FLAGS` lists the keys in use for that. A key that is none of these stays in the
message, and `Format` refuses it unless the chat template writes it.
"""

from __future__ import annotations

from typing import Any

from lorica.data.samples import ASSISTANT, USER, Flag, Row
from lorica.data.words import excerpt, kind_of, listing
from lorica.text import nearest, parse_json

ROLES = {
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "ai": ASSISTANT,
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "ipython",
    "function_call": ASSISTANT,
    "tool_call": ASSISTANT,
}
"""What files call a role -> what templates call it."""

FLAGS = {
    "weight": True,  # OpenAI, Mistral, Together, Fireworks: 0 or 1
    "loss": True,  # ms-swift, XTuner
    "loss_scale": True,  # ms-swift
    "train": True,  # Axolotl (its `message_field_training` names the key)
    "training": True,  # Axolotl
    "trainable": True,
    "learn": True,
    "masked": False,  # torchtune: true leaves the message out of the loss
}
"""Keys of a turn that say whether it is trained -> whether a true value means that it is."""

REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing to transformers
READ = frozenset(
    {"role", "content", "name", "tool_call_id"}
)  # needed, or ids that may go unwritten
_CALLS = ("function_call", "tool_call")  # roles whose content is a call as JSON
DETAIL = "train_detail"  # Axolotl (its `message_field_training_detail` names the key)
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")

Turns = tuple[list[dict[str, Any]], tuple[Flag, ...]]
"""Messages, and for each what its flag says (None: it has none); no flags at all where none has."""


def turns_of(row: Row, column: str) -> Turns:
    """The column's turns as messages for a template, and their flags.

    Raises:
        ValueError: a turn without a role or a text, two names for one thing, an unknown flag value,
            a role that looks mistyped. The row's place and the turn are named.
    """
    messages: list[dict[str, Any]] = []
    flags: list[Flag] = []
    for number, item in enumerate(as_list(row, column)):
        for turn in _pairs(row, column, number, item):
            flags.append(_flag(row, column, number, turn))
            messages.append(_message(row, column, number, turn))
    return messages, tuple(flags) if any(flag is not None for flag in flags) else ()


def as_list(row: Row, column: str) -> list[dict[str, Any]]:
    """A column that is a list of objects, or its JSON text; null entries of objects are dropped."""
    value = row.values.get(column)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise row.error(column, f"as a text it must be JSON ({error})") from error
    if not isinstance(value, list) or not value:
        raise row.error(column, "it must be a list of objects, at least one")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise row.error(column, f"entry {number} is {kind_of(item)}, and must be an object")
    return [_dense(item) for item in value]


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The functions a conversation may call, in the form that templates take."""
    value = row.values.get("tools")
    return as_list(row, "tools") if value not in (None, "", [], "[]") else None


def with_system(row: Row, turns: Turns) -> Turns:
    """The turns, led by the text of the column `system` where there is one.

    Raises:
        ValueError: the turns begin with another system message.
    """
    messages, flags = turns
    if not (system := row.optional("system")):
        return turns
    if messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise row.error(
                "system",
                "the turns begin with another system message, "
                f"{excerpt(messages[0]['content'])}: keep one of the two",
            )
        return turns
    return [{"role": "system", "content": system}, *messages], (None, *flags) if flags else ()


def _pairs(row: Row, column: str, number: int, item: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry as its turns: an entry of `human` and `assistant` texts is two."""
    if "human" not in item:
        return [item]
    sides = [item.get("human"), item.get("assistant")]
    if not all(isinstance(side, str) for side in sides):
        raise row.error(column, f"turn {number} must have texts as `human` and `assistant`")
    if extra := sorted(item.keys() - {"human", "assistant"}):
        raise row.error(column, f"turn {number} has the key `{extra[0]}`, which has no use there")
    return [{"role": USER, "content": sides[0]}, {"role": ASSISTANT, "content": sides[1]}]


def _message(row: Row, column: str, number: int, item: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in item.items() if key not in (*FLAGS, DETAIL)}
    spoken = _one(row, column, number, made, "role", "from")
    said = _one(row, column, number, made, "content", "value")
    if not isinstance(spoken, str) or not spoken.strip():
        raise row.error(
            column, f"message {number}, {excerpt(item)}, must have a `role` such as `user`"
        )
    role = ROLES.get(spoken.strip().lower())
    if role is None and (close := nearest(spoken, ROLES)):
        raise row.error(
            column,
            f"message {number}, {excerpt(item)}: the role `{spoken}` is none of {listing(ROLES)}."
            + close.rstrip("?"),
        )
    called = made.pop("function_call", None)
    if called is not None and "tool_calls" not in made:
        made["tool_calls"] = [called]
    if spoken in _CALLS:
        made["tool_calls"], said = _written_calls(row, column, number, said), ""
    if said is None and made.get("tool_calls"):
        said = ""
    text = _text(said)
    if text is None:
        key = "value" if "from" in item else "content"
        what = "turn" if "from" in item else "message"
        raise row.error(column, f"{what} {number}, {excerpt(item)}, must have a text as `{key}`")
    if made.get("tool_calls"):
        if not isinstance(made["tool_calls"], list):
            raise row.error(column, f"message {number}: `tool_calls` must be a list of calls")
        made["tool_calls"] = [_called(row, column, number, call) for call in made["tool_calls"]]
    return {"role": role or spoken, "content": text, **made}


def _one(row: Row, column: str, number: int, made: dict[str, Any], name: str, other: str) -> Any:
    """The value under either name, taken out of `made`."""
    values = [made.pop(key) for key in (name, other) if key in made]
    if len(values) > 1 and values[0] != values[1]:
        raise row.error(
            column, f"message {number} has both `{name}` and `{other}`, which differ: keep one"
        )
    return values[0] if values else None


def _text(value: Any) -> str | None:
    """A content as text: a text, a number, or a list of text parts; None for anything else."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _flag(row: Row, column: str, number: int, item: dict[str, Any]) -> Flag:
    """What the turn says of itself; that it is not trained at all outranks its details."""
    found: dict[str, bool] = {}
    for key, means in FLAGS.items():
        if key not in item:
            continue
        value = str(item[key]).strip().lower()
        if value not in (*_YES, *_NO):
            raise row.error(
                column,
                f"message {number}: `{key}` is {excerpt(item[key])}; allowed are true and false, "
                "or 1 and 0 (a turn is trained or it isn't)",
            )
        found[key] = (value in _YES) == means
    if len(set(found.values())) > 1:
        raise row.error(
            column, f"message {number}: {listing(found)} disagree on whether it is trained"
        )
    whole = next(iter(found.values()), None)
    if DETAIL not in item or whole is False:
        return whole
    return _ranges(row, column, number, item)


def _ranges(
    row: Row, column: str, number: int, item: dict[str, Any]
) -> tuple[tuple[int, int], ...]:
    """The stretches of a turn's text that its details train; `end_offset` is the last character."""
    text = _text(item.get("content", item.get("value"))) or ""
    says: dict[int, bool] = {}
    entries = item[DETAIL]
    for entry in entries if isinstance(entries, list) else [entries]:
        entry = entry if isinstance(entry, dict) else {}
        first, last = entry.get("begin_offset"), entry.get("end_offset")
        trained = str(entry.get("train")).strip().lower()
        if not (
            type(first) is int and type(last) is int and 0 <= first <= last < len(text)
            and trained in (*_YES, *_NO) and len(entry) == 3
        ):  # fmt: skip
            raise row.error(
                column,
                f"message {number}: `{DETAIL}` has {excerpt(entry or entries)}; an entry is like "
                '{"begin_offset": 0, "end_offset": 3, "train": true}: characters of the content, '
                f"counted from 0, the last one (here {len(text) - 1} at most) included",
            )
        for at in range(first, last + 1):
            if says.setdefault(at, trained in _YES) != (trained in _YES):
                raise row.error(
                    column, f"message {number}: entries of `{DETAIL}` disagree on character {at}"
                )
    marked = [says.get(at, False) for at in range(len(text))]
    begins = [at for at, mark in enumerate(marked) if mark and not (at and marked[at - 1])]
    ends = [at + 1 for at, mark in enumerate(marked) if mark and not any(marked[at + 1 : at + 2])]
    return tuple(zip(begins, ends, strict=True))


def _written_calls(row: Row, column: str, number: int, value: Any) -> list[Any]:
    """The calls of a turn whose content is one call, or a list of them, as JSON."""
    try:
        calls = parse_json(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        assert calls and all({"name", "arguments"} <= call.keys() for call in calls)
    except (ValueError, AttributeError, AssertionError) as error:
        raise row.error(
            column,
            f"turn {number} is a function_call, so its value must be JSON like "
            f'{{"name": "f", "arguments": {{}}}}, not {excerpt(value)}',
        ) from error
    return calls


def _called(row: Row, column: str, number: int, call: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object (OpenAI's files hold them as JSON text)."""
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function", outer)
    kept = {key: value for key, value in outer.items() if function is not outer}
    arguments = function.get("arguments", {}) if isinstance(function, dict) else None
    try:
        arguments = parse_json(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise row.error(
            column,
            f"message {number} has the tool call {excerpt(call)}, which must be like "
            '{"function": {"name": "f", "arguments": {}}}',
        )
    return {**kept, "type": "function", "function": {**function, "arguments": arguments}}


def _dense(value: Any) -> Any:
    """Without the nulls that Arrow fills in for keys another object of the column has."""
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items() if item is not None}
    return [_dense(item) for item in value] if isinstance(value, list) else value
