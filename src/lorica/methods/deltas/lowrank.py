"""ΔW = s·B·A.

    y = x Wᵀ + s·(x Aᵀ) Bᵀ        A (r, in), B (out, r)
    ∂L/∂B = s·G·Aᵀ, ∂L/∂A = s·Bᵀ·G   with G = ∂L/∂W'

The paper draws A from a Gaussian, both public implementations from a uniform distribution: an init
decides that, not this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Pair, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice, zeros
from lorica.tensors.dtensor_ops import draw_, zero_


class LowRankDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.A = zeros(site, site.r, site.in_features)
        self.B = zeros(site, site.out_features, site.r)
        self.scale = site.scale
        self.lookup = site.lookup

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), (self.scale * self.B).to(x.dtype))

    def weight(self, base: BaseLike) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.scale)

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale, self.lookup)

    def restart(self, link: int, generator: torch.Generator) -> None:
        draw_(self.A, generator, bound=self.A.shape[-1] ** -0.5)
        zero_(self.B)


@dataclass(frozen=True, kw_only=True)
class LowRank(DeltaChoice):
    """Two factors: ΔW = s·B·A of rank r.

    `r·(in + out)` parameters per layer; merging is exact. Not to be confused with the choice of the
    start (`inits`) or of s (`scales`).

    Cost: r·(in + out) parameters per layer.
    When: the default.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora").delta.name
        'lowrank'

    Reference:
        @inproceedings{hu2022lora,
          title = {LoRA: Low-Rank Adaptation of Large Language Models},
          author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li,
                    Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
          booktitle = {ICLR}, year = {2022}, eprint = {2106.09685}
        }
    """

    gives: ClassVar[frozenset[str]] = frozenset(
        {"pair", "factors", "weight", "lookup", "sharded", "wrapped"}
    )
    experts: ClassVar[bool] = True

    def build(self, site: Site) -> LowRankDelta:
        return LowRankDelta(site)
