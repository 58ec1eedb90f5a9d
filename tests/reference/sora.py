"""SoRA as the equations say it: one gated layer, AdamW for the factors, another for the gates."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(x: float, xi: float) -> float:
    """T_ξ of one number."""
    if x > xi:
        return x - xi
    return x + xi if x < -xi else 0.0


def authors_threshold(x: float, xi: float) -> float:
    """Three masks in a row, as in the code."""
    if x > xi:
        x = x - xi
    if x < -xi:
        x = x + xi
    return 0.0 if abs(x) < xi else x


class Run:
    """y = x Wᵀ + s·((x Aᵀ) ∘ g) Bᵀ for W (out, in), A (r, in), B (out, r), g (r,)."""

    def __init__(
        self, W: Tensor, A: Tensor, B: Tensor, g: Tensor, s: float, lr: float, threshold: float,
        decay: float = 0.0, *, scaled: bool = True, authors: bool = False,
    ) -> None:  # fmt: skip
        self.W, self.s, self.lr, self.threshold = W, s, lr, threshold
        self.A, self.B, self.g = (p.clone().requires_grad_() for p in (A, B, g))
        self.factors = torch.optim.AdamW([self.A, self.B], lr=lr, weight_decay=decay, foreach=False)
        self.gates = torch.optim.AdamW([self.g], lr=lr, weight_decay=0, foreach=False)
        self.scaled, self.rule = scaled, authors_threshold if authors else soft_threshold

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.s * ((x @ self.A.T) * self.g) @ self.B.T

    def step(self, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
        """One update at `factor` times the rate: factors, gates, then the threshold."""
        for adam in (self.factors, self.gates):
            adam.zero_grad()
            adam.param_groups[0]["lr"] = self.lr * factor
        (self(x) - y).square().mean().backward()
        self.factors.step()
        self.gates.step()
        xi = self.threshold * (self.lr * factor if self.scaled else 1.0)
        with torch.no_grad():
            for i, value in enumerate(self.g.tolist()):
                self.g[i] = self.rule(value, xi)
