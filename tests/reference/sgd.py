"""Gradient descent with momentum and decoupled decay, one number at a time."""

from __future__ import annotations

import torch


def step(p, g, state, *, lr, momentum=0.9, decay=0.0):
    """One step of a tensor; `state` starts empty."""
    b = state.get("b", torch.zeros_like(p))
    out = []
    for x, y, z in zip(p.flatten(), g.flatten(), b.flatten(), strict=True):
        z = momentum * float(z) + float(y)
        out.append((float(x) - lr * decay * float(x) - lr * z, z))
    p, b = (torch.tensor(z, dtype=p.dtype).view(p.shape) for z in zip(*out, strict=True))
    state["b"] = b
    return p


def pair_step(A, B, gA, gB, state, *, lr, decay, momentum=0.9):
    """A and B have nothing to do with each other here."""
    A = step(A, gA, state.setdefault("A", {}), lr=lr, decay=decay, momentum=momentum)
    return A, step(B, gB, state.setdefault("B", {}), lr=lr, decay=decay, momentum=momentum)
