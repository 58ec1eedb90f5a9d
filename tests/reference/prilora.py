"""PRILoRA as the equations say it, entry by entry: ranks along the blocks, input norms, pruning."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def line(first: float, last: float, blocks: int) -> list[float]:
    """r_i, not yet rounded."""
    return [first + (last - first) * i / (blocks - 1) for i in range(blocks)]


def norms(batch: list[list[float]], keep: list[bool]) -> list[float]:
    """‖X_:j‖ over the rows that are kept."""
    rows = [row for row, kept in zip(batch, keep, strict=True) if kept]
    return [math.sqrt(sum(row[j] ** 2 for row in rows)) for j in range(len(rows[0]))]


def prune(A: Tensor, X: Tensor, fraction: float) -> Tensor:
    """A (r, in) with the smallest |A_ij|·X_j of each row at 0."""
    out = A.clone()
    for i in range(A.shape[0]):
        score = [abs(A[i, j].item()) * X[j].item() for j in range(A.shape[1])]
        order = sorted(range(A.shape[1]), key=lambda j, score=score: score[j])
        for j in order[: round(fraction * A.shape[1])]:
            out[i, j] = 0
    return out


class Run:
    """y = x Wᵀ + s·x Aᵀ Bᵀ with AdamW; A is pruned after every `every` steps and after the last."""

    def __init__(
        self, W: Tensor, A: Tensor, B: Tensor, s: float, *, lr: float, every: int, fraction: float,
        beta: float, last: int,
    ) -> None:  # fmt: skip
        self.W, self.s, self.every, self.fraction = W, s, every, fraction
        self.beta, self.last, self.t = beta, last, 0
        self.A, self.B = (p.clone().requires_grad_() for p in (A, B))
        self.adam = torch.optim.AdamW([self.A, self.B], lr=lr, weight_decay=0.1, foreach=False)
        self.X = torch.zeros(A.shape[1], dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T

    def step(self, x: Tensor, y: Tensor) -> None:
        self.X = self.beta * self.X + (1 - self.beta) * torch.tensor(
            norms(x.tolist(), [True] * len(x)), dtype=torch.float64
        )
        self.adam.zero_grad()
        (self(x) - y).square().mean().backward()
        self.adam.step()
        self.t += 1
        if self.t % self.every == 0 or self.t == self.last:
            with torch.no_grad():
                self.A.copy_(prune(self.A, self.X, self.fraction))
