"""AdaLoRA as the equations say it: triplets in loops, gradients by autograd, AdamW by torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def budget(t: int, steps: int, tinit: int, tfinal: int, first: int, last: int) -> int:
    """b(t), t from 0."""
    end = steps - tfinal
    if t <= tinit:
        return first
    if t > end:
        return last
    return math.floor(last + (first - last) * (1 - (t - tinit) / (end - tinit)) ** 3)


def penalty(pairs: list[tuple[Tensor, Tensor]], form: str = "mean") -> Tensor:
    """Of pairs A (r, in), B (out, r), without its weight."""
    total = torch.zeros((), dtype=pairs[0][0].dtype)
    for A, B in pairs:
        eye = torch.eye(A.shape[0], dtype=A.dtype)
        for off in (B.T @ B - eye, A @ A.T - eye):
            size = off.square().sum()
            total = total + (size.sqrt() / (2 * len(pairs)) if form == "mean" else size)
    return total


class Run:
    """A chain of layers W (out, in) with tanh between, adapted by s·B diag(E) A each."""

    def __init__(
        self, weights: list[Tensor], factors: list[tuple[Tensor, Tensor, Tensor]], s: float,
        lr: float, steps: int, tinit: int, tfinal: int, interval: int, last: int,
        beta1: float = 0.85, beta2: float = 0.85, gamma: float = 0.1,
    ) -> None:  # fmt: skip
        self.weights, self.s, self.gamma = weights, s, gamma
        self.triplets = [[p.clone().requires_grad_() for p in own] for own in factors]  # A, E, B
        self.plan = steps, tinit, tfinal, interval
        self.first, self.last = sum(len(E) for _, E, _ in factors), last
        self.betas = beta1, beta2
        self.mean = [[torch.zeros_like(p) for p in own] for own in factors]
        self.spread = [[torch.zeros_like(p) for p in own] for own in factors]
        self.keep: list[list[bool]] | None = None
        every = [p for own in self.triplets for p in own]
        self.adam = torch.optim.AdamW(every, lr=lr, weight_decay=0, foreach=False)
        self.t = 0

    def __call__(self, x: Tensor) -> Tensor:
        for k, (W, (A, E, B)) in enumerate(zip(self.weights, self.triplets, strict=True)):
            x = x @ W.T + self.s * ((x @ A.T) * E.T) @ B.T
            x = torch.tanh(x) if k < len(self.weights) - 1 else x
        return x

    def step(self, x: Tensor, y: Tensor) -> float:
        self.adam.zero_grad()
        task = (self(x) - y).square().mean()
        (task + self.gamma * penalty([(A, B) for A, _, B in self.triplets])).backward()
        self.adam.step()
        steps, tinit, tfinal, interval = self.plan
        end = steps - tfinal
        with torch.no_grad():
            if self.t < end:
                self.learn()
            b = budget(self.t, steps, tinit, tfinal, self.first, self.last)
            now = self.t == end or self.t % interval == 0
            if tinit < self.t <= end and now and b < self.first:
                self.keep = self.select(b)
                self.mask()
            if self.t > end:
                self.mask()
        self.t += 1
        return task.item()

    def learn(self) -> None:
        b1, b2 = self.betas
        for own, mean, spread in zip(self.triplets, self.mean, self.spread, strict=True):
            for i, p in enumerate(own):
                now = (p * p.grad).abs()
                mean[i] = b1 * mean[i] + (1 - b1) * now
                spread[i] = b2 * spread[i] + (1 - b2) * (now - mean[i]).abs()

    def scores(self) -> list[list[float]]:
        out = []
        for mean, spread in zip(self.mean, self.spread, strict=True):
            A, E, B = (m * u for m, u in zip(mean, spread, strict=True))
            out.append(
                [
                    float(E[i, 0]) + float(A[i].sum()) / A.shape[1] + float(B[:, i].sum()) / len(B)
                    for i in range(len(E))
                ]
            )
        return out

    def select(self, b: int) -> list[list[bool]]:
        scores = self.scores()
        threshold = sorted(s for own in scores for s in own)[self.first - b - 1]
        return [[s > threshold for s in own] for own in scores]

    def mask(self) -> None:
        assert self.keep is not None
        for (_, E, _), keep in zip(self.triplets, self.keep, strict=True):
            for i, alive in enumerate(keep):
                if not alive:
                    E[i] = 0
