"""Bat (Bat-Col) from Kang and Yin (arXiv 2409.15371), block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(W: Tensor, r: int) -> Tensor:
    """W (out, in) with zeros below and to the right, up to whole r × r blocks."""
    out, features = W.shape
    whole = torch.zeros(-(-out // r) * r, -(-features // r) * r, dtype=W.dtype)
    whole[:out, :features] = W
    return whole


def weight(W: Tensor, D: Tensor) -> Tensor:
    """ΔW (out, in): ΔW_ij = W_ij D_i + D_i; D (⌈out/r⌉, r, r)."""
    r = D.shape[1]
    whole = padded(W, r)
    delta = torch.zeros_like(whole)
    for i in range(whole.shape[0] // r):
        for j in range(whole.shape[1] // r):
            rows, columns = slice(i * r, (i + 1) * r), slice(j * r, (j + 1) * r)
            delta[rows, columns] = whole[rows, columns] @ D[i] + D[i]
    return delta[: W.shape[0], : W.shape[1]]


def gradient(G: Tensor, W: Tensor, r: int) -> Tensor:
    """∂L/∂D from G = ∂L/∂W' (out, in): Σ_j (W_ij + I)ᵀ G_ij."""
    whole, grad = padded(W, r), padded(G, r)
    eye = torch.eye(r, dtype=W.dtype)
    out = torch.zeros(whole.shape[0] // r, r, r, dtype=W.dtype)
    for i in range(whole.shape[0] // r):
        for j in range(whole.shape[1] // r):
            rows, columns = slice(i * r, (i + 1) * r), slice(j * r, (j + 1) * r)
            out[i] += (whole[rows, columns] + eye).T @ grad[rows, columns]
    return out


def unmerged(W: Tensor, D: Tensor) -> Tensor:
    """The published W out of W' = W + ΔW: W_ij = (W'_ij − D_i)(I + D_i)⁻¹; whole blocks only."""
    r = D.shape[1]
    eye, back = torch.eye(r, dtype=W.dtype), torch.zeros_like(W)
    for i in range(W.shape[0] // r):
        for j in range(W.shape[1] // r):
            rows, columns = slice(i * r, (i + 1) * r), slice(j * r, (j + 1) * r)
            back[rows, columns] = (W[rows, columns] - D[i]) @ torch.linalg.inv(eye + D[i])
    return back
