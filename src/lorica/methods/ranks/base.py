"""Ranks: which layer gets which rank and alpha.

To add one: copy `uniform.py`.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import RecipeLike
from lorica.methods.choice import Choice


def block_of(path: str) -> str | None:
    """The transformer block of a module: its path up to the first number; None in no block."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if first is None else ".".join(parts[: first + 1])


def flaw(pattern: object) -> str | None:
    """Why `first_match` can't use this as a pattern; None: it can."""
    for form in ("{}", r"(.*\.)?({})"):
        try:
            re.compile(form.format(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            return str(error)
    return None


def first_match(patterns: Mapping[str, object], name: str) -> str | None:
    """The first pattern that ends the module path `name` on whole components, PEFT's rule."""
    return next((p for p in patterns if re.fullmatch(rf"(.*\.)?({p})", name)), None)


@dataclass(frozen=True, kw_only=True)
class AbstractRank(Choice, abc.ABC):
    axis: ClassVar[str] = "ranks"
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    reads_patterns: ClassVar[bool] = False  # `rank_pattern` and `alpha_pattern` have an effect
    # The default where such patterns are given, so that a method's text need not name it.
    implied: ClassVar[bool] = False

    @abc.abstractmethod
    def assign(
        self, names: Sequence[str], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        """(rank, alpha) of every layer, by module path, in model order."""
