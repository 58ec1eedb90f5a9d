"""LoRA-FA from Zhang et al. (arXiv 2308.03303): A stays, B takes the plain gradient."""

from __future__ import annotations

from torch import Tensor


def descent(A: Tensor, B: Tensor, G: Tensor, s: float, lr: float) -> tuple[Tensor, Tensor]:
    """One step of gradient descent; G = ∂L/∂W'."""
    return A, B - lr * s * G @ A.T


def in_row_space(delta: Tensor, A: Tensor) -> float:
    """The share of ΔW's energy that lies in the row space of A, 0 to 1."""
    P = A.T @ (A @ A.T).inverse() @ A
    return float((delta @ P).square().sum() / delta.square().sum())
