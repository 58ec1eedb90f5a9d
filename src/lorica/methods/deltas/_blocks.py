"""Helpers of the deltas whose blocks share one matrix: sums over blocks, tiles and shards without
a Python loop, and PEFT's one type for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice, PeftForm, zeros
from lorica.tensors.dtensor_ops import read_full, read_wide, zero_
from lorica.tensors.matmul import no_autocast

PEFT_TYPE = "MISS"


def peft_form(init_weights: bool | str, mini_r: int = 1) -> PeftForm:
    """PEFT's type in one of its three modes."""
    return PeftForm(
        peft_type=PEFT_TYPE,
        tensors={"D": "miss_block"},
        dropout="miss_dropout",
        bias="MiSS_only",
        fields={"init_weights": init_weights, "mini_r": mini_r},
    )


def mode_of(data: Mapping[str, object]) -> object:
    """`init_weights` of a configuration of PEFT's type; None for another type. False, a random
    start, has the formula of True."""
    if data.get("peft_type") != PEFT_TYPE:
        return None
    mode = data.get("init_weights")
    return True if mode in (None, False) else mode


def block_sum(x: Tensor, r: int) -> Tensor:
    """(..., in) -> (..., r): the sum of all blocks of r consecutive entries, the last one padded
    with zeros. Stays in x's dtype under autocast, which would make a float32 copy first."""
    count = x.shape[-1] // r
    with no_autocast(x.device.type):
        h = torch.unflatten(x[..., : count * r], -1, (count, r)).sum(-2)
        left = x.shape[-1] - count * r
        return h + F.pad(x[..., count * r :], (0, r - left)) if left else h


def tile(t: Tensor, length: int, dim: int = -1) -> Tensor:
    """`t` repeated along `dim` and cut to `length`."""
    copies = [1] * t.ndim
    copies[dim] = -(-length // t.shape[dim])
    return t.repeat(copies).narrow(dim, 0, length)


def spread(h: Tensor, length: int) -> Tensor:
    """(..., r) -> (..., length): each entry over a shard of consecutive places. Shards are as equal
    as can be, the longer ones first."""
    size, longer = divmod(length, h.shape[-1])
    parts = ((h[..., :longer], size + 1), (h[..., longer:], size))
    wide = [p[..., None].expand(*p.shape, n).flatten(-2) for p, n in parts if n and p.shape[-1]]
    return wide[0] if len(wide) == 1 else torch.cat(wide, -1)


class BlockSum(AbstractDelta):
    """y[o] = Σ_b h[b]·D[b, o mod q] with h the sum of x's blocks: ΔW[o, i] = D[i mod r, o mod q]
    for D (r, q)."""

    roles: ClassVar[dict[str, str]] = {"D": "core"}

    def __init__(self, site: Site, q: int) -> None:
        super().__init__()
        self.D = zeros(site, site.r, q)
        self.site = site

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        r = self.site.r
        if self.site.lookup:  # a one-hot's block sum is one-hot again
            return tile(F.embedding(x % r, self.D), self.site.out_features)
        return tile(block_sum(x, r) @ self.D.to(x.dtype), self.site.out_features)

    def weight(self, base: BaseLike) -> Tensor:
        D = read_wide(self.D)
        return tile(tile(D.T, self.site.out_features, 0), self.site.in_features)

    def factors(self) -> Factors:
        D, out, features = read_full(self.D), self.site.out_features, self.site.in_features
        r, q = D.shape
        eye = torch.eye(min(r, q), dtype=D.dtype, device=D.device)
        if q < r:
            return Factors(tile(D.T, features), tile(eye, out, 0))  # (q, in), (out, q)
        return Factors(tile(eye, features), tile(D.T, out, 0))  # (r, in), (out, r)

    def restart(self, link: int, generator: torch.Generator) -> None:
        zero_(self.D)


@dataclass(frozen=True, kw_only=True)
class Blocks(DeltaChoice):
    """What these deltas have in common: no scale before ΔW, and the authors' rate on 7B."""

    takes: ClassVar[frozenset[str]] = frozenset({"r", "lora_dropout", "rank_pattern"})
    preset: ClassVar[Mapping[str, str]] = {"scales": "constant"}
    requires: ClassVar[frozenset[str]] = frozenset({"scales"})
    default_learning_rate: ClassVar[float | None] = 2e-5
