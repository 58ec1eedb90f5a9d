"""PC-LoRA from Hwang et al. (arXiv 2406.09117), straight from the equations."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fade(shape: str, t: int, q: float) -> float:
    """λ(t): 1 at t = 0, 0 from t = q on."""
    if t >= q:
        return 0.0
    if shape == "linear":
        return 1 - t / q
    if shape == "cosine":
        return math.sin(math.pi / 2 * (1 + t / q))
    if shape == "one_minus_sine":
        return 1 - math.sin(math.pi * t / (2 * q))
    return 1.0


def layer(x: Tensor, W, b, A, B, s: float, c, share: float) -> Tensor:
    """y = λ(x Wᵀ + b) + s·(x Aᵀ) Bᵀ + c for x (tokens, in)."""
    return share * (x @ W.T + b) + s * (x @ A.T) @ B.T + c


def dense(W: Tensor, b, A, B, s: float, c, share: float) -> tuple[Tensor, Tensor]:
    """The weight (out, in) and bias (out,) of a plain layer that computes the same."""
    return share * W + s * B @ A, share * b + c


def gradients(x: Tensor, dy: Tensor, A, B, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B, ∂L/∂c) from dy = ∂L/∂y (tokens, out); λ has no part in them."""
    return s * (dy @ B).T @ x, s * dy.T @ (x @ A.T), dy.sum(0)


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of the mean square difference."""
    total = torch.zeros((), dtype=student[0].dtype)
    for h, h0 in zip(student, teacher, strict=True):
        total = total + ((h - h0) ** 2).sum() / h.numel()
    return total / len(student)


def loss(task: Tensor, student: list[Tensor], teacher: list[Tensor], alpha: float) -> Tensor:
    return alpha * task + (1 - alpha) * feature_loss(student, teacher)


def truncated(W: Tensor, r: int) -> Tensor:
    """The best approximation of W of rank r."""
    u, s, vh = torch.linalg.svd(W)
    return u[:, :r] @ torch.diag(s[:r]) @ vh[:r]
