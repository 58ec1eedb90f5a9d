"""Kernels: in which order the products of one layer are computed.

Every kernel computes x Wᵀ + update(x) (+ b) and differs from the others only in rounding, time and
memory. The suite
holds every file to: equal to `reference` in float64 within rounding, and gradcheck.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorica.rooms import Choice


@dataclass(frozen=True, kw_only=True)
class AbstractKernel(Choice, abc.ABC):
    room: ClassVar[str] = "kernels"
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})

    @abc.abstractmethod
    def product(self, x: Tensor, base, update, *, bias: bool) -> Tensor:
        """(..., in) -> (..., out): x Wᵀ + update(x), with the base's bias where `bias`."""

    def threshold(self, in_features: int, out_features: int) -> int | None:
        """Tokens in a call from which on W + ΔW is materialised; None: never."""
        return None
