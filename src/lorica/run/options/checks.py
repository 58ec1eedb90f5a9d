"""Errors of options, and the checks that several options share.

A check is one line where it is used. Its message says what was given, what is allowed and, where
that is not the same, what to type instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorica.text import clear_errors, cut, parse_json, shorten, to_path

MOST = 10**9  # steps, epochs, rows: a larger number is a slip of the finger
MOST_TOKENS = 10**15


class UsageError(ValueError):
    """What was typed cannot be run: exit status 2, where any other error has 1.

    Args:
        message: for a person, so what it quotes at length is cut.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(str(message)))


def flag(name: str) -> str:
    """The option of a field.

    Example:
        >>> flag("max_steps")
        '--max-steps'
    """
    return "--" + name.replace("_", "-")


def refuse(wrong: bool, message: str) -> None:
    """Raise UsageError with `message` where something is wrong."""
    if wrong:
        raise UsageError(message)


def is_number(value: Any) -> bool:
    """Whether this is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_whole(name: str, value: float | None, *, least: int = 1, most: int = MOST) -> None:
    """An option that counts something; None: it was not given.

    Raises:
        UsageError: below `least` or above `most`.
    """
    if value is not None:
        given = f"`{flag(name)} {value}`"
        refuse(value < least, f"{given}: it is a whole number of at least {least}")
        refuse(value > most, f"{given}: it is {most:,} at most")


def check_above_zero(name: str, value: float | None) -> None:
    """An option that is a finite number above 0; None: it was not given.

    Raises:
        UsageError: it is not.
    """
    if value is not None and not 0 < value < float("inf"):
        raise UsageError(f"`{flag(name)} {value}`: it is a number above 0")


def check_path(name: str, value: str | tuple[str, ...] | None) -> None:
    """An option that names files; None: it was not given.

    Raises:
        UsageError: it is empty, or no file can have this name.
    """
    for path in value if isinstance(value, tuple) else (value,):
        refuse(path == "", f"`{flag(name)} ''`: a path is wanted; leave it out for none")
        if path is not None:
            path_option(name, path)


def path_option(name: str, value: str) -> Path:
    """The path that an option names.

    Raises:
        UsageError: no file can have this name.
    """
    try:
        return to_path(value)
    except ValueError as error:
        raise UsageError(f"`{flag(name)}`: {error}") from None


def json_option(name: str, value: str) -> dict[str, Any]:
    """The JSON mapping that an option holds, or that lies in the file it names.

    Raises:
        UsageError: there is no such file, it can't be read, or holds something else.
    """
    given = f"`{flag(name)} {shorten(value)[1:-1]}`"
    wanted = """JSON itself is wanted, e.g. '{"key": true}', or a file of it"""
    text, where = value, given
    if not value.lstrip().startswith("{"):
        path = path_option(name, value)
        try:
            with clear_errors():
                refuse(not path.is_file(), f"{given}: there is no such file; {wanted}")
                text, where = path.read_text(encoding="utf-8"), f"{given}: {path}"
        except UnicodeDecodeError:
            raise UsageError(f"{given}: the file is no UTF-8 text; {wanted}") from None
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"`{flag(name)}`: {error}") from error
    try:
        found: Any = parse_json(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{where}, {place}: {error.msg}, so it is no JSON; {wanted}") from None
    except ValueError as error:
        raise UsageError(f"{where}: {error}; {wanted}") from None
    refuse(
        not isinstance(found, dict),
        f"{where}: it holds a {type(found).__name__}, not a mapping; {wanted}",
    )
    return found


def check_not_both(one: str, a: Any, other: str, b: Any, why: str) -> None:
    """Two options of which at most one may be given; None: it was not.

    Args:
        one, other: their names.
        a, b: their values.
        why: completes "... were both given, and".

    Raises:
        UsageError: both were given.
    """
    if a is not None and b is not None:
        raise UsageError(
            f"`{flag(one)} {a}` and `{flag(other)} {b}` were both given, and {why}; leave one of"
            " the two out"
        )


def checkpoint_path(resume: str | None) -> Path:
    """The folder that `--resume PATH` names, with its name even from within."""
    path = to_path(resume or "")
    return path.resolve() if path.name in ("", "..") else path
