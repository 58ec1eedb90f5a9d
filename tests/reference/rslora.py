"""rsLoRA from Kalajdzievski (arXiv 2312.03732): s = α/√r, and the first step in closed form."""

from __future__ import annotations

import math

from torch import Tensor


def scale(alpha: float, r: int) -> float:
    return alpha / math.sqrt(r)


def first_update(A: Tensor, G: Tensor, s: float, lr: float) -> Tensor:
    """ΔW₁ = −η s² G AᵀA, the update after one step of gradient descent from B = 0."""
    return -lr * s**2 * G @ A.T @ A
