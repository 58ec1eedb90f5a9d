"""OLoRA: start from the QR factors of the weight.

    W = Q R (reduced, float32);  B₀ = Q[:, :r] (out, r), A₀ = R[:r, :] (r, in)
    y = x Wᵀ + s·(x(BA − B₀A₀)ᵀ)

B₀ᵀB₀ = I. A₀ and B₀ are the plain blocks for every s, so the default α = r makes s = 1. The signs
of diag(R) depend on the linear algebra library and have no effect on training: compare products,
never factors. PEFT subtracts s·B₀A₀ from the base; here the base is unchanged and the layer keeps
−B₀ and A₀ as frozen factors. GPT-2's transposed weight is factorised as its (out, in) matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair, RecipeLike
from lorica.methods.inits.base import AbstractInit
from lorica.tensors.linalg import qr


@dataclass(frozen=True, kw_only=True)
class Olora(AbstractInit):
    """Orthonormal start from QR of the pre-trained weight, with the frozen start subtracted so that
    the function is kept.

    Both factors get a gradient from the first step on. Not to be confused with O-LoRA (orthogonal
    subspaces for continual learning).

    Cost: a QR per layer at the start, and frozen factors as large as the trained ones.
    When: short runs: the loss falls from the first step.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("olora", r=8).lora_alpha
        8

    Reference:
        @misc{buyukakyuz2024olora,
          title = {OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models},
          author = {Büyükakyüz, Kerim}, year = {2024}, eprint = {2406.01775}
        }
    """

    reads_weight: ClassVar[bool] = True
    peft_frozen_start: ClassVar[str | None] = "olora"
    default_learning_rate: ClassVar[float | None] = 2e-4

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return recipe.scale.alpha_for(1.0, recipe.r)

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        r = pair.A.shape[0]
        q, upper = qr(weight[:, :r])  # the QR of all of W has the same first r columns
        pair.B.copy_(q)
        pair.A.copy_(torch.cat([upper, q.T @ weight[:, r:]], dim=1))
