"""Text of error messages: what they quote, cut to what a person reads, and what they suggest;
whether a text can name a file at all, and what the system refuses of one; and JSON as everything
here reads it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_LONG = re.compile(r"([^\s]{500})[^\s]{500,}")
# What a terminal would obey, or what hides or turns around what it shows: C0 without tab and line
# break, C1, line separators, marks of direction, and halves of surrogate pairs.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_INDEX = re.compile(r"\.\d+(?=\.|$)")  # of a module in a list
LONGEST = 4000  # characters of a message


def by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Module paths that differ in their indices alone, together.

    Example:
        >>> by_pattern(["h.0.fc", "h.1.fc", "head"])
        {'h.*.fc': ['h.0.fc', 'h.1.fc'], 'head': ['head']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_INDEX.sub(".*", name), []).append(name)
    return groups


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> clock(3700)
        '1:01:40'
    """
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Styled(str):
    """A text with escape sequences of ours, whose data `printable` has been through."""

    __slots__ = ()


def printable(text: str) -> str:
    r"""The text as it leaves for a terminal or a page: what that would obey is spelt as JSON
    spells it, so that a line of JSON stays one.

    Example:
        >>> print(printable("a\x1b[2J\u202eb"))
        a\u001b[2J\u202eb
    """
    if isinstance(text, Styled):
        return text
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: object, width: int = 500) -> str:
    r"""A name, or a free text of a file, within a line of ours: `printable`, without line breaks,
    and cut.

    Example:
        >>> print(one_line("base\nPROBLEM: none"))
        base\nPROBLEM: none
    """
    spelt = str(text)[: width + 1].replace("\n", "\\n").replace("\t", "\\t")
    return printable(spelt if len(spelt) <= width else spelt[: width - 3] + "...")


def shorten(value: Any, width: int = 120) -> str:
    """A value of a file as an error message shows it: as Python writes it, and cut.

    Example:
        >>> shorten("q" * 300, width=10)
        "'qqqqqq..."
    """
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def cut(text: str) -> str:
    """A message as a person is shown it: `printable`, no word longer than 1,000 characters, and of
    4,000 in all, with its end, which says what to do.

    Example:
        >>> len(cut("a" * 9000)), len(cut("a " * 9000)), cut("a " * 9000 + "leave it out")[-14:]
        (503, 4000, 'a leave it out')
    """
    text = printable(_LONG.sub(r"\1...", text))
    return text if len(text) <= LONGEST else text[: LONGEST - 1005] + " ... " + text[-1000:]


def nearest(name: str, known: Iterable[str], *, flag: bool = False) -> str:
    """A question that ends an error about an unknown name: is the closest known one meant?

    Args:
        name: what was given; `-` and `_` count as the same.
        known: what is allowed.
        flag: write the suggestion as an option of the command line.

    Returns:
        The question with a space before it, or an empty string where no name is close.

    Example:
        >>> nearest("max-step", ["max_steps", "seed"], flag=True)
        ' Did you mean `--max-steps`?'
    """
    spelt = {other.replace("-", "_"): other for other in known}
    close = difflib.get_close_matches(name.replace("-", "_"), spelt, n=1, cutoff=0.6)
    if not close:
        return ""
    found = spelt[close[0]]
    return f" Did you mean `{'--' + found.replace('_', '-') if flag else found}`?"


DEEPEST = 100  # levels of JSON: copying or writing what is read takes several calls a level


def parse_json(text: str | bytes, **how: Any) -> Any:
    """`json.loads`, for texts that come from elsewhere.

    Args:
        how: hooks of `json.loads`.

    Raises:
        json.JSONDecodeError: the text is no JSON.
        ValueError: it is nested too deeply, is no UTF-8, or holds a number of thousands of digits.

    Example:
        >>> parse_json("[" * 300 + "]" * 300)
        Traceback (most recent call last):
            ...
        ValueError: lists or objects nested more than 100 levels deep
    """
    try:
        value = json.loads(text, **how)
    except RecursionError:
        raise ValueError(DEEP) from None
    check_depth(value)
    return value


DEEP = f"lists or objects nested more than {DEEPEST} levels deep"


def check_depth(value: Any) -> None:
    """Whether what JSON held is nested no deeper than `DEEPEST`.

    Raises:
        ValueError: it is.
    """
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            elif isinstance(part, list):
                inner += part
        if not inner:
            return
        level = inner
    raise ValueError(DEEP)


def to_path(name: str | Path) -> Path:
    """The path that a text names, `~` replaced. Whether something lies there is not asked.

    Raises:
        ValueError: no file can have this name. The operating system's own errors about it would
            come from wherever the path is first looked at.

    Example:
        >>> to_path("~nobody-of-this-name/rows.csv")
        Traceback (most recent call last):
            ...
        ValueError: '~nobody-of-this-name/rows.csv': `~` names no user here. Check the name
    """
    text = str(name)
    fault = None
    if CONTROL.search(text):
        fault = "a path is of printable characters"
    elif any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        fault = "a part of a path has at most 255 bytes"
    elif len(os.fsencode(text)) > 4000:
        fault = "a path has at most 4,000 bytes"
    else:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            fault = "`~` names no user here"
    raise ValueError(f"{shorten(text)}: {fault}. Check the name")


_WAYS_OUT = {
    errno.EACCES: "Give this user the right to it (`ls -ld` shows who has it), or name another",
    errno.EROFS: "Nothing can be written on that disk; name a place elsewhere",
    errno.ENOSPC: "Make room there, or name a place elsewhere",
    errno.ENOENT: "Check the path; it may have been moved or removed while this ran",
    errno.ENOTDIR: "A part of the path is a file, not a folder; check the path",
    errno.EISDIR: "Name a file, not a folder",
    errno.EEXIST: "Remove it, or name another",
    errno.ELOOP: "Its symbolic links lead in a circle; name the file itself",
    errno.EMFILE: "Close some, or allow more with `ulimit -n`",
}
_WAYS_OUT[errno.EPERM] = _WAYS_OUT[errno.EACCES]
_WAYS_OUT[errno.EDQUOT] = _WAYS_OUT[errno.ENOSPC]
_WAYS_OUT[errno.ENFILE] = _WAYS_OUT[errno.EMFILE]


def refusal(error: BaseException) -> str | None:
    """What the operating system refused, of which path, and the way out; None: this error is about
    no path.

    Example:
        >>> refusal(PermissionError(13, "Permission denied", "/data/a.csv"))[:36]
        '`/data/a.csv`: Permission denied. Gi'
    """
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if not isinstance(error.filename, (str, bytes)):
        return None
    path = one_line(os.fsdecode(error.filename))
    way_out = _WAYS_OUT.get(error.errno, "Check that disk, or name another path")
    return f"`{path}`: {os.strerror(error.errno)}. {way_out}"


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Decorates the functions that people call: what the operating system refuses is told with the
    path and a way out, and no message is longer than `LONGEST`.

    Raises:
        ValueError: for an OSError about a path. Those that have words of ours are left alone: they
            name no path of their own.

    Example:
        >>> with clear_errors():
        ...     os.listdir("no/folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: `no/folder`: No such file or directory. Check the path; it may have been ...
    """
    try:
        yield
    except OSError as error:
        if (why := refusal(error)) is None:
            raise
        raise ValueError(why) from error
    except ValueError as error:
        if len(error.args) == 1 and len(str(error)) > LONGEST:
            error.args = (cut(str(error)),)
        raise


def no_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, of the machine or of an accelerator.

    Example:
        >>> no_memory(MemoryError())
        True
    """
    torch: Any = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    # The CPU's allocator, and cuBLAS, have no error of their own.
    words = ("DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
