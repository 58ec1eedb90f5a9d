"""AdamW, one number at a time, from the algorithm of Loshchilov and Hutter (arXiv 1711.05101)."""

from __future__ import annotations

import torch
from torch import Tensor


def number(p, g, m, v, t, *, lr, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.0):
    """One step of one number; returns (p, m, v)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * decay * p
    return p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps), m, v


def step(p: Tensor, g: Tensor, state: dict, *, lr: float, decay: float = 0.0, **betas) -> Tensor:
    """One step of a tensor; `state` starts empty."""
    t = state["t"] = state.get("t", 0) + 1
    m, v = state.get("m", torch.zeros_like(p)), state.get("v", torch.zeros_like(p))
    out = [
        number(*(float(z) for z in numbers), t, lr=lr, decay=decay, **betas)
        for numbers in zip(p.flatten(), g.flatten(), m.flatten(), v.flatten(), strict=True)
    ]
    p, m, v = (torch.tensor(z, dtype=p.dtype).view(p.shape) for z in zip(*out, strict=True))
    state.update(m=m, v=v)
    return p


def pair_step(A, B, gA, gB, state, *, lr, decay):
    """A and B have nothing to do with each other here."""
    A = step(A, gA, state.setdefault("A", {}), lr=lr, decay=decay)
    return A, step(B, gB, state.setdefault("B", {}), lr=lr, decay=decay)
