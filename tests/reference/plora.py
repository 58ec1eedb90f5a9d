"""PeriodicLoRA for one weight (arXiv 2402.16141), with the momentum that keeps the function."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import adamw


class Run:
    """W (out, in), A (r, in) and B (out, r) trained by Adam, s the scale, m the momentum."""

    def __init__(self, W: Tensor, A: Tensor, s: float, m: float) -> None:
        self.W, self.A, self.s, self.m = W.clone(), A.clone(), s, m
        self.B = W.new_zeros(W.shape[0], A.shape[0])
        self.adam: dict[str, dict] = {"A": {}, "B": {}}

    def effective(self) -> Tensor:
        return self.W + self.s * self.B @ self.A

    def step(self, G: Tensor, lr: float) -> None:
        """G (out, in): the gradient with respect to the effective weight."""
        gA, gB = self.s * self.B.T @ G, self.s * G @ self.A.T
        self.A = adamw.step(self.A, gA, self.adam["A"], lr=lr)
        self.B = adamw.step(self.B, gB, self.adam["B"], lr=lr)

    def unload(self, A: Tensor) -> None:
        """W takes (1 − m) of the product and the adapter keeps m of it; without momentum a fresh
        A begins."""
        P = self.s * self.B @ self.A
        self.W = self.W + (1 - self.m) * P
        if self.m:
            self.B = self.m * self.B
        else:
            self.A, self.B = A.clone(), torch.zeros_like(self.B)
        self.adam = {"A": {}, "B": {}}


def descent_unloaded_each_step(W: Tensor, A: Tensor, G: Tensor, s: float, lr: float) -> Tensor:
    """One stage of one gradient step from B = 0: B = −η·s·G·Aᵀ, and W ← W + s·B·A."""
    return W - lr * s * s * G @ A.T @ A
