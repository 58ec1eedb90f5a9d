"""OLoRA from Büyükakyüz (arXiv 2406.01775), with Gram and Schmidt instead of a library's QR."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_schmidt(W: Tensor, r: int) -> Tensor:
    """The first r orthonormal columns Q (out, r) of W = Q R, by subtraction, twice for accuracy."""
    columns: list[Tensor] = []
    for i in range(r):
        v = W[:, i].clone()
        for _ in range(2):
            for q in columns:
                v = v - (q @ v) * q
        columns.append(v / v.norm())
    return torch.stack(columns, dim=1)


def product(W: Tensor, r: int) -> Tensor:
    """B₀A₀ = QQᵀW (out, in): independent of the signs that a QR may choose."""
    Q = gram_schmidt(W, r)
    return Q @ (Q.T @ W)


def residual(W: Tensor, r: int, s: float) -> Tensor:
    return W - s * product(W, r)
