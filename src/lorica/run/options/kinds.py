"""How the text of an option becomes its value.

A kind is written once into an option's annotation; the command line and a YAML file both use it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from lorica.text import clear_errors, nearest, parse_json, shorten, to_path

TASKS = ("causal-lm", "sequence-classification", "token-classification", "seq2seq-lm")


class Kind(tyro.constructors.PrimitiveConstructorSpec):
    """How the text of an option becomes its value; flags and YAML values go the same way.

    Args:
        metavar: stands for the value in `--help`.
        read: the words after the flag -> value; raises ValueError with what is wanted.
        nargs: how many words; `*` for any number.
        mapping: how a YAML mapping becomes the value; None: it cannot be one.
    """

    def __init__(
        self,
        metavar: str,
        read: Callable[[Sequence[str]], Any],
        *,
        nargs: Any = 1,
        mapping: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__(
            nargs=nargs,
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: True,
            str_from_instance=shown,
        )
        object.__setattr__(self, "mapping", mapping)

    def from_yaml(self, value: Any) -> Any:
        """The value of a YAML node; `null` leaves the option unset."""
        if value is None:
            return None
        if isinstance(value, Word) and self.nargs == (0, 1):
            value = value.switch
        if isinstance(value, Mapping):
            mapping: Any = vars(self)["mapping"]
            if mapping is None:
                raise ValueError(f"{self.metavar} is wanted, not a mapping")
            return mapping(value)
        if isinstance(value, bool):
            if self.nargs != (0, 1):
                raise ValueError(f"{self.metavar} is wanted, not {str(value).lower()}")
            return self.instance_from_str([]) if value else None
        if isinstance(value, list) and self.nargs != "*":
            raise ValueError(f"one {self.metavar} is wanted, not a list")
        return self.instance_from_str([str(v) for v in (value if type(value) is list else [value])])


class Word(str):
    """`no`, `off`, `yes` or `on` in a YAML file: a text, or a switch where the option is one.

    Attributes:
        switch: what YAML takes it for.
    """

    switch: bool

    def __new__(cls, text: str, switch: bool) -> Word:
        made = super().__new__(cls, text)
        made.switch = switch
        return made


class Unsaid(str):
    """A text that was not typed: a default, or a value from a file."""


class _Folder(Kind):
    """Text that becomes `Unsaid` where a file gives it."""

    def from_yaml(self, value: Any) -> Any:
        read = super().from_yaml(value)
        return None if read is None else Unsaid(read)


def shown(value: Any) -> list[str]:
    """A value as it would be typed; `-` for what is unset."""
    if value is None or value == () or value == {}:
        return ["-"]
    if isinstance(value, (tuple, list)):
        return [str(v) for v in value]
    return [json.dumps(value) if isinstance(value, Mapping) else str(value)]


def _whole(words: Sequence[str]) -> int:
    try:
        return int(words[0])
    except ValueError:
        raise ValueError(f"a whole number is wanted, e.g. 8, not {shorten(words[0])}") from None


def _number(words: Sequence[str]) -> float:
    try:
        return float(words[0])
    except ValueError:
        raise ValueError(f"a number is wanted, e.g. 1e-4, not {shorten(words[0])}") from None


def _names(words: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for word in words for name in word.split(","))
    if not names or "" in names:
        raise ValueError("one or more names are wanted, e.g. `q_proj v_proj`")
    return names


def _modules(words: Sequence[str]) -> str | tuple[str, ...]:
    if len(words) == 1 and (words[0] == "all-linear" or re.search(r"[*+?()\[\]{}|^$\\]", words[0])):
        return words[0]
    return _names(words)


def _wholes(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(_whole([name]) for name in _names(words))


def _json(words: Sequence[str]) -> dict[str, Any]:
    wanted = """a JSON mapping is wanted, e.g. '{"q_proj": 8}', not """
    try:
        value = parse_json(words[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"{wanted}{shorten(words[0])} ({error})") from None
    except ValueError:  # a number of thousands of digits, endless nesting
        raise ValueError(f"{wanted}{shorten(words[0])}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{wanted}{shorten(words[0])}")
    return value


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = [name.partition("=") for name in _names(words)]
    if bad := ["".join(pair) for pair in pairs if not all(pair)]:
        raise ValueError(
            f"pairs name=column are wanted, e.g. `text=sentence`, not {shorten(bad[0])}"
        )
    return {name: value for name, _, value in pairs}


def method_text(mapping: Mapping[str, Any]) -> str:
    """The text form of a YAML mapping {word: {argument: value}}.

    Example:
        >>> method_text({"dora": None, "pissa": {"niter": 16}})
        'dora+pissa(niter=16)'
    """
    parts = []
    for word, arguments in mapping.items():
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ValueError(
                f"{shorten(str(word))} takes a mapping of its arguments, not"
                f" {shorten(str(arguments))}"
            )
        inside = ", ".join(f"{name}={value!r}" for name, value in (arguments or {}).items())
        parts.append(f"{word}({inside})" if inside else str(word))
    return "+".join(parts)


def choice(*allowed: str) -> Kind:
    """One word out of `allowed`."""

    def read(words: Sequence[str]) -> str:
        if words[0] not in allowed:
            hint = nearest(words[0], allowed)
            raise ValueError(f"{shorten(words[0])} is none of {', '.join(allowed)}.{hint}")
        return words[0]

    return Kind("{" + ",".join(allowed) + "}", read)


def _first(words: Sequence[str]) -> str:
    return words[0]


def _paths(words: Sequence[str]) -> tuple[str, ...]:
    if not words or "" in words:
        raise ValueError("one or more files, folders or hub ids are wanted")
    return tuple(_path([word]) for word in words)


def _path(words: Sequence[str]) -> str:
    to_path(words[0])  # an empty one is refused with its option's name
    return words[0]


def _tokens(words: Sequence[str]) -> tuple[str, ...]:
    one = words[0] if len(words) == 1 else None
    if one is not None and (file := _file(one)) is not None:
        try:
            with clear_errors():
                text = file.read_text(encoding="utf-8")
            found = [line for line in text.split("\n") if line]
        except UnicodeDecodeError:
            raise ValueError(f"{shorten(one)} is no UTF-8 text with one token a line") from None
    else:
        found = [*words] if one is None else one.split(",")
    if not found or "" in found:
        raise ValueError("tokens are wanted, or a file with one token a line, e.g. `<user> <bot>`")
    return (*found,)


@clear_errors()
def _file(word: str) -> Path | None:
    """The file that a word names, which may be a token of any characters instead."""
    try:
        path = to_path(word)
    except ValueError:
        return None
    return path if path.is_file() else None


TEXT = Kind("TEXT", _first)
PATH = Kind("PATH", _path)
FOLDER = _Folder("PATH", _path)
PATHS = Kind("PATH ...", _paths, nargs="*")
METHOD = Kind("METHOD", _first, mapping=method_text)
WHOLE = Kind("INT", _whole)
NUMBER = Kind("FLOAT", _number)
TOKENS = Kind("FILE|TOKEN ...", _tokens, nargs="*")
NAMES = Kind("NAME ...", _names, nargs="*")
MODULES = Kind("NAMES|REGEX|all-linear", _modules, nargs="*")
WHOLES = Kind("INT ...", _wholes, nargs="*")
JSON = Kind("JSON", _json, mapping=dict)
PAIRS = Kind("NAME=COLUMN ...", _pairs, nargs="*", mapping=dict)
RESUME = Kind("[PATH]", lambda words: _path(words) if words else "last", nargs=(0, 1))
DTYPE = choice("auto", "float32", "bfloat16", "float16")


def hint(text: str) -> str:
    """What `--help` adds to an option with this default; nothing where it is unset."""
    return "" if text == "-" else f"(default: {text})"


HINT = tyro.conf.arg(help_behavior_hint=hint)


def kinds(options: type) -> dict[str, Kind | None]:
    """{field: its kind} of a class of options; None: a switch."""
    hints = get_type_hints(options, include_extras=True)
    found: dict[str, Kind | None] = {}
    for f in dataclasses.fields(options):
        marks = getattr(hints[f.name], "__metadata__", ())
        own = [m for m in marks if isinstance(m, Kind)]
        if own or f.type == "bool":
            found[f.name] = own[0] if own else None
    return found
