"""Ranks: which layer gets which rank and alpha.

To add one: copy `uniform.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.rooms import Choice


@dataclass(frozen=True, kw_only=True)
class AbstractRank(Choice, abc.ABC):
    room: ClassVar[str] = "ranks"
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    reads_patterns: ClassVar[bool] = False

    @abc.abstractmethod
    def assign(self, names: Sequence[str], recipe: Any) -> dict[str, tuple[int, float | None]]:
        """(rank, alpha) of every layer, by module path, in model order."""
