"""Products as the caller wrote them, and sums in the layout of what they are added to."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def unrounded(device: str) -> contextlib.AbstractContextManager[object]:
    """No autocast within; free where none is on, which `torch.autocast` is not."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def added(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """w + scale·b a (out, in), new, of w (out, in), b (out, k), a (k, in).

    A weight that is stored transposed gives a sum that is: turning it would cost as much as three
    such sums.
    """
    if w.stride(-1) != 1 and w.stride(0) == 1:
        return torch.addmm(w.T, a.T, b.T, alpha=scale).T
    return torch.addmm(w, b, a, alpha=scale)
