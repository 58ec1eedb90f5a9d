"""MoRA: one square matrix in place of two thin ones, of the same number of parameters.

    ΔW = D·M·C,   M (r̂, r̂), zeros;   r̂ = √((in + out)·r) to the nearest (type 6: even below that)

    type  compression C           decompression D        rank of ΔW
    1     z_p = Σ x̃_j, j ≡ p      y_i = u_{i mod r̂}      r̂     x̃: x, and then its beginning, up to
    2     sums of neighbours      neighbours share       r̂     a multiple of r̂; j ≡ p (mod r̂)
    3     sums of neighbours      y_i = u_{i mod r̂}      r̂
    4     z_p = Σ x̃_j, j ≡ p      neighbours share       r̂
    6     u^(b) = M·R_b·x^(b) for the n blocks of r̂ of x̃; y = [u^(0) .. u^(n−1)] over and over,
          cut to out: ΔW has the blocks M·R_b in its diagonal, rank up to min(in, out)

R_b turns the pair (q, q + r̂/2) by b·θ_q, θ_q = 10000^(−2q/r̂). The paper rounds r̂ down, the
authors' code to the nearest, and so does this file: r̂² may be a little above r·(in + out).

ReMoRA is this under a schedule that restarts: M goes into W, M = 0, the next pattern. The authors
go through types 1, 2 or 1, 2, 3, 4 and keep the type in memory alone, so that their resumed or
merged run computes with another one; here it is saved. Type 6 fails in their cycle. Here its next
pattern is the next block first, y = [u^(k) .. u^(n−1) u^(0) .. u^(k−1)] after k restarts, so the
blocks of ΔW wander over the matrix. All links together stay in a span of 4·r̂² dimensions (types)
or n·r̂² (type 6). Where out < in, type 6 sees the first ⌈out/r̂⌉ blocks of the input only, and
others after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import Site
from lorica.methods.deltas._blocks import spread
from lorica.methods.deltas.base import DeltaChoice
from lorica.methods.deltas.mora.rotated import RotatedDelta
from lorica.methods.deltas.mora.square import Square, cycled, grouped_sum, strided_sum
from lorica.tensors.dtensor_ops import read_full

_Map = Callable[[Tensor, int], Tensor]
SHARED: dict[int, tuple[_Map, _Map]] = {
    1: (strided_sum, cycled),
    2: (grouped_sum, spread),
    3: (grouped_sum, cycled),
    4: (strided_sum, spread),
}
ROTATED = 6


class SharedDelta(Square):
    """Types 1 to 4, the type being the pattern."""

    def _product(self, x: Tensor, M: Tensor) -> Tensor:
        compress, decompress = SHARED[self.number()]
        z = compress(x, self.width)
        return decompress(F.linear(z, M.to(z.dtype)), self.site.out_features)

    def forward(self, x: Tensor, base) -> Tensor:
        return self._product(x, self.M)

    def weight(self, base) -> Tensor:
        wide = torch.promote_types(self.M.dtype, torch.float32)
        eye = torch.eye(self.site.in_features, dtype=wide, device=self.M.device)
        return self._product(eye, read_full(self.M)).T


@dataclass(frozen=True, kw_only=True)
class Mora(DeltaChoice):
    """One square matrix: an update of much higher rank at LoRA's number of parameters.

    `r` is LoRA's rank of the same size; r̂ = √((in + out)·r). Merging is exact. M has no second
    factor and no scale: starts, rates by factor and `lora_alpha` mean nothing here. It takes in
    about r̂²/(in·out) of any wanted change, so it wins where the change has a flat spectrum, and
    loses by far to LoRA where few directions matter. `mora(type=1)+relora` is the authors' ReMoRA.

    Cost: LoRA's parameters; turning and summing blocks costs some 10 % of a step.
    When: much is to be memorised: new facts, continued pre-training.

    Args:
        type: 6 (default, as in the authors' runs at r = 8) turns each block of inputs; 1 to 4 share
            rows and columns and are for a large r (the authors': 1 at r = 128 and 256).
        patterns: how many types restarts go through: 4 (default: 1, 2, 3, 4, 1, ...) or 2 (1, 2, 1,
            ...), from `type` on. Type 6 has shifts instead, and takes no other value.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("mora(type=1, patterns=2)+relora").r
        8

    Reference:
        @misc{jiang2024mora,
          title = {MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning},
          author = {Jiang, Ting and Huang, Shaohan and Luo, Shengyue and Zhang, Zihan and Huang,
                    Haizhen and Wei, Furu and Deng, Weiwei and Sun, Feng and Zhang, Qi and Wang,
                    Deqing and Zhuang, Fuzhen}, year = {2024}, eprint = {2405.12130}
        }
    """

    type: int = ROTATED
    patterns: int = 4

    gives: ClassVar[frozenset[str]] = frozenset({"weight", "sharded", "wrapped"})
    takes: ClassVar[frozenset[str]] = frozenset({"r", "lora_dropout", "rank_pattern"})
    preset: ClassVar[Mapping[str, str]] = {"scales": "constant"}
    requires: ClassVar[frozenset[str]] = frozenset({"scales"})
    default_r: ClassVar[int | None] = 8

    def __post_init__(self) -> None:
        if self.type not in (*SHARED, ROTATED) or isinstance(self.type, bool):
            raise ValueError(f"`mora(type={self.type!r})`; allowed: 1, 2, 3, 4, 6")
        allowed = (4,) if self.type == ROTATED or self.type > 2 else (2, 4)
        if self.patterns not in allowed:
            raise ValueError(
                f"`mora(type={self.type}, patterns={self.patterns!r})`; allowed with this type:"
                f" {', '.join(map(str, allowed))}. Types 1 and 2 are the cycle of 2; leave"
                " `patterns` out otherwise"
            )

    def build(self, site: Site) -> Square:
        width = math.floor(math.sqrt((site.in_features + site.out_features) * site.r) + 0.5)
        if self.type == ROTATED:
            return RotatedDelta(site, max(width // 2 * 2, 2))
        cycle = (*range(self.type, self.patterns + 1), *range(1, self.type))
        return SharedDelta(site, width, cycle)
