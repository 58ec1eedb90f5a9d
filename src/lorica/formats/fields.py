"""Checks the values of a JSON file against a table that says what each key may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.text import shorten

NUMBER = (int, float)
_REMEDY = "Correct the file, or copy it again from where it came"


@dataclass(frozen=True, kw_only=True)
class Field:
    """What one key may hold; null, or no such key, always passes (see `check_given`).

    Args:
        types: allowed types of the value. A boolean is a number only where `bool` is listed.
        items: allowed types of a list's elements or of an object's values; None: any.
        fits: whether a value (each item, where `items` is given) is in range.
        allowed: the range in words, which ends the sentence "allowed is ...".
    """

    types: tuple[type, ...]
    items: tuple[type, ...] | None = None
    fits: Callable[[Any], bool] | None = None  # Any: a JSON value of one of the types
    allowed: str = ""


def check_fields(
    data: Mapping[str, object], fields: Mapping[str, Field], where: Path | str
) -> None:
    """Check every key of `fields` that `data` has.

    Args:
        where: the file, and the part of it, as the message names them.

    Raises:
        ValueError: naming all values of a wrong type, else the first one that is out of range.

    Example:
        >>> check_fields({"r": 8}, {"r": Field(types=(int,))}, "a.json")
        >>> check_fields({"r": "8"}, {"r": Field(types=(int,))}, "a")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: a: 'r' is '8', not int. Correct the file...
    """
    given = {key: value for key in fields if (value := data.get(key)) is not None}
    bad = [
        f"{key!r} is {shorten(value)}, not {_names(fields[key].types)}"
        for key, value in given.items()
        if not _is(value, fields[key].types)
    ]
    bad = (
        bad
        or [
            f"{key!r} holds {shorten(item)}, not {_names(items)}"
            for key, value in given.items()
            if (items := fields[key].items) is not None
            for _, item in _parts(key, value)
            if not _is(item, items)
        ][:1]
    )
    bad = (
        bad
        or [
            f"`{name}={shorten(item)}`: allowed is {field.allowed}"
            for key, value in given.items()
            if (field := fields[key]).fits is not None
            for name, item in (_parts(key, value) if field.items else [(key, value)])
            if not field.fits(item)
        ][:1]
    )
    if bad:
        raise ValueError(f"{where}: {'; '.join(bad)}. {_REMEDY}")


def check_given(
    data: Mapping[str, object], keys: Iterable[str], where: Path | str, why: str
) -> None:
    """Check that the keys are there and not null.

    Raises:
        ValueError: naming the keys that are missing; `why` ends the message.
    """
    if missing := sorted(key for key in keys if data.get(key) is None):
        raise ValueError(f"{where}: {missing} must be given; {why}")


def one_of(*values: str) -> Field:
    """A text that is one of `values`."""
    return Field(types=(str,), fits=values.__contains__, allowed=", ".join(map(repr, values)))


def _parts(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The items of a list or an object, with the names that a message gives them."""
    if isinstance(value, dict):
        yield from ((f"{key}[{shorten(k)}]", item) for k, item in value.items())
    elif isinstance(value, list):
        yield from ((key, item) for item in value)


def _is(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _names(types: tuple[type, ...]) -> str:
    return " or ".join(t.__name__ for t in types)
