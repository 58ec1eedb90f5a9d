"""COLA for one weight, from its algorithm (arXiv 2401.04151)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference import adamw


def rate(u: int, knots: list[int], last: int) -> float:
    """The factor at step u: a cosine from 1 to 0 within each link; `last`: end of the run."""
    ends = [0, *knots, last]
    for begin, end in zip(ends, ends[1:], strict=False):
        if begin <= u < end:
            return 0.5 * (1 + math.cos(math.pi * ((u - begin) / (end - begin))))
    return 0.0


class Run:
    """W (out, in) frozen, A (r, in) and B (out, r) trained by Adam, s the scale."""

    def __init__(self, W: Tensor, A: Tensor, s: float) -> None:
        self.W, self.A, self.s = W.clone(), A.clone(), s
        self.B = W.new_zeros(W.shape[0], A.shape[0])
        self.adam: dict[str, dict] = {"A": {}, "B": {}}
        self.links: list[Tensor] = []

    def effective(self) -> Tensor:
        return self.W + sum(self.links, torch.zeros_like(self.W)) + self.s * self.B @ self.A

    def step(self, G: Tensor, lr: float) -> None:
        """G (out, in): the gradient with respect to the effective weight."""
        gA, gB = self.s * self.B.T @ G, self.s * G @ self.A.T
        self.A = adamw.step(self.A, gA, self.adam["A"], lr=lr)
        self.B = adamw.step(self.B, gB, self.adam["B"], lr=lr)

    def knot(self, A: Tensor) -> None:
        """Keep the product, take the fresh A, start Adam anew."""
        self.links.append(self.s * self.B @ self.A)
        self.A, self.B = A.clone(), torch.zeros_like(self.B)
        self.adam = {"A": {}, "B": {}}
