"""PiSSA from Meng et al. (arXiv 2404.02948), by power iteration instead of a library's SVD."""

from __future__ import annotations

import torch
from torch import Tensor


def top_part(W: Tensor, r: int, rounds: int = 3000) -> tuple[Tensor, list[float]]:
    """(the best rank-r approximation of W, its r singular values), one direction at a time."""
    rest, part, values = W.clone(), torch.zeros_like(W), []
    for k in range(r):
        v = torch.ones(W.shape[1], dtype=W.dtype) + torch.arange(W.shape[1]) * 0.01 * (k + 1)
        for _ in range(rounds):
            v = rest.T @ (rest @ v)
            v = v / v.norm()
        u = rest @ v
        values.append(float(u.norm()))
        part, rest = part + torch.outer(u, v), rest - torch.outer(u, v)
    return part, values
