"""Steps that are left out: those with a gradient that is not finite.

Whatever the rule, such a step moves no weight and no state of the optimizer, and it is counted. Too
many of them stop the training, for then next to nothing is learned, and nobody would see it: 3 in
a row, or more than 10 % of the last 50 steps (of all steps in a shorter run).

The look at a step is one norm over its gradients. On the CPU it is read at once. On an accelerator
an optimizer that can be told on the device to do nothing (torch's `found_inf`, which fused ones
read) is told there; the figures follow, and are read `LAG` steps later, so no step waits for them.
Any other optimizer there waits for its figures, as a gradient scaler makes it do.

A step that a gradient scaler skips is none of these: the scaler looks for its scale that way.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorica.model.adapters import Adapters
from lorica.tensors import figures
from lorica.tensors.dtensor_ops import sum_over_shards_
from lorica.tensors.linalg import ints, vector_norm
from lorica.tensors.modules import named_modules

logger = logging.getLogger("lorica")

IN_A_ROW = 3
WINDOW, SHARE = 50, 0.1  # steps, and what part of them may be left out
LAG = 8  # steps after which figures on an accelerator are read
_LAST = int(WINDOW * SHARE) + 1  # as many of the last ones as decide

REMEDY = (
    "Lower the learning rate (`--learning-rate`; in Python `lr`), or let it rise more slowly"
    " (`--warmup-ratio`); with float16 weights train in a wider type (`--dtype float32`)."
)

Own = dict[str, Any]  # Any: the state that `bind` keeps, numbers, strings and tensors


class TooManyLeftOut(ValueError):
    """Training stops: too many steps were left out."""


@dataclass
class Look:
    """The gradients of one step."""

    parameters: list[Tensor]
    finite: Tensor  # (), on the device: whether all are
    read: Callable[[], list[float]]  # the joint norm, then that of each parameter's gradient
    before_clipping: bool  # which spreads one value that is not finite to all of them
    step: int = 0  # 1-based

    @property
    def bad(self) -> list[bool]:
        return [not math.isfinite(norm) for norm in self.read()[1:]]


@torch.no_grad()
def look(optimizer: torch.optim.Optimizer) -> Look:
    """At the gradients as they stand."""
    parameters: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
    norms = figures.local_norms(parameters, parameters[0].device)
    sum_over_shards_(norms, [p.grad for p in parameters])
    together = torch.cat([vector_norm(norms)[None], norms])
    return Look(parameters, together[0].isfinite(), figures.later(together), False)


class LeftOut:
    """Leaves steps out, counts them, and stops training where there are too many.

    Args:
        adapters: what trains, for the names of layers.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.waiting: deque[Look] = deque()
        self.began: Look | None = None  # of the first of the steps in a row that were left out
        self.given: Look | None = None  # what a caller has seen of the step that comes
        self.held: list[tuple[Tensor, Tensor]] = []  # gradients that are put aside for a step
        self.told = False  # the optimizer was told on the device

    @staticmethod
    def state() -> Own:
        """What is kept with a checkpoint: how many steps were left out so far, and the last of
        them, 1-based, the latest at the end; 0: none."""
        return {"steps": 0, "last": torch.zeros(_LAST, dtype=torch.long)}

    def loaded(self, own: Own) -> None:
        """A checkpoint was read, or there is none; one of an older version counts nothing."""
        state: Own = own.setdefault("left_out", self.state())
        state["last"] = state["last"].cpu()
        self.waiting.clear()
        self.began = self.given = None

    def before(self, optimizer: torch.optim.Optimizer, own: Own) -> None:
        """Gradients are as they will be used; the parameters have not moved.

        Raises:
            TooManyLeftOut: a step that was looked at is one too many.
        """
        given, self.given = self.given, None
        if "found_inf" in vars(optimizer):  # a gradient scaler has looked
            return
        seen = look(optimizer) if given is None else given
        seen.step = own["step"] + 1
        self.waiting.append(seen)
        if figures.lags(seen.finite.device) and _on_device(optimizer, seen.parameters):
            self.read(own, LAG)
            vars(optimizer)["found_inf"] = (~seen.finite).float()
            self.told = True
        elif self.read(own):
            for p in seen.parameters:
                if p.grad is not None:
                    self.held.append((p, p.grad))
                    p.grad = None

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is taken, or left out: whoever reads gradients finds them again."""
        if self.told:
            del vars(optimizer)["found_inf"]
            self.told = False
        while self.held:
            p, gradient = self.held.pop()
            p.grad = gradient

    def read(self, own: Own, keep: int = 0) -> bool:
        """Count all but the last `keep` steps that are not counted yet; whether the last of those
        that were was left out."""
        out = False
        while len(self.waiting) > keep:
            out = self._count(own, self.waiting.popleft())
        return out

    def _count(self, own: Own, seen: Look) -> bool:
        if math.isfinite(seen.read()[0]):
            self.began = None
            return False
        state: Own = own["left_out"]
        last: Tensor = state["last"]
        before = ints(last)
        state["steps"] += 1
        steps = [*before[1:], seen.step]
        last.copy_(torch.tensor(steps))
        if self.began is None or before[-1] != seen.step - 1:
            self.began = seen
        known = [step for step in steps if step > 0]
        row = next((i for i in range(1, _LAST) if seen.step - i not in known), _LAST)
        window = min(WINDOW, own["total_steps"] or WINDOW)
        recent = sum(step > seen.step - window for step in known)
        total: int = state["steps"]
        why = describe(self.adapters, self.began, row > 1)
        if total & (total - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
            logger.warning("step %d is left out (%d so far). %s", seen.step, total, why)
        if row >= IN_A_ROW:
            what = f"{row} steps in a row had to be left out, so nothing is being learned"
        elif recent > SHARE * window:
            which = "the last 50" if window == WINDOW else f"the run's {window}"
            most = int(SHARE * window)
            what = f"{recent} of {which} steps had to be left out, and at most {most} may be"
        else:
            return True
        raise TooManyLeftOut(
            f"training stops at step {seen.step}: {what}. {why} A step that is left out changes no"
            f" weight. {REMEDY}"
        )


def describe(adapters: Adapters, look: Look, goes_on: bool) -> str:
    """Where gradients were not finite, in the order of the backward pass.

    Args:
        goes_on: they still are, some steps later.
    """
    when = f"from step {look.step} on" if goes_on else f"at step {look.step}"
    layers = not_finite_in(adapters, look.parameters, look.bad)
    if layers is None:
        return f"The joint norm of all gradients is not finite {when}."
    last, count, every = layers
    if count == every and every > 1 and not look.before_clipping:
        return (
            f"Gradients are not finite {when}, in all {every} layers that train, as after clipping,"
            " which spreads one such value to all."
        )
    return (
        f"Gradients are not finite {when}, first in {last!r} (from the loss backwards), in {count}"
        f" of {every} layers that train."
    )


def not_finite_in(
    adapters: Adapters, parameters: Sequence[Tensor], bad: Sequence[bool]
) -> tuple[str, int, int] | None:
    """(the layer that is hit nearest to the loss, how many are hit, how many train); None: no
    parameter is."""
    place = {name: i for i, (name, _) in enumerate(named_modules(adapters.model))}
    owner = {id(t.parameter): t.site for t in adapters.trained()}
    sites = {owner.get(id(p), "?") for p in parameters}
    hit = {owner.get(id(p), "?") for p, b in zip(parameters, bad, strict=True) if b}
    if not hit:
        return None
    return max(hit, key=lambda name: place.get(name, -1)), len(hit), len(sites)


def _on_device(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether it reads `found_inf` on the device, which no sharded parameter can."""
    reads = bool(vars(optimizer).get("_step_supports_amp_scaling"))
    return reads and not any(isinstance(p, DTensor) for p in parameters)
