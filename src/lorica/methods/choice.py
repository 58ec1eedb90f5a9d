"""What every method declares of itself, and the axes that methods are sorted into.

A method of the literature is one choice on each of a few independent axes. Each axis is a package
here, and each of its files (or folders) holds one public class, the *choice*. The file's name is
the method's name: `methods/combine/dora.py` is what a user types as `dora`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from lorica.interfaces import RecipeLike  # torch's weight


class Axis(NamedTuple):
    """One question about a training method.

    Attributes:
        field: the field of `Recipe` that holds the answer.
        default: name of the method taken when the user names none; None: none is.
        several: whether a recipe may name more than one.
    """

    field: str
    default: str | None
    several: bool


AXES: dict[str, Axis] = {  # package -> axis
    "deltas": Axis("delta", "lowrank", False),
    "combine": Axis("combine", "add", False),
    "inits": Axis("init", "kaiming", False),
    "scales": Axis("scale", "lora", False),
    "ranks": Axis("rank", "uniform", False),
    "schedules": Axis("schedules", None, True),
    "groups": Axis("groups", None, True),
    "rules": Axis("rule", "adamw", False),
    "objectives": Axis("objectives", None, True),
    "kernels": Axis("kernel", "auto", False),
}

# What a choice can give or need. The text ends the sentence "... needs <capability>: <text>".
CAPABILITIES: dict[str, str] = {
    "pair": "two trained factors A (r, in) and B (out, r)",
    "sides": "trained parameters A that read the input, and others, B, that write the output",
    "factors": "an exact low-rank view of ΔW",
    "weight": "a matrix ΔW (out, in) that is added to W",
    "base_unchanged": "the published bytes of the base stay as they are",
    "writable_base": "a dense base weight that may be written to",
    "vector_step": "an optimizer with a step count per row and column",
    "matrices": "a trained matrix that multiplies activations",
    "row_state": "optimizer state with an entry for every row and column of a factor",
    "row_wise": "an optimizer that moves a row or column of a factor by its own gradient alone",
    "diagonal": "a trained diagonal between the factors",
    "restarts": "a start that can be made again during training",
    "input_components": "principal components of each layer's inputs, which an init has observed",
    "zero_start": "ΔW = 0 at the start without frozen factors",
    "keeps_function": "an event that leaves the model's function as it was",
    "sharded": "the same arithmetic on sharded tensors",
    "base": "the frozen weight in every forward",
    "separate": "an update that no other layer's forward reads",
    "hooks": "a look at a layer's input or output during forward",
    "lookup": "a layer whose input is a token id (one-hot)",
    "wrapped": "target layers that hold an adapter",
}


class Source:
    """Docstring of a choice, split once into a title, equations and BibTeX.

    Attributes:
        title: the first paragraph.
        bibtex: the entries, in order.
        arxiv: the arXiv ids among them.
    """

    def __init__(self, cls: type) -> None:
        self.text = inspect.cleandoc(cls.__doc__ or "")
        self.title = " ".join(self.text.split("\n\n", 1)[0].split()).rstrip(".")
        self.bibtex: tuple[str, ...] = tuple(
            textwrap.dedent(m).strip()
            for m in re.findall(r"@\w+\{(?:[^{}]|\{[^{}]*\})*\}", self.text)
        )
        self.arxiv: tuple[str, ...] = tuple(
            e for b in self.bibtex for e in re.findall(r"eprint\s*=\s*\{([^}]*)\}", b)
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point on one axis: a frozen dataclass of hyperparameters, plus what it declares of
    itself."""

    axis: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    withdraws: ClassVar[frozenset[str]] = frozenset()  # capabilities nothing has beside this choice
    preset: ClassVar[Mapping[str, str]] = {}  # axis -> text of the choice this method also fills
    requires: ClassVar[frozenset[str]] = frozenset()  # axes of `preset` that can't be replaced
    # Numeric fields of the recipe that it gives a meaning to.
    takes: ClassVar[frozenset[str]] = frozenset()
    hooks: ClassVar[frozenset[str]] = frozenset()  # what it wants to see of a forward
    only_r: ClassVar[int | None] = None  # the one rank that the method is defined for
    below_full: ClassVar[bool] = False  # r has to be below min(in, out) of every target
    experts: ClassVar[bool] = False  # see `serves_experts`

    # The method's own defaults, asked only where the user left them out; None: nothing to say.
    default_r: ClassVar[int | None] = None
    default_learning_rate: ClassVar[float | None] = None

    def serves_experts(self) -> bool:
        """Whether it works on each matrix of a stack (E, out, in), an expert tensor, by itself."""
        return self.experts

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        """Asked once `recipe.r` is known."""
        return None

    @property
    def name(self) -> str:
        """What a user types for it."""
        return method_name(type(self))

    def text(self) -> str:
        """The name with the arguments that differ from their defaults, as a user would type it."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        arguments = ", ".join(f"{k}={v!r}" for k, v in given.items())
        home = home_axis(type(self))  # a file may serve a second axis, which is then written out
        name = self.name if home in (None, self.axis) else f"{AXES[self.axis].field}.{self.name}"
        return f"{name}({arguments})" if arguments else name


_METHODS = "lorica.methods."


def method_name(cls: type) -> str:
    """The name of the file, or of the folder, that holds a choice's class.

    Example:
        >>> from lorica.methods.combine.dora import Dora
        >>> method_name(Dora)
        'dora'
    """
    module = cls.__module__
    if module.startswith(_METHODS):
        return module.removeprefix(_METHODS).split(".")[1]
    return module.rsplit(".", 1)[-1]


def home_axis(cls: type) -> str | None:
    """The axis whose package holds the class; None: a class from outside of the library."""
    module = cls.__module__
    return module.removeprefix(_METHODS).split(".")[0] if module.startswith(_METHODS) else None


def source(cls: type) -> Source:
    """Title, equations and references of a choice's class, from its docstring."""
    return Source(cls)
