"""Matmul without autocast, and W + s·BA in W's memory layout."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def no_autocast(device: str) -> contextlib.AbstractContextManager[object]:
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


@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType]
def rounds_float32(device: str) -> bool:
    """Whether products of float32 are computed with fewer digits on this type of device: in TF32,
    or in bfloat16."""
    backends: Any = torch.backends  # Any: the attributes below are younger than torch's stubs
    try:
        backend = backends.cuda.matmul if device == "cuda" else backends.mkldnn.matmul
        return backend.fp32_precision not in ("ieee", "none")
    except AttributeError:  # torch before 2.9
        return torch.get_float32_matmul_precision() != "highest"
