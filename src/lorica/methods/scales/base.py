"""Scales: the factor s that multiplies ΔW.

To add one: copy `rslora.py`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from lorica.methods.choice import Choice


@dataclass(frozen=True, kw_only=True)
class AbstractScale(Choice, abc.ABC):
    axis: ClassVar[str] = "scales"
    experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"wrapped"})
    uses_alpha: ClassVar[bool] = True
    # The value of `use_rslora` with which PEFT computes this s from alpha and r; None: it can't.
    peft_rslora: ClassVar[bool | None] = None

    @abc.abstractmethod
    def factor(self, alpha: float | None, r: int) -> float:
        """s for a layer of rank r."""

    @abc.abstractmethod
    def alpha_for(self, s: float, r: int) -> float | None:
        """The alpha with which `factor` is s; None where alpha has no effect."""
