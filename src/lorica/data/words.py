"""Small helpers that every reader of user data shares: places, JSON kept as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorica.embedded.source import WHERE as WHERE  # the column that names a row's file and line
from lorica.text import one_line, parse_json, printable

INDEX = "__index__"
"""Hidden column that says that the data came with the index of a table, which was dropped."""

# The record separator of RFC 7464 (JSON text sequences): it marks a cell that Arrow could not hold
# unchanged (lists of unlike dictionaries) and that is therefore kept as JSON text.
_MARK = "\x1e"


def visible(columns: Iterable[str]) -> list[str]:
    """The user's own columns: those whose name doesn't start with two underscores."""
    return [name for name in columns if not name.startswith("__")]


def listing(names: Iterable[str], most: int = 30) -> str:
    """Names in back-ticks, for the end of a sentence; of more than `most` the first ones.

    Example:
        >>> listing(["text", "label"]), listing(map(str, range(99)), most=1)
        ('`text`, `label`', '`0` and 98 more')
    """
    names = list(names)
    shown = ", ".join(f"`{one_line(name, 100)}`" for name in names[:most]) or "none"
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def kind_of(value: Any) -> str:
    """What a value is, in the words of a JSON user."""
    if value is None:
        return "nothing (null)"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def excerpt(value: Any, width: int = 60) -> str:
    """The value as JSON, `printable`, and cut to `width` characters."""
    if isinstance(value, str):
        value = value[: width + 1]
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= width else text[: width - 3] + "..."


def keep_as_json(value: Any) -> str | None:
    """A nested value as one marked text cell; `None` stays `None`."""
    return None if value is None else _MARK + json.dumps(value, ensure_ascii=False)


def revive(value: Any) -> Any:
    """The nested value of a cell made by `keep_as_json`; any other value as it is."""
    if isinstance(value, str) and value.startswith(_MARK):
        try:
            return parse_json(value[1:])
        except ValueError:  # a text of a hub's that begins so
            return value
    return value


def keep_as_text(value: Any) -> Any:
    """A text that could be taken for such a cell as one; any other value as it is."""
    return keep_as_json(value) if isinstance(value, str) and value.startswith(_MARK) else value


def strings(value: Any) -> Iterator[str]:
    """All texts within a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)
