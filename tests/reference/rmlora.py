"""RM-LoRA as the equations say it: one layer, AdamW or plain steps, the sets of ranks given."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def penalty(A: Tensor, B: Tensor, gamma: float) -> Tensor:
    """γ/2·(‖AAᵀ − I‖ + ‖BᵀB − I‖) of one layer, the sum over entries written out."""
    total = A.new_zeros(())
    for rows in (A, B.T):
        square = A.new_zeros(())
        for i in range(len(rows)):
            for j in range(len(rows)):
                square = square + ((rows[i] * rows[j]).sum() - float(i == j)) ** 2
        total = total + square.sqrt()
    return gamma * total / 2


class Run:
    """y = x Wᵀ + s·x Aᵀ Bᵀ; dA lives on the rows and dB on the columns that a step is given."""

    def __init__(
        self, W: Tensor, A: Tensor, B: Tensor, s: float, *, gamma: float, lr: float, adam: bool,
        strict: bool = False, decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.W, self.s, self.gamma, self.strict = W, s, gamma, strict
        self.A, self.B = (p.clone().requires_grad_() for p in (A, B))
        self.rule = (
            torch.optim.AdamW([self.A, self.B], lr=lr, weight_decay=decay, foreach=False)
            if adam
            else torch.optim.SGD([self.A, self.B], lr=lr, weight_decay=decay, foreach=False)
        )

    def step(self, x: Tensor, y: Tensor, rows: Collection[int], columns: Collection[int]) -> None:
        self.rule.zero_grad()
        out = x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T
        ((out - y).square().mean() + penalty(self.A, self.B, self.gamma)).backward()
        before = {}
        with torch.no_grad():
            for p, kept in ((self.A, rows), (self.B.T, columns)):
                whole = self.A if p is self.A else self.B
                assert whole.grad is not None
                grad = whole.grad if p is self.A else whole.grad.T
                for i in set(range(len(p))) - set(kept):
                    grad[i] = 0
            for name, p, kept in (("A", self.A, rows), ("B", self.B, columns)):
                moments = {k: v.clone() for k, v in self.rule.state[p].items() if v.ndim}
                before[name] = (p.detach().clone(), moments, kept)
        self.rule.step()
        with torch.no_grad():
            for name, p in (("A", self.A), ("B", self.B)) if self.strict else ():
                value, moments, kept = before[name]
                for i in set(range(len(self.A))) - set(kept):
                    at = (i,) if name == "A" else (slice(None), i)
                    p[at] = value[at]
                    for k, old in moments.items():
                        self.rule.state[p][k][at] = old[at]
