"""Phases: who of the adapted layers trains for the time being.

A schedule that lets layers rest, or the base train for a while, calls these from `after_step` and
from `restore`. A resting parameter has no gradient, so every rule leaves it alone, its moments too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def wake(adapters: Any, awake: Collection[str] | None = None, *, base: bool = False) -> None:
    """Let only the layers of these paths train; None: all.

    Args:
        awake: module paths of `adapters.layers`.
        base: let the targets' own weights train as well, where a schedule asked for that.
    """
    bases = {id(layer.store.parameter) for layer in adapters.layers.values()}
    for t in adapters.trained():
        if t.site not in adapters.layers or t.name in adapters.direct:
            continue
        on = base if id(t.parameter) in bases else awake is None or t.site in awake
        t.parameter.requires_grad_(on)
        if not on:
            t.parameter.grad = None
