"""Bone (MiSS_e) from Kang and Yin (arXiv 2409.15371), block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, D: Tensor) -> Tensor:
    """(tokens, out): Σ_j x^(j) D, the last block padded with zeros; D (r, out)."""
    r, features = D.shape[0], x.shape[1]
    total = torch.zeros(x.shape[0], r, dtype=x.dtype)
    for start in range(0, features, r):
        block = x[:, start : start + r]
        total[:, : block.shape[1]] += block
    return total @ D


def weight(D: Tensor, features: int) -> Tensor:
    """ΔW (out, in), entry by entry."""
    r, out = D.shape
    delta = torch.zeros(out, features, dtype=D.dtype)
    for o in range(out):
        for i in range(features):
            delta[o, i] = D[i % r, o]
    return delta


def fixed(r: int, features: int) -> Tensor:
    """[I I … I] (r, in), cut."""
    A = torch.zeros(r, features, dtype=torch.float64)
    for i in range(features):
        A[i % r, i] = 1
    return A


def gradient(G: Tensor, r: int) -> Tensor:
    """∂L/∂D (r, out) from G = ∂L/∂W' (out, in)."""
    return fixed(r, G.shape[1]) @ G.T
