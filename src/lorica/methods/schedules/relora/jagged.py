"""The jagged cosine's factor, and pruning of an optimizer's moments."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.tensors.dtensor_ops import copy_, draw, read_full


def jagged(u: int, steps: int, warmup: int, floor: float, cycle: int, rewarm: int) -> float:
    """λ(u) of a run of `steps`: warm-up, cosine to `floor`, a ramp from 0 after each `cycle`."""

    def d(z: int) -> float:
        return floor + (1 - floor) * (1 + math.cos(math.pi * (z - warmup) / (steps - warmup))) / 2

    if u < warmup:
        return u / warmup
    j = u % cycle
    return j / rewarm * d(u - j + rewarm) if j < rewarm and u >= cycle else d(u)


@torch.no_grad()
def prune_state(
    state: Mapping[str, Tensor], shape: torch.Size, how: str, ratio: float, *,
    shared: bool, generator: torch.Generator,
) -> None:  # fmt: skip
    """Zero about `ratio` of each moment of one parameter, at random or the smallest of them.

    Args:
        state: the optimizer's, of one parameter; tensors of other shapes (step counts) stay.
        shared: the first moment's mask for all of them.
    """
    mask = None
    for value in state.values():
        if value.shape != shape:
            continue
        full = read_full(value)
        if mask is None or not shared:
            mask = _kept(full, how, ratio, generator)
        copy_(value, full * mask)


def _kept(full: Tensor, how: str, ratio: float, generator: torch.Generator) -> Tensor:
    if how == "random":
        uniform = draw(full.shape, generator, bound=0.5).to(full.device) + 0.5  # never rounds to 1
        return uniform >= ratio
    size, count = full.float().abs(), round(ratio * full.numel())
    if count == 0:
        return torch.ones_like(size, dtype=torch.bool)
    # Not torch.quantile, which refuses more than 2^24 elements.
    return size > size.flatten().kthvalue(count).values
