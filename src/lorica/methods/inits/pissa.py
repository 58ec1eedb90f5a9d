"""PiSSA: start from the principal singular part of the weight.

    W = U S Vᵀ (float32);  B₀ = U_r √(S_r/s) (out, r), A₀ = √(S_r/s) V_rᵀ (r, in)

so that s·B₀A₀ is the best rank-r approximation for every s. `niter` > 0 replaces the exact SVD by a
seeded randomised one with that many power iterations; its factors are stored with the adapter, so
loading never computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair, RecipeLike
from lorica.methods.fields import whole
from lorica.methods.inits.base import AbstractInit
from lorica.tensors.dtensor_ops import draw
from lorica.tensors.linalg import sketched_svd, svd


@dataclass(frozen=True, kw_only=True)
class Pissa(AbstractInit):
    """Principal singular values and vectors as the start, with the frozen start subtracted so that
    the function is kept.

    Cost: an SVD per layer at the start (`niter=16`: a sketch), and frozen factors as large as the
    trained ones.
    When: short runs, and low ranks.

    Args:
        niter: 0 (default) is the exact SVD; N > 0 the randomised one with N power iterations
            (PEFT's `pissa_niter_N`; 16 is the usual N), faster on wide layers and deterministic
            under the recipe's seed.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("pissa(niter=16)").text()
        'pissa(niter=16)'

    Reference:
        @inproceedings{meng2024pissa,
          title = {PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
          Language Models}, author = {Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan},
          booktitle = {NeurIPS}, year = {2024}, eprint = {2404.02948}
        }
    """

    niter: int = 0

    def __post_init__(self) -> None:
        say = (
            "power iterations, a whole number up to 1,000, e.g. `pissa(niter=16)`; 0: the exact SVD"
        )
        whole(self, "niter", least=0, most=1000, say=say)

    reads_weight: ClassVar[bool] = True
    peft_frozen_start: ClassVar[str | None] = "pissa"
    default_learning_rate: ClassVar[float | None] = 2e-4

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return recipe.scale.alpha_for(1.0, recipe.r)

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        r = pair.A.shape[0]
        if self.niter:  # with 8 spare directions
            probe = draw((weight.shape[1], min(r + 8, *weight.shape)), generator)
            u, s, vh = sketched_svd(weight, probe, self.niter)
        else:
            u, s, vh = svd(weight)
        root = (s[:r] / pair.scale).sqrt()
        pair.B.copy_(u[:, :r] * root)
        pair.A.copy_(root[:, None] * vh[:r])
