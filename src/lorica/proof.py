"""The start-up proof: within ten steps every adapter has had a gradient, or the run stops."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.adapters import Adapters
from lorica.moves import reduce_scalar
from lorica.targets import head_names

WATCHED_STEPS = 10
logger = logging.getLogger("lorica")


class Proof:
    """Looks at gradients before each of the first steps; costs nothing once all were seen."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.reached: dict[str, bool] = {}  # layers without a gradient so far -> a token came by
        self.hooks: list[Any] = []
        self.held = False

    def check_held(self, optimizer: torch.optim.Optimizer) -> None:
        """The groups' parameters are the layers' own: after a `fully_shard` by hand, or under an
        engine that flattens parameters, they are not, and steps would move nothing."""
        if self.held:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [t.name for t in self.adapters.trained() if id(t.parameter) not in held]
        if lost:
            raise ValueError(
                f"the optimizer does not hold {len(lost)} of the trained parameters (e.g."
                f" {lost[0]!r}): they were replaced after it was made. Shard the model first and"
                " call `lorica.optimizer` after that; under an engine that flattens parameters"
                " (DeepSpeed) use DDP or FSDP2 instead"
            )
        self.held = True

    def check(self, seen: Tensor, step: int) -> None:
        """Note in `seen` (a flag for each adapter, in model order) which adapters have a gradient.

        An adapter's parameters count together: with B = 0 only B has a gradient at first.

        Raises:
            ValueError: at the last watched step, some had none although tokens reached them.
        """
        if step >= WATCHED_STEPS or bool(seen.all()):
            while self.hooks:
                self.hooks.pop().remove()
            return
        units: dict[str, list[Any]] = {}
        for t in self.adapters.trained():
            units.setdefault(t.site, []).append(t.parameter)
        sites = list(units)
        resting = {site for site, layer in self.adapters.layers.items() if layer.resting}
        waiting = [i for i in range(len(sites)) if not bool(seen[i])]
        grads = [(i, p.grad) for i in waiting for p in units[sites[i]] if p.grad is not None]
        squares = reduce_scalar([g for _, g in grads])
        for (i, _), square in zip(grads, squares, strict=True):
            if square != 0:  # a non-finite gradient is one, too
                seen[i] = True
        missing = [sites[i] for i in waiting if not bool(seen[i]) and sites[i] not in resting]
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

        module = self.adapters.model.get_submodule(site)
        self.hooks.append(module.register_forward_pre_hook(note))

    def _report(self, missing: list[str], count: int) -> None:
        reached = torch.tensor([self.reached[s] for s in missing], dtype=torch.int32)
        if dist.is_initialized():  # an expert may have had its tokens on another process
            reached = reached.to(next(self.adapters.model.parameters()).device)
            dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        resting = [s for s, r in zip(missing, reached.tolist(), strict=True) if not r]
        # Every token reaches a head; one that none reached is computed past its adapter.
        heads = head_names(self.adapters.model)
        silent = [s for s in missing if s not in resting or s in heads]
        resting = [s for s in resting if s not in heads]
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
