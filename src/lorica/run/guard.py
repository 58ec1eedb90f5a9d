"""What stops a training run instead of letting it go on for nothing: a loss that is no number, too
many steps that are left out, and weights that are not finite.

The look at a step costs one norm over the gradients that train, and no wait: on an accelerator the
figures of a step are copied aside and read a step later, so at most one more step is taken.
Elsewhere they are read at once, before the weights move. The look comes before clipping, which
spreads one value that is not finite to all layers; the optimizer, which leaves such steps out
(`lorica.training.left_out`), is handed what was seen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.data.collate import IGNORED
from lorica.model.adapters import Adapters
from lorica.run import checkpoints
from lorica.tensors import figures
from lorica.training.bind import first_left_out, is_bound, seen_before_clipping, steps_left_out
from lorica.training.left_out import REMEDY, Look, TooManyLeftOut, describe, not_finite_in


@dataclass
class _Step:
    """One step's figures, perhaps still on their way."""

    step: int  # 1-based
    read: Callable[[], list[float]]  # the loss, then what `look` holds
    look: Look
    optimizer: torch.optim.Optimizer
    batches: Sequence[Mapping[str, Any]]
    moved: bool  # the weights have moved by the time it is read


@dataclass
class Guard:
    """Judges the steps of one run.

    Args:
        adapters: what trains.
        folder: where checkpoints lie.
    """

    adapters: Adapters
    folder: Path
    losses: list[Tensor] = field(default_factory=list)  # of the micro-batches of this step
    batches: list[Mapping[str, Any]] = field(default_factory=list)
    waiting: _Step | None = None

    def note(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """A micro-batch was run."""
        self.losses.append(loss.detach())
        self.batches.append(inputs)

    @torch.no_grad()
    def look(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """All gradients of a step are there, not clipped yet.

        Raises:
            ValueError: the loss of this step, or on an accelerator of the one before, is no number.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        values = _figures(self.losses, parameters)
        read = figures.later(values)
        look = Look(parameters, values[1].isfinite(), lambda: read()[1:], True)
        moved = figures.lags(values.device)
        batches = [_labels(b) for b in self.batches] if moved else self.batches
        self.losses, self.batches = [], []
        self.finish()
        self.waiting = _Step(step, read, look, optimizer, batches, moved)
        if not moved:
            self.finish()
        if is_bound(optimizer):
            seen_before_clipping(optimizer, look)

    def finish(self) -> None:
        """Judge what is still waiting.

        Raises:
            ValueError: see `look`.
        """
        step, self.waiting = self.waiting, None
        if step is not None and not math.isfinite(loss := step.read()[0]):
            raise ValueError(
                f"the loss is {loss} at step {step.step}: {self._reason(step)}"
                f" {self.last_good(step.step)}"
            )

    @torch.no_grad()
    def check_weights(self, step: int) -> None:
        """What a step has made of the weights is finite, and worth writing.

        Raises:
            ValueError: it is not.
        """
        trained = [t.parameter for t in self.adapters.trained()]
        norms = figures.local_norms(trained, trained[0].device, of=lambda p: p)
        if _several():
            dist.all_reduce(norms)
        bad = [not math.isfinite(norm) for norm in norms.tolist()]
        if (layers := not_finite_in(self.adapters, trained, bad)) is not None:
            last, count, every = layers
            raise ValueError(
                f"step {step} has made weights that are not finite, in {count} of {every} layers"
                f" that train, e.g. {last!r}: training has diverged. {REMEDY}"
                f" {self.last_good(step)}"
            )

    def _reason(self, step: _Step) -> str:
        if any(_masked(batch) for batch in step.batches):
            return (
                "a batch has no label to learn from, all of them are -100 (masked). Look at how the"
                " rows are masked and cut, and leave out those without a label."
            )
        parts = ["training has diverged."]
        before = None
        if is_bound(step.optimizer):
            with contextlib.suppress(TooManyLeftOut):  # a loss that is no number says more
                steps_left_out(step.optimizer)
            before = first_left_out(step.optimizer)
        step.look.step = step.step
        first = before or step.look
        if any(first.bad):
            parts.append(describe(self.adapters, first, True))
        if before is None and not step.moved and (name := self._output(step.batches)) is not None:
            parts.append(f"In the forward pass {name!r} is the first whose output is not finite.")
        return " ".join([*parts, REMEDY])

    @torch.no_grad()
    def _output(self, batches: Sequence[Mapping[str, Any]]) -> str | None:
        """The first module, in the order of the forward pass, whose output is not finite."""
        model, found = self.adapters.model, []
        device = next(model.parameters()).device
        names = {m: n for n, m in model.named_modules() if n}

        def hook(module: Any, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else None
            if not found and first is not None and first.is_floating_point():
                if not bool(first.isfinite().all()):
                    found.append(names[module])

        hooks = [module.register_forward_hook(hook) for module in names]
        try:
            for batch in batches:
                model(**{k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)})
        finally:
            for handle in hooks:
                handle.remove()
        if not found:
            return None
        inside = [site for site in self.adapters.layers if found[0].startswith(f"{site}.")]
        return inside[0] if inside else found[0]

    def last_good(self, step: int) -> str:
        """None is ever written of values that are not finite, so the last whole one is good."""
        for path in reversed(checkpoints.found(self.folder)):
            if int(path.name.rpartition("-")[2]) < step and checkpoints.flaw(path) is None:
                return (
                    "Another rate needs a run of its own, in another folder; `--resume` (in Python:"
                    " `resume_from_checkpoint=True`) goes on with the same one. The last good"
                    f" checkpoint is {path}"
                )
        return "There is no checkpoint before this step"


class Guarded:
    """What `TrainerMixin` has of this: every step is looked at, and every figure that is logged."""

    adapters: Adapters
    args: Any
    optimizer: Any
    state: Any
    accelerator: Any
    guard: Guard | None = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.guard is None:
            self.guard = Guard(self.adapters, Path(self.args.output_dir))
        self.guard.note(loss, inputs)
        if self.accelerator.sync_gradients:
            self.guard.look(_plain(self.optimizer), self.state.global_step + 1)
        return loss

    def steps_left_out(self) -> int | None:
        """How many steps were left out since the run's first one; None: the state that says it is
        with an engine that shards it."""
        bound = self.optimizer is not None and is_bound(_plain(self.optimizer))
        return steps_left_out(_plain(self.optimizer)) if bound else None

    def check_taken(self) -> None:
        """Every step so far was one to go on from; what is written next is good.

        Raises:
            ValueError: one was not.
        """
        if self.guard is None:  # this process has taken none
            return
        self.guard.finish()
        self.steps_left_out()  # raises, where they are too many
        self.guard.check_weights(self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.guard is not None:
            self.guard.finish()
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith("loss") and not math.isfinite(value):
                raise ValueError(
                    f"`{name}` is {value} at step {self.state.global_step}: the model gives values"
                    " that are no numbers on the evaluation rows, or none of these has a label."
                    " Look at how they are masked and cut; with float16 weights evaluate in a wider"
                    " type (`--dtype float32`)"
                )
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own, out of Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _figures(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """(2 + parameters,): the loss, the joint norm of all gradients, and the norm of each; summed
    over processes, which keeps what is not finite."""
    loss = torch.stack([*losses]).sum()
    norms = figures.local_norms(parameters, loss.device)
    values = torch.cat([loss.to(norms.dtype)[None], norms])
    if _several():
        dist.all_reduce(values)
    return torch.cat([values[:1], torch.linalg.vector_norm(values[1:])[None], values[1:]])


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"labels": batch["labels"]} if "labels" in batch else {}


def _masked(batch: Mapping[str, Any]) -> bool:
    """Whether no label of this batch counts."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return bool((labels == IGNORED).all())
