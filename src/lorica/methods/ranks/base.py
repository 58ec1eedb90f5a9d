"""Ranks: which layer gets which rank and alpha.

To add one: copy `uniform.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import RecipeLike
from lorica.methods.choice import Choice
from lorica.patterns import find
from lorica.patterns import flaw as flaw_of

ENDS = r"(.*\.)?({})"  # PEFT's rule: a pattern ends a module path, on whole components


def block_of(path: str) -> str | None:
    """The transformer block of a module: its path up to the first number; None in no block."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if first is None else ".".join(parts[: first + 1])


def flaw(pattern: str) -> str | None:
    """Why `first_matches` can't use this as a pattern; None: it can."""
    return flaw_of(pattern) or flaw_of(pattern, ENDS)


def first_matches(patterns: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    r"""{module path: the first pattern that ends it}, without the paths that none ends.

    Raises:
        Endless: see `lorica.patterns.find`.

    Example:
        >>> first_matches(["q", r"b\..*"], ["a.q", "b.q", "b.v", "a.v"])
        {'a.q': 'q', 'b.q': 'q', 'b.v': 'b\\..*'}
    """
    first: dict[str, str] = {}
    for pattern, ended in find(patterns, names, form=ENDS).items():
        for name in ended:
            first.setdefault(name, pattern)
    return first


@dataclass(frozen=True, kw_only=True)
class AbstractRank(Choice, abc.ABC):
    axis: ClassVar[str] = "ranks"
    experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    reads_patterns: ClassVar[bool] = False  # `rank_pattern` and `alpha_pattern` have an effect
    # The default where such patterns are given, so that a method's text need not name it.
    implied: ClassVar[bool] = False

    @abc.abstractmethod
    def assign(
        self, names: Sequence[str], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        """(rank, alpha) of every layer, by module path, in model order."""
