"""What a call of an optimizer's step is: a real one, torch's own try-out, or one that a gradient
scaler skips."""

from __future__ import annotations

import contextlib

import torch

from lorica.products import unrounded
from lorica.shards import reduce_scalar


def in_full(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[object]:
    """No autocast: what an event rounds stays rounded."""
    return unrounded(optimizer.param_groups[0]["params"][0].device.type)


def is_fake(optimizer: torch.optim.Optimizer) -> bool:
    """torch's checkpoint API steps an optimizer without state once, with zero rates and
    gradients."""
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return not any(reduce_scalar(grads))


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """A scaler that met an overflow does not call an ordinary optimizer, but a fused one, which it
    tells to do nothing."""
    found = vars(optimizer).get("found_inf")
    return found is not None and bool(found)


def unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divide gradients that a scaler leaves for a fused optimizer to unscale."""
    if (scale := vars(optimizer).get("grad_scale")) is None:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.div_(scale.to(p.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
