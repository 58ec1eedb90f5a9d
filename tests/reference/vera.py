"""VeRA from the equations of Kopiczko et al. (arXiv 2310.11454), one layer after the other.

ΔW = diag(λ_b) B diag(λ_d) A, with one A (r, largest in) and one B (largest out, r) for the model
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair(shapes: list[tuple[int, int]], r: int, key: int = 0) -> tuple[Tensor, Tensor]:
    """A and B for layers of these (out, in), from torch's own Kaiming initialisation."""
    generator = torch.Generator().manual_seed(key)
    A = torch.empty(r, max(n for _, n in shapes), dtype=torch.float32)
    B = torch.empty(max(m for m, _ in shapes), r, dtype=torch.float32)
    for t in (A, B):
        torch.nn.init.kaiming_uniform_(t, nonlinearity="relu", generator=generator)
    return A.double(), B.double()


def weight(A: Tensor, B: Tensor, b: Tensor, d: Tensor, features: int) -> Tensor:
    """ΔW (out, in), rank by rank; b is λ_b (out,) and d is λ_d (r,)."""
    delta = torch.zeros(len(b), features, dtype=b.dtype)
    for k in range(len(d)):
        delta = delta + d[k] * torch.outer(B[: len(b), k], A[k, :features])
    return b[:, None] * delta


def gradients(G: Tensor, A: Tensor, B: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(∂L/∂λ_b, ∂L/∂λ_d) from G = ∂L/∂W' (out, in), entry by entry."""
    (out, features), r = G.shape, len(d)
    of_b, of_d = torch.zeros_like(b), torch.zeros_like(d)
    for o in range(out):
        for k in range(r):
            along = G[o] @ A[k, :features]
            of_b[o] += B[o, k] * d[k] * along
            of_d[k] += b[o] * B[o, k] * along
    return of_b, of_d


class AdamW:
    """AdamW without decay over a list of vectors."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.m: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    def step(self, vectors: list[Tensor], gradients: list[Tensor]) -> None:
        self.t += 1
        for i, (p, g) in enumerate(zip(vectors, gradients, strict=True)):
            m = self.m[i] = 0.9 * self.m.get(i, torch.zeros_like(g)) + 0.1 * g
            v = self.v[i] = 0.999 * self.v.get(i, torch.zeros_like(g)) + 0.001 * g * g
            size = (v / (1 - 0.999**self.t)).sqrt() + 1e-8
            p -= self.lr * m / (1 - 0.9**self.t) / size
