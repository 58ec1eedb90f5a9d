"""LoRA from the equations of Hu et al. (arXiv 2106.09685), element by element where that is clear.

y = x W₀ᵀ + s·(x Aᵀ) Bᵀ + b;  W' = W₀ + s·B·A;  ∂L/∂B = s·G·Aᵀ;  ∂L/∂A = s·Bᵀ·G
"""

from __future__ import annotations

import torch
from torch import Tensor


def merged(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W' (out, in)."""
    out = W.clone()
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            for k in range(A.shape[0]):
                out[o, i] += s * B[o, k] * A[k, i]
    return out


def forward(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """(tokens, in) -> (tokens, out)."""
    rows = []
    for row in x:
        y = torch.stack([(W[o] * row).sum() for o in range(W.shape[0])])
        hidden = torch.stack([(A[k] * row).sum() for k in range(A.shape[0])])
        y = y + s * torch.stack([(B[o] * hidden).sum() for o in range(W.shape[0])])
        rows.append(y if b is None else y + b)
    return torch.stack(rows)


def gradients(G: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from G = ∂L/∂W'."""
    return s * B.T @ G, s * G @ A.T


def similarity(A: Tensor, C: Tensor, i: int, j: int) -> float:
    """φ(i, j) = ‖U_iᵀ V_j‖² / min(i, j) of the top right singular directions of two A's."""
    U, V = torch.linalg.svd(A).Vh[:i].T, torch.linalg.svd(C).Vh[:j].T
    return float((U.T @ V).square().sum() / min(i, j))
