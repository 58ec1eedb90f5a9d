"""DoRA from Liu et al. (arXiv 2402.09353), row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def norms(V: Tensor) -> Tensor:
    return torch.stack([(row * row).sum().sqrt() for row in V])


def effective(W: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor) -> Tensor:
    """W' (out, in) = m ∘ V / ‖V‖, V = W + s·B·A."""
    V = W + s * B @ A
    c = norms(V)
    return torch.stack([m[o] / c[o] * V[o] for o in range(W.shape[0])])


def gradients(G: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor, *, detach: bool):
    """(∂L/∂V, ∂L/∂A, ∂L/∂B, ∂L/∂m) from G = ∂L/∂W'; with `detach` the norm is a constant."""
    V = W + s * B @ A
    c = norms(V)
    rows, dm = [], []
    for o in range(W.shape[0]):
        along = (G[o] * V[o]).sum()
        inner = G[o] if detach else G[o] - along * V[o] / c[o] ** 2
        rows.append(m[o] / c[o] * inner)
        dm.append(along / c[o])
    dV = torch.stack(rows)
    return dV, s * B.T @ dV, s * dV @ A.T, torch.stack(dm)


def with_dropout(x: Tensor, dropped: Tensor, W, b, A, B, s: float, m: Tensor, *, authors: bool):
    """(tokens, out): the authors' form drops the magnitude's correction as well."""
    g = m / norms(W + s * B @ A)
    update = s * dropped @ A.T @ B.T
    if authors:
        return x @ W.T + b + (g - 1) * (dropped @ W.T) + g * update
    return g * (x @ W.T + update) + b
