"""The start-up proof: within ten steps every adapter has had a gradient, or the run stops."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from lorica.adapters import Adapters
from lorica.moves import reduce_scalar

WATCHED_STEPS = 10
logger = logging.getLogger("lorica")


class Proof:
    """Looks at gradients before each of the first steps; costs nothing once all were seen."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.reached: dict[str, bool] = {}  # layers without a gradient so far -> a token came by

    def check(self, seen: Tensor, step: int) -> None:
        """Note in `seen` (a flag for each adapter, in model order) which adapters have a gradient.

        An adapter's parameters count together: with B = 0 only B has a gradient at first.

        Raises:
            ValueError: at the last watched step, some had none although tokens reached them.
        """
        if step >= WATCHED_STEPS or bool(seen.all()):
            return
        units: dict[str, list[Any]] = {}
        for t in self.adapters.trained():
            units.setdefault(t.site, []).append(t.parameter)
        sites = list(units)
        waiting = [i for i in range(len(sites)) if not bool(seen[i])]
        grads = [(i, p.grad) for i in waiting for p in units[sites[i]] if p.grad is not None]
        squares = reduce_scalar([g for _, g in grads])
        for (i, _), square in zip(grads, squares, strict=True):
            if square != 0:  # a non-finite gradient is one, too
                seen[i] = True
        missing = [sites[i] for i in waiting if not bool(seen[i])]
        for site in missing:
            self._look(site)
        if missing and step == WATCHED_STEPS - 1:
            self._report(missing, len(sites))

    def _look(self, site: str) -> None:
        """From now on remember whether any token reaches this layer."""
        if site in self.reached:
            return
        self.reached[site] = False

        def note(module: Any, args: tuple) -> None:
            self.reached[site] |= bool(args) and args[0].numel() > 0

        self.adapters.model.get_submodule(site).register_forward_pre_hook(note)

    def _report(self, missing: list[str], count: int) -> None:
        resting = [s for s in missing if not self.reached[s]]
        silent = [s for s in missing if self.reached[s]]
        if len(resting) == count:
            silent, resting = resting, []
        if resting:
            logger.warning(
                "no token reached %d adapted layer(s) in the first %d steps: %s",
                len(resting), WATCHED_STEPS, ", ".join(resting),
            )  # fmt: skip
        if silent:
            raise ValueError(
                f"{len(silent)} adapter(s) had no gradient in {WATCHED_STEPS} steps, so nothing"
                f" there is being trained: {', '.join(silent)}. Does the loss depend on these"
                " layers, and does gradient checkpointing keep gradients (use_reentrant=False, or"
                " model.enable_input_require_grads())?"
            )
