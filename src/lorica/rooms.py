"""The rooms of the house: how a file becomes a word, and what each word declares.

A *room* is a sub-package of `lorica` (`deltas`, `combine`, `inits`, ...) and answers one question
about a training method. Each file of a room holds one public class, the *choice*; the file's name
is its *word*.
Nothing lists the words: they are found by walking the folders, so a new file is a new word.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# room -> (field of Recipe, its default word, whether a recipe may name several)
ROOMS: dict[str, tuple[str, str | None, bool]] = {
    "deltas": ("delta", "lowrank", False),
    "combine": ("combine", "add", False),
    "inits": ("init", "kaiming", False),
    "scales": ("scale", "lora", False),
    "ranks": ("rank", "uniform", False),
    "schedules": ("schedules", None, True),
    "groups": ("groups", None, True),
    "optim": ("rule", "adamw", False),
    "objectives": ("objectives", None, True),
    "kernels": ("kernel", "auto", False),
}
BASES = "bases"  # found at attach from the modules themselves, never named in a recipe

# What a choice can give or need. The text ends the sentence "... needs <capability>: <text>".
CAPABILITIES: dict[str, str] = {
    "pair": "two trained factors A (r, in) and B (out, r)",
    "sides": "trained parameters A that read the input, and others, B, that write the output",
    "factors": "an exact low-rank view of ΔW",
    "weight": "a matrix ΔW (out, in) that is added to W",
    "pristine": "the published bytes of the base stay as they are",
    "writable_base": "a dense base weight that may be written to",
    "vector_step": "an optimizer with a step count per row and column",
    "row_state": "optimizer state with an entry for every row and column of a factor",
    "row_wise": "an optimizer that moves a row or column of a factor by its own gradient alone",
    "diagonal": "a trained diagonal between the factors",
    "zero_start": "ΔW = 0 at the start without an anchor",
    "keeps_function": "an event that leaves the model's function as it was",
    "sharded": "the same arithmetic on sharded tensors",
    "base": "the frozen weight in every forward",
    "separate": "an update that no other layer's forward reads",
    "taps": "a look at a layer's input or output during forward",
    "lookup": "a layer whose input is a token id (one-hot)",
    "wrapped": "target layers that hold an adapter",
}


class _Source:
    """Docstring of the choice, split once into a title, equations and BibTeX."""

    def __init__(self, cls: type) -> None:
        self.text = inspect.cleandoc(cls.__doc__ or "")
        self.title = " ".join(self.text.split("\n\n", 1)[0].split()).rstrip(".")
        self.bibtex = tuple(
            textwrap.dedent(m).strip()
            for m in re.findall(r"@\w+\{(?:[^{}]|\{[^{}]*\})*\}", self.text)
        )
        self.arxiv = tuple(
            e for b in self.bibtex for e in re.findall(r"eprint\s*=\s*\{([^}]*)\}", b)
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point on one axis: a frozen dataclass of hyperparameters, plus what it declares of
    itself."""

    room: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    withdraws: ClassVar[frozenset[str]] = frozenset()  # capabilities nobody has beside this choice
    preset: ClassVar[Mapping[str, str]] = {}  # room -> text of the choice this word also fills
    requires: ClassVar[frozenset[str]] = frozenset()  # rooms of `preset` that can't be replaced
    status: ClassVar[str] = "stable"
    takes: ClassVar[frozenset[str]] = (
        frozenset()
    )  # numeric fields of the recipe it gives meaning to
    taps: ClassVar[frozenset[str]] = frozenset()  # what it wants to see of a forward, see `taps`
    only_r: ClassVar[int | None] = None  # the one rank that the method is defined for
    below_full: ClassVar[bool] = False  # r has to be below min(in, out) of every target

    # The method's own defaults, asked only where the user left them out; None: nothing to say.
    default_r: ClassVar[int | None] = None
    default_learning_rate: ClassVar[float | None] = None

    def default_lora_alpha(self, recipe: Any) -> float | None:
        """Asked once `recipe.r` is known."""
        return None

    @property
    def word(self) -> str:
        return word_of(type(self))

    def text(self) -> str:
        """The word with the arguments that differ from their defaults, as the user would type
        it."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        arguments = ", ".join(f"{k}={v!r}" for k, v in given.items())
        home = room_of(self.word)  # a file may serve a second axis, which is then written out
        word = self.word if home in (None, self.room) else f"{ROOMS[self.room][0]}.{self.word}"
        return f"{word}({arguments})" if arguments else word


def word_of(cls: type) -> str:
    return cls.__module__.rsplit(".", 1)[-1]


def source(cls: type) -> _Source:
    return _Source(cls)


def plain(word: str) -> str:
    """Lower case without `-` and `_`: the spelling in which words are compared."""
    return word.lower().replace("-", "").replace("_", "")


@functools.cache
def _package(room: str):
    return importlib.import_module(f"lorica.{room}")


@functools.cache
def words(room: str) -> tuple[str, ...]:
    """The words of a room, in alphabetical order, without importing the files."""
    found = (m.name for m in pkgutil.iter_modules(_package(room).__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


@functools.cache
def room_of(word: str) -> str | None:
    for room in ROOMS:
        if word in words(room):
            return room
    return None


@functools.cache
def load(word: str, room: str | None = None) -> type[Choice]:
    """The class that `word` names, or the one that its file holds for another `room`."""
    home = room_of(word)
    if home is None:
        raise ValueError(unknown(word))
    module = importlib.import_module(f"lorica.{home}.{word}")
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Choice) and c.__module__ == module.__name__
    ]
    mine = [c for c in classes if c.room == (room or home)]
    if len(mine) != 1:
        raise ValueError(
            f"`{word}` is no choice of the room `{room}`; allowed there:"
            f" {', '.join(words(room or home))}"
        )
    return mine[0]


def unknown(word: str) -> str:
    every = [w for room in ROOMS for w in words(room)]
    near = difflib.get_close_matches(word, every, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else "`lorica methods` lists all words"
    return f"unknown method word `{word}`: {hint} Known words: {', '.join(sorted(every))}"


def build(word: str, arguments: Mapping[str, Any], room: str | None = None) -> Choice:
    """Make the choice, with an error that lists the arguments it has when one is unknown."""
    cls = load(word, room)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            allowed = ", ".join(f"`{k}`" for k in known) or "none"
            hint = f"type `{word}({near[0]}=...)`" if near else f"type `{word}` without it"
            raise ValueError(
                f"`{word}` has no argument `{name}`; its arguments: {allowed}. Instead {hint}"
            )
    return cls(**arguments)
