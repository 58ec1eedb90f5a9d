"""s = α/√r, so that the sizes of ΔW and of its gradients do not depend on the rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import RecipeLike
from lorica.methods.scales.base import AbstractScale


@dataclass(frozen=True, kw_only=True)
class RsLora(AbstractScale):
    """Rank-stabilised scale s = α/√r. Equal to LoRA with α·√r; at equal s, α is LoRA's divided by
    √r.

    Default α = 8: s = 2 at r = 16, LoRA's own default there. A LoRA α reused here raises the
    effective rate a lot.

    Cost: nothing.
    When: ranks of 64 and more, where α/r makes the update small.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("rslora", r=16).lora_alpha
        8

    Reference:
        @misc{kalajdzievski2023rank,
          title = {A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA},
          author = {Kalajdzievski, Damjan}, year = {2023}, eprint = {2312.03732}
        }
    """

    peft_rslora: ClassVar[bool | None] = True

    default_learning_rate: ClassVar[float | None] = 2e-4

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return 8

    def factor(self, alpha: float | None, r: int) -> float:
        assert alpha is not None
        return alpha / r**0.5

    def alpha_for(self, s: float, r: int) -> float:
        return s * r**0.5
