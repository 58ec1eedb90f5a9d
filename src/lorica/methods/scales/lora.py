"""s = α/r."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lorica.interfaces import RecipeLike
from lorica.methods.scales.base import AbstractScale


@dataclass(frozen=True, kw_only=True)
class Lora(AbstractScale):
    """Low-rank adaptation as published: ΔW = (α/r)·B·A is added to a frozen W, B = 0 at the start.

    Default α = 2r (s = 2, usual practice); default rate 2e-4 (the paper's for GPT-2 and GPT-3,
    about ten times the rate of full training).

    Cost: r·(in + out) trained parameters per layer; a step costs about 5 % more than with
    everything frozen; nothing after merging.
    When: always first.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora", r=8).lora_alpha
        16

    Reference:
        @inproceedings{hu2022lora,
          title = {LoRA: Low-Rank Adaptation of Large Language Models},
          author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li,
                    Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
          booktitle = {ICLR}, year = {2022}, eprint = {2106.09685}
        }
    """

    preset: ClassVar[Mapping[str, str]] = {"deltas": "lowrank"}
    peft_rslora: ClassVar[bool | None] = False

    default_learning_rate: ClassVar[float | None] = 2e-4

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        assert recipe.r is not None  # known before a default alpha is asked for
        return 2 * recipe.r

    def factor(self, alpha: float | None, r: int) -> float:
        assert alpha is not None
        return alpha / r

    def alpha_for(self, s: float, r: int) -> float:
        alpha = s * r
        return int(alpha) if alpha == int(alpha) else alpha
