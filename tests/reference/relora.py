"""ReLoRA for one weight, from its equations (arXiv 2307.05695 and the authors' scheduler)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference import adamw


def jagged(c: int, T: int, w1: int, R: int, wr: int, mu: float) -> float:
    """The factor at scheduler count c: warm-up, then a cosine that drops to 0 every R counts."""
    cosine = [
        mu + (1 - mu) * 0.5 * (1 + math.cos(math.pi * (z - w1) / (T - w1))) for z in range(T + R)
    ]
    if c < w1:
        return c / w1
    since, rounds = c % R, c // R
    if rounds >= 1 and since < wr:
        return cosine[rounds * R + wr] * since / wr
    return cosine[c]


class Run:
    """W (out, in) frozen, A (r, in) and B (out, r) trained by Adam, s the scale."""

    def __init__(self, W: Tensor, A: Tensor, s: float) -> None:
        self.W, self.A, self.s = W.clone(), A.clone(), s
        self.B = W.new_zeros(W.shape[0], A.shape[0])
        self.adam: dict[str, dict] = {"A": {}, "B": {}}

    def effective(self) -> Tensor:
        return self.W + self.s * self.B @ self.A

    def step(self, G: Tensor, lr: float) -> None:
        """G (out, in): the gradient with respect to the effective weight."""
        gA, gB = self.s * self.B.T @ G, self.s * G @ self.A.T
        self.A = adamw.step(self.A, gA, self.adam["A"], lr=lr)
        self.B = adamw.step(self.B, gB, self.adam["B"], lr=lr)

    def restart(self, A: Tensor) -> None:
        """Merge, take the fresh A."""
        self.W = self.effective()
        self.A, self.B = A.clone(), torch.zeros_like(self.B)

    def reset(self) -> None:
        """Forget moments and step count."""
        self.adam = {"A": {}, "B": {}}


def after(u: int, q: int, T: int) -> bool:
    """Whether an event of period q comes after step u of T; restarts and resets have one each."""
    return 0 < u < T - 1 and u % q == 0


def keep_largest(state: list[Tensor], ratio: float) -> list[Tensor]:
    """Moments after magnitude pruning by the first one's mask; sorted, not by quantiles."""
    first = state[0].flatten().abs()
    erased = set(first.argsort()[: round(ratio * first.numel())].tolist())
    mask = torch.tensor([i not in erased for i in range(first.numel())]).view(state[0].shape)
    return [moment * mask for moment in state]
