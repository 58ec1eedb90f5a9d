"""ΔW with a gate for every rank.

    y = x Wᵀ + s·((x Aᵀ) ∘ gᵀ) Bᵀ        A (r, in), B (out, r), g (r, 1);   ΔW = s·B diag(g) A

A gate at exactly 0 removes its rank; weight decay spares gates. This delta alone drives no gate to
0: a schedule does.

Inits fill A and B and leave the gates at 1. The authors' start (`init.gated`) draws g ~ N(0, 1)
and starts A and B as LoRA does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import Pair, Site
from lorica.methods.deltas._diagonal import DiagonalDelta
from lorica.methods.deltas.base import DeltaChoice, ones
from lorica.methods.inits.base import AbstractInit
from lorica.methods.inits.kaiming import Kaiming
from lorica.tensors.dtensor_ops import copy_, draw_


class GatedDelta(DiagonalDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B", "gate": "diagonal"}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.gate = ones(site, site.r, 1)

    def diagonal(self) -> Tensor:
        return self.gate

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale, self.lookup, self.gate)

    def open_(self) -> None:
        """Open all gates: what is learnt after a restart may need other ranks."""
        copy_(self.gate, torch.ones_like(self.gate))


@dataclass(frozen=True, kw_only=True)
class GatedInit(AbstractInit):
    """LoRA's uniform A and zero B, with gates drawn from N(0, 1) where the delta has gates.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("gated").init.name
        'gated'
    """

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        Kaiming().fill(weight, pair, generator)
        if pair.E is not None:
            draw_(pair.E, generator)


@dataclass(frozen=True, kw_only=True)
class Gated(DeltaChoice):
    """Two factors with a trained gate for every rank between them, so that ranks can be shut.

    Cost: LoRA's, and r parameters per layer.
    When: as part of a method that shuts ranks (`sora`), or to see which ranks matter.

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
