"""Phases: who of the adapted layers trains for the time being.

A schedule that lets layers rest, or the base train for a while, calls `wake` from `after_step` and
from `restore`. A resting parameter has no gradient, so every rule leaves it alone, its moments too.
It goes on *requiring* one outside of forward: DDP and FSDP2 decide once which parameters they
reduce. (DDP has to look for unused parameters then, the Trainer's default.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def wake(adapters: Any, awake: Collection[str] | None = None, *, base: bool = False) -> None:
    """Let only the layers of these paths train; None: all.

    Args:
        awake: module paths of `adapters.layers`.
        base: let the targets' own weights train as well, where a schedule asked for that.
    """
    resting: dict[str, list[str]] = {site: [] for site in adapters.layers}
    for t in adapters.trained():
        if t.site not in resting or t.name in adapters.direct:
            continue
        is_base = t.parameter is adapters.layers[t.site].store.parameter
        beside = base and t.role in ("magnitude", "bias")  # trains with the base, too
        if not (base if is_base else beside or awake is None or t.site in awake):
            resting[t.site].append(t.name.removeprefix(f"{t.site}."))
            t.parameter.grad = None
    for site, names in resting.items():
        adapters.layers[site].resting = tuple(names)


def forward_at_rest(layer: Any, x: Tensor) -> Tensor:
    """The layer's forward, in which its resting parameters are constants."""
    names, layer.resting = layer.resting, ()
    if torch.compiler.is_compiling():  # where no parameter can be told that it needs no gradient
        constants = {name: layer.get_parameter(name).detach() for name in names}
        try:
            return torch.func.functional_call(layer, constants, (x,))
        finally:
            layer.resting = names
    held = [layer.get_parameter(name) for name in names]
    try:
        for p in held:
            p.requires_grad_(False)
        return layer.forward(x)
    finally:
        for p in held:
            p.requires_grad_(True)
        layer.resting = names


def forget(optimizer: torch.optim.Optimizer, *parameters: Tensor) -> None:
    """Give the optimizer's state of these parameters away, memory and all."""
    for p in parameters:
        optimizer.state.pop(p, None)
