"""MoRA: one square matrix instead of two thin ones, with the same number of parameters.

    ΔW = D·M·C,   M (r̂, r̂), zeros;   r̂ = √((in + out)·r) to the nearest (type 6: even below that)

    type  compression C           decompression D        rank of ΔW
    1     z_p = Σ x̃_j, j ≡ p      y_i = u_{i mod r̂}      r̂     x̃: x, and then its beginning, up to
    2     sums of neighbours      neighbours share       r̂     a multiple of r̂; j ≡ p (mod r̂)
    3     sums of neighbours      y_i = u_{i mod r̂}      r̂
    4     z_p = Σ x̃_j, j ≡ p      neighbours share       r̂
    6     u^(b) = M·R_b·x^(b) for the n blocks of r̂ of x̃; y = [u^(0) .. u^(n−1)] repeated and cut
          to out: ΔW has the blocks M·R_b on its diagonal, rank up to min(in, out)

R_b rotates the pair (q, q + r̂/2) by b·θ_q, θ_q = 10000^(−2q/r̂). The paper rounds r̂ down; the
authors' code and this file round to the nearest, so r̂² may be slightly above r·(in + out).

ReMoRA is this with a schedule that restarts: M is merged into W, M = 0, and the next pattern
begins. The authors cycle through types 1, 2 or 1, 2, 3, 4 and keep the type in memory only, so that
their resumed or merged run computes with another type; here it is saved. Type 6 fails in their
cycle. Here its next pattern puts the next block first, y = [u^(k) .. u^(n−1) u^(0) .. u^(k−1)]
after k restarts, so the blocks of ΔW move over the matrix. The updates of all restarts together
span at most 4·r̂² dimensions (types 1 to 4) or n·r̂² (type 6). Where out < in, type 6 reads only the
first ⌈out/r̂⌉ blocks of the input, and others after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Site
from lorica.methods.deltas._blocks import spread
from lorica.methods.deltas.base import DeltaChoice
from lorica.methods.deltas.mora.rotated import RotatedDelta
from lorica.methods.deltas.mora.square import Square, cycled, grouped_sum, strided_sum
from lorica.methods.fields import one_of, refused
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
    """Types 1 to 4; the pattern is the type."""

    def _product(self, x: Tensor, M: Tensor) -> Tensor:
        compress, decompress = SHARED[self.number()]
        z = compress(x, self.width)
        return decompress(F.linear(z, M.to(z.dtype)), self.site.out_features)

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        return self._product(x, self.M)

    def weight(self, base: BaseLike) -> Tensor:
        wide = torch.promote_types(self.M.dtype, torch.float32)
        eye = torch.eye(self.site.in_features, dtype=wide, device=self.M.device)
        return self._product(eye, read_full(self.M)).T


@dataclass(frozen=True, kw_only=True)
class Mora(DeltaChoice):
    """One square matrix: an update of much higher rank with LoRA's number of parameters.

    `r` is the rank of the LoRA with as many parameters; r̂ = √((in + out)·r). Merging is exact. M is
    one matrix without a scale, so starts, rates per factor and `lora_alpha` have no effect here. It
    represents about r̂²/(in·out) of any wanted change, so it wins where the change has a flat
    spectrum, and loses by far to LoRA where few directions matter. `mora(type=1)+relora` is the
    authors' ReMoRA.

    Cost: LoRA's parameters; rotating and summing blocks costs about 10 % of a step.
    When: much has to be memorised: new facts, continued pre-training.

    Args:
        type: 6 (default, as in the authors' runs at r = 8) rotates each block of inputs; 1 to 4
            share rows and columns and are for a large r (the authors': 1 at r = 128 and 256).
        patterns: how many types restarts cycle through, starting at `type`: 4 (default: 1, 2, 3, 4,
            1, ...) or 2 (1, 2, 1, ...; for types 1 and 2). Type 6 shifts blocks instead.

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
        one_of(self, "type", *SHARED, ROTATED)
        one_of(self, "patterns", 2, 4)
        if self.type > 2 and self.patterns != 4:
            say = "allowed: 4, the default; 2 is the cycle of types 1 and 2"
            raise refused(self, "patterns", f"with `type={self.type}` {say}")

    def build(self, site: Site) -> Square:
        width = math.floor(math.sqrt((site.in_features + site.out_features) * site.r) + 0.5)
        if self.type == ROTATED:
            return RotatedDelta(site, max(width // 2 * 2, 2))
        cycle = (*range(self.type, self.patterns + 1), *range(1, self.type))
        return SharedDelta(site, width, cycle)
