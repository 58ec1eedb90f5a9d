"""RAC-LoRA for one weight, from its equations (arXiv 2410.08305)."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import adamw


def projector(sketch: Tensor) -> Tensor:
    """H (n, n) of a sketch (n, r): S (SᵀS)† Sᵀ."""
    return sketch @ torch.linalg.pinv(sketch.T @ sketch) @ sketch.T


def ideal_step(
    W: Tensor, G: Tensor, lr: float, *, A: Tensor | None = None, B: Tensor | None = None
):
    """The subproblem solved by its quadratic upper model: W − γ·G·H_A or W − γ·H_B·G."""
    if A is not None:
        return W - lr * G @ projector(A.T)
    assert B is not None
    return W - lr * projector(B) @ G


def bound(first: float, lr: float, mu: float, r: int, n: int, steps: int) -> float:
    """E[f(W_T) − f*] under the PL inequality: (1 − γ·μ·r/n)^T (f(W_0) − f*)."""
    return first * (1 - lr * mu * r / n) ** steps


class Run:
    """`frozen` is A (r, in) and B trains, or it is B (out, r) and A trains; Adam, s the scale."""

    def __init__(self, W: Tensor, frozen: Tensor, s: float, side: str) -> None:
        self.W, self.s, self.side = W.clone(), s, side
        self._begin(frozen)

    def product(self) -> Tensor:
        one, other = self.trained, self.frozen
        return self.s * (one @ other if self.side == "B" else other @ one)

    def effective(self) -> Tensor:
        return self.W + self.product()

    def step(self, G: Tensor, lr: float) -> None:
        """G (out, in): the gradient with respect to the effective weight."""
        g = self.s * (G @ self.frozen.T if self.side == "B" else self.frozen.T @ G)
        self.trained = adamw.step(self.trained, g, self.adam, lr=lr)

    def restart(self, frozen: Tensor) -> None:
        self.W = self.effective()
        self._begin(frozen)

    def _begin(self, frozen: Tensor) -> None:
        out, features = self.W.shape
        shape = (out, len(frozen)) if self.side == "B" else (frozen.shape[1], features)
        self.frozen, self.trained = frozen.clone(), self.W.new_zeros(shape)
        self.adam: dict = {}
