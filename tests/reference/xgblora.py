"""XGBLoRA for a stack of weights, from its algorithm (arXiv 2410.19694)."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import adamw


class Run:
    """Weights W_l (out, in); for those in `chosen` a (1, in) and b (out, 1), trained by Adam."""

    def __init__(self, weights: dict[str, Tensor], s: float) -> None:
        self.W = {n: w.clone() for n, w in weights.items()}
        self.s = s
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}

    def begin(self, chosen: dict[str, Tensor]) -> None:
        """A booster on these weights, with these draws of a."""
        self.a = {n: a.clone() for n, a in chosen.items()}
        self.b = {n: a.new_zeros(self.W[n].shape[0], 1) for n, a in chosen.items()}
        self.adam: dict[str, dict] = {}

    def effective(self) -> dict[str, Tensor]:
        return {n: w + self.s * self.b[n] @ self.a[n] if n in self.a else w
                for n, w in self.W.items()}  # fmt: skip

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        """Gradients (out, in) with respect to the effective weights."""
        for n in self.a:
            ga, gb = self.s * self.b[n].T @ gradients[n], self.s * gradients[n] @ self.a[n].T
            state = self.adam.setdefault(n, {"a": {}, "b": {}})
            self.a[n] = adamw.step(self.a[n], ga, state["a"], lr=lr)
            self.b[n] = adamw.step(self.b[n], gb, state["b"], lr=lr)

    def fold(self) -> None:
        self.W = self.effective()
        self.a, self.b = {}, {}


def terms(touched: list[list[str]], names: list[str]) -> dict[str, int]:
    """How many boosters had each weight."""
    return {n: sum(n in one for one in touched) for n in names}


def gradients(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the mean square of h − y, h ← h + ½·tanh(h Wᵀ) through all weights, by autograd."""
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    h = x
    for w in leaves.values():
        h = h + 0.5 * torch.tanh(h @ w.T)
    (h - y).square().mean().backward()
    return {n: w.grad for n, w in leaves.items() if w.grad is not None}
