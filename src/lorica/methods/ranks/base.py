"""Ranks: which layer gets which rank and alpha.

To add one: copy `uniform.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.methods.choice import Choice


def block_of(path: str) -> str | None:
    """The transformer block of a module: its path up to the first number; None in no block."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if first is None else ".".join(parts[: first + 1])


@dataclass(frozen=True, kw_only=True)
class AbstractRank(Choice, abc.ABC):
    axis: ClassVar[str] = "ranks"
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    reads_patterns: ClassVar[bool] = False

    @abc.abstractmethod
    def assign(self, names: Sequence[str], recipe: Any) -> dict[str, tuple[int, float | None]]:
        """(rank, alpha) of every layer, by module path, in model order."""
