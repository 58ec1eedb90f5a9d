"""What a verb hands back: one thing for machines, one for people."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.run.folder import strict
from lorica.run.options import Group
from lorica.text import one_line, printable

if TYPE_CHECKING:
    from rich.text import Text


class Others(abc.ABC):
    """Options that a verb takes beside its own fields; asked only where there are unknown ones."""

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Their names, with underscores."""

    @abc.abstractmethod
    def takes(self, name: str) -> bool:
        """Whether `--name` is one of their flags."""

    @abc.abstractmethod
    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of these flags, by name."""

    @abc.abstractmethod
    def value(self, name: str, value: Any, place: str) -> Any:
        """The value of one YAML key; `place` says where it stands."""


@dataclass(frozen=True, kw_only=True)
class VerbOptions:
    """Options of every command.

    Args:
        json: print one JSON object to standard output and nothing else.
    """

    json: bool = False

    aliases: ClassVar[Mapping[str, str]] = {}  # other names of keys
    groups: ClassVar[tuple[Group, ...]] = ()  # of `--help`; none: one list
    smaller: ClassVar[str] = "take a smaller model"  # what to type where memory runs out

    @classmethod
    def others(cls) -> Others | None:
        """What this verb takes beside its fields, or None."""
        return None

    def base_file(self) -> Path | None:
        """A YAML file that these options imply, to be read before them; None: there is none."""
        return None


@dataclass(frozen=True)
class Outcome:
    """`data` is JSON-ready; `shown` is text, or renderables of Rich, for a terminal; `status` is
    the exit status, 1 where a check found a problem."""

    data: dict[str, Any]
    shown: tuple[Any, ...] = ()
    status: int = 0


def write(outcome: Outcome, *, json: bool) -> None:
    """Print an outcome on standard output."""
    if json:
        print(as_json(outcome.data))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width; nothing is cut for it
        console = Console(highlight=False, width=240)
    for part in outcome.shown:
        if isinstance(part, str):
            print(printable(part))
        else:
            console.print(part)


def as_json(data: Any) -> str:
    """One line of strict JSON: what is no finite number becomes null."""
    return printable(json.dumps(strict(data), allow_nan=False, ensure_ascii=False, default=str))


def cell(text: object) -> Text:
    """A name of a file in a cell of a table: nothing in it is Rich's markup, or a terminal's."""
    from rich.text import Text

    return Text(one_line(text))
