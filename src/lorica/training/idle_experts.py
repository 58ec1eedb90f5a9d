"""IdleExperts: which experts of adapted stacks had no gradient in the first steps, and why.

An expert that no token was routed to keeps its start and waits for other examples. One that had
tokens and no gradient is another matter: the loss does not depend on what it computes.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.model.adapters import Adapters
from lorica.model.experts import AdaptedTensor
from lorica.tensors.dtensor_ops import all_reduce_

logger = logging.getLogger("lorica")


class IdleExperts:
    """Looks on during the first steps, without waiting for the device until the last of them."""

    def __init__(self, adapters: Adapters) -> None:
        self.stacks = {n: x for n, x in adapters if isinstance(x, AdaptedTensor)}
        self.learning: dict[str, Tensor] = {}  # (E,) bool, of each stack

    @torch.no_grad()
    def check(self, step: int, watched: int) -> None:
        """Note, before step `step` (0-based) of the `watched` ones, which experts have a gradient,
        and at the last one report those that never had any."""
        if not self.stacks or step >= watched:
            return
        for site, layer in self.stacks.items():
            grads = [p.grad for _, p, _ in layer.trained() if p.grad is not None]
            for grad in grads:
                now = grad.flatten(1).any(1)
                held = self.learning.get(site)
                self.learning[site] = now if held is None else held | now
            if layer.routed is None:
                layer.routed = torch.zeros(
                    layer.site.experts, dtype=torch.bool, device=layer.store.device
                )
        if step == watched - 1:
            self._report(watched)

    def _report(self, watched: int) -> None:
        idle: dict[str, int] = {}
        dead: dict[str, list[int]] = {}
        for site, layer in self.stacks.items():
            learning, routed = self.learning.get(site), layer.routed
            layer.routed = None
            if learning is None or routed is None:
                continue
            flags = torch.stack([learning, routed]).to(torch.int32)
            if dist.is_initialized():  # an expert may have had its tokens on another process
                all_reduce_(flags, op=dist.ReduceOp.MAX)
            learns, had = (row.bool() for row in flags.cpu())
            idle[site] = int((~learns & ~had).sum())
            dead[site] = [int(e) for e in (~learns & had).nonzero()]
        waiting = {site: n for site, n in idle.items() if n}
        if waiting:
            most = max(waiting, key=lambda site: waiting[site])
            logger.info(
                "no token was routed to %d of the experts' weights in the first %d steps, so they"
                " keep their start so far; most in %s: %d of %d experts",
                sum(waiting.values()), watched, most, waiting[most],
                self.stacks[most].site.experts,
            )  # fmt: skip
        for site, experts in dead.items():
            if experts:
                logger.warning(
                    "%s: tokens were routed to expert(s) %s in the first %d steps, and the loss had"
                    " no gradient for them", site, ", ".join(map(str, experts)), watched,
                )  # fmt: skip
