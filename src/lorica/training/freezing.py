"""Which of the adapted layers train now, and which are frozen for a while.

A schedule that freezes layers, or lets the base train for a while, calls `training.set_trainable`
from `after_step` and from `restore`. A frozen parameter has no gradient, so every rule leaves it
alone, its moments too. It goes on *requiring* one outside of forward: DDP and FSDP2 decide once
which parameters they reduce. (DDP has to look for unused parameters then, the Trainer's default.)
"""

from __future__ import annotations

from collections.abc import Collection

from lorica.model.adapters import Adapters


def set_trainable(
    adapters: Adapters, layers: Collection[str] | None = None, *, base: bool = False
) -> None:
    """Let only these layers train from the next forward on.

    Args:
        layers: module paths of `adapters.layers`; None: all.
        base: let the targets' own weights train as well, where a schedule asked for that.
    """
    frozen: dict[str, list[str]] = {site: [] for site in adapters.layers}
    for t in adapters.trained():
        if t.site not in frozen or t.name in adapters.direct:
            continue
        is_base = t.parameter is adapters.layers[t.site].store.parameter
        beside = base and t.role in ("magnitude", "bias")  # trains with the base, too
        if not (base if is_base else beside or layers is None or t.site in layers):
            frozen[t.site].append(t.name.removeprefix(f"{t.site}."))
            t.parameter.grad = None
    for site, names in frozen.items():
        adapters.layers[site].frozen_for_now = tuple(names)
