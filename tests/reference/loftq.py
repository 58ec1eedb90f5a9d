"""LoftQ from Li et al. (arXiv 2310.08659), algorithm 1, with the SVD by power iteration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.pissa import top_part


def alternate(
    W: Tensor, quantise: Callable[[Tensor], Tensor], r: int, rounds: int
) -> list[tuple[Tensor, Tensor, list[float]]]:
    """(Q, the product of the factors, its singular values) after each round."""
    product, out = torch.zeros_like(W), []
    for _ in range(rounds):
        Q = quantise(W - product)
        product, values = top_part(W - Q, r, 600)
        out.append((Q, product, values))
    return out
