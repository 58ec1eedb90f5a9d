"""MELoRA of Ren et al. (arXiv 2402.17263), one mini after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def cut(size: int, n: int) -> list[slice]:
    """n shares of `size`, the first ones longer by one where n does not divide it."""
    out, at = [], 0
    for i in range(n):
        length = size // n + (1 if i < size % n else 0)
        out.append(slice(at, at + length))
        at += length
    return out


def minis(A: Tensor, B: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """(A_i (r, in_i), B_i (out_i, r)) out of A (r, in), side by side, and B (out, r), stacked."""
    columns, rows = cut(A.shape[1], n), cut(B.shape[0], n)
    return [(A[:, c], B[o]) for c, o in zip(columns, rows, strict=True)]


def forward(x: Tensor, A: Tensor, B: Tensor, n: int, s: float) -> Tensor:
    """(tokens, in) -> (tokens, out): concat_i s·(x_i A_iᵀ) B_iᵀ."""
    parts = []
    for columns, (a, b) in zip(cut(A.shape[1], n), minis(A, B, n), strict=True):
        parts.append(s * (x[:, columns] @ a.T) @ b.T)
    return torch.cat(parts, dim=1)


def delta(A: Tensor, B: Tensor, n: int, s: float) -> Tensor:
    """ΔW = blockdiag_i(s·B_i A_i)."""
    return torch.block_diag(*[s * b @ a for a, b in minis(A, B, n)])


def portable(A: Tensor, B: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The factors of the plain LoRA of rank n·r."""
    parts = minis(A, B, n)
    return torch.block_diag(*[a for a, _ in parts]), torch.block_diag(*[b for _, b in parts])


def gradients(G: Tensor, A: Tensor, B: Tensor, n: int, s: float) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from G = ∂L/∂W', of which a mini sees its own block."""
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    pairs = zip(cut(A.shape[1], n), cut(B.shape[0], n), strict=True)
    for columns, rows in pairs:
        block = G[rows, columns]
        dA[:, columns] = s * B[rows].T @ block
        dB[rows] = s * block @ A[:, columns].T
    return dA, dB
