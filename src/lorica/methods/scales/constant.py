"""s is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.methods.fields import number
from lorica.methods.scales.base import AbstractScale


@dataclass(frozen=True, kw_only=True)
class Constant(AbstractScale):
    """The same s for every rank; `lora_alpha` has no effect with it and is an error.

    Args:
        s: the factor; default 1.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("constant(s=0.5)").lora_alpha is None
        True
    """

    s: float = 1.0
    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number(self, "s", above=0, say="a number above 0, e.g. `constant(s=1)`")

    default_learning_rate: ClassVar[float | None] = 2e-4

    def factor(self, alpha: float | None, r: int) -> float:
        return self.s

    def alpha_for(self, s: float, r: int) -> None:
        return None
