"""LoRA+ from Hayou et al. (arXiv 2402.12354): two rates, and the toy model of its section 3."""

from __future__ import annotations

from torch import Tensor


def rates(roles: list[str], lr: float, ratio: float) -> list[float]:
    """η_B = λ η_A."""
    return [lr * ratio if role == "B" else lr for role in roles]


def toy_step(a: Tensor, b: float, x: Tensor, w: Tensor, y: float, lr_a: float, lr_b: float):
    """f(x) = (w + b a)·x under ½(f − y)²: the change of f in one step, as three terms."""
    U = float((w + b * a) @ x) - y
    ax, xx = float(a @ x), float(x @ x)
    new_a, new_b = a - lr_a * U * b * x, b - lr_b * U * ax
    terms = (-lr_a * b**2 * xx * U, -lr_b * ax**2 * U, lr_a * lr_b * U**2 * b * ax * xx)
    return new_a, new_b, terms
