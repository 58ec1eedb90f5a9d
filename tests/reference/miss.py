"""MiSS from Kang and Yin (arXiv 2409.15371), shard by shard; and the form that PEFT calls mini."""

from __future__ import annotations

import torch
from torch import Tensor


def shards(out: int, r: int) -> list[range]:
    """r runs of consecutive outputs, of sizes that differ by one at most, the longer ones first."""
    bounds, start = [], 0
    for i in range(r):
        size = out // r + (1 if i < out % r else 0)
        bounds.append(range(start, start + size))
        start += size
    return bounds


def weight(D: Tensor, out: int) -> Tensor:
    """ΔW (out, in): every row of shard i is D_i; D (r, in)."""
    delta = torch.zeros(out, D.shape[1], dtype=D.dtype)
    for i, shard in enumerate(shards(out, D.shape[0])):
        for o in shard:
            delta[o] = D[i]
    return delta


def gradient(G: Tensor, r: int) -> Tensor:
    """∂L/∂D (r, in) from G = ∂L/∂W' (out, in)."""
    return torch.stack([sum(G[o] for o in shard) for shard in shards(G.shape[0], r)])


def mini_weight(D: Tensor, features: int, out: int) -> Tensor:
    """ΔW (out, in) of D (r, q), entry by entry."""
    r, q = D.shape
    delta = torch.zeros(out, features, dtype=D.dtype)
    for o in range(out):
        for i in range(features):
            delta[o, i] = D[i % r, o % q]
    return delta
