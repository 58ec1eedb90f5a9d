"""ΔW with a gate for every rank.

    y = x Wᵀ + s·((x Aᵀ) ∘ gᵀ) Bᵀ        A (r, in), B (out, r), g (r, 1);   ΔW = s·B diag(g) A

A gate at exactly 0 takes its rank out; weight decay spares gates. By itself this file drives none
there.

Inits fill A and B and leave the gates at 1. The authors' start (`init.gated`) draws g ~ N(0, 1)
beside LoRA's usual factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import Factors, Pair, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice
from lorica.methods.inits.base import AbstractInit
from lorica.methods.inits.kaiming import Kaiming
from lorica.tensors.dtensor_ops import copy_, draw_, zero_


class GatedDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "gate": "diagonal"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        like: dict[str, Any] = {"dtype": site.dtype, "device": site.device}
        self.A = nn.Parameter(torch.zeros(site.r, site.in_features, **like))
        self.B = nn.Parameter(torch.zeros(site.out_features, site.r, **like))
        self.gate = nn.Parameter(torch.ones(site.r, 1, **like))
        self.scale = site.scale
        self.lookup = site.lookup

    def forward(self, x: Tensor, base) -> Tensor:
        B = self.scale * self.factors().B  # (out, r)
        return F.linear(F.linear(x, self.A.to(x.dtype)), B.to(x.dtype))

    def weight(self, base) -> Tensor:
        return self.factors().weight()

    def factors(self) -> Factors:
        return Factors(self.A, self.B * self.gate.T, self.scale)

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale, self.lookup, self.gate)

    def restart(self, link: int, generator: torch.Generator) -> None:
        """All gates open: what is learnt next may need other ranks."""
        draw_(self.A, generator, bound=self.A.shape[1] ** -0.5)
        zero_(self.B)
        copy_(self.gate, torch.ones_like(self.gate))


@dataclass(frozen=True, kw_only=True)
class GatedInit(AbstractInit):
    """LoRA's usual uniform A and zero B, with gates from N(0, 1) where there are any.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("gated").init.name
        'gated'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Any, generator: torch.Generator) -> None:
        Kaiming().fill(weight, pair, generator)
        if pair.E is not None:
            draw_(pair.E, generator)


@dataclass(frozen=True, kw_only=True)
class Gated(DeltaChoice):
    """Two factors with a trained gate between them for every rank, so that ranks can be shut.

    Cost: LoRA's, and r numbers a layer.
    When: as the part of a method that shuts ranks (`sora`), or to read off which ranks
    matter.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("gated+olora").init.name
        'olora'

    Reference:
        @inproceedings{ding2023sparse,
          title = {Sparse Low-rank Adaptation of Pre-trained Language Models},
          author = {Ding, Ning and Lv, Xingtai and Wang, Qiaosen and Chen, Yulin and Zhou, Bowen and
                    Liu, Zhiyuan and Sun, Maosong}, booktitle = {EMNLP}, year = {2023},
          eprint = {2311.11696}
        }
    """

    preset: ClassVar[Mapping[str, str]] = {"inits": "init.gated"}
    gives: ClassVar[frozenset[str]] = frozenset(
        {"pair", "factors", "weight", "lookup", "sharded", "wrapped", "diagonal"}
    )

    def build(self, site: Site) -> GatedDelta:
        return GatedDelta(site)
