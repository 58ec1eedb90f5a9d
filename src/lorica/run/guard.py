"""What stops a training run instead of letting it go on for nothing: a loss that is no number.

The look at a step costs one norm over the gradients that train, and no wait:
on an accelerator the figures of a step are copied aside and read a step later, so at most one more
step is taken. Elsewhere they are read at once, before the weights move.

Only the loss stops a run. Gradients that are not finite beside a finite loss are left out of the
step by a loss scaler and by the rules that are not torch's own; but they are remembered, for where
they spoil the weights the next loss is no number, and then the first of them is what has to be
named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_norm  # type: ignore[attr-defined]

from lorica.data.collate import IGNORED
from lorica.model.adapters import Adapters
from lorica.run import checkpoints
from lorica.tensors.dtensor_ops import shard_of


@dataclass
class _Look:
    """One step's figures, perhaps still on their way."""

    step: int  # 1-based
    read: Callable[[], list[float]]  # the loss, then the norm of each parameter's gradient
    parameters: list[Tensor]
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
    waiting: _Look | None = None
    # The first step of those in a row whose gradients are not finite: parameters, all and bad.
    began: tuple[int, list[Tensor], list[bool]] | None = None

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
        figures = _figures(self.losses, parameters)
        moved = _lags(figures.device)
        batches = [_labels(b) for b in self.batches] if moved else self.batches
        self.losses, self.batches = [], []
        self.finish()
        self.waiting = _Look(step, _later(figures), parameters, batches, moved)
        if not moved:
            self.finish()

    def finish(self) -> None:
        """Judge what is still waiting.

        Raises:
            ValueError: see `look`.
        """
        look, self.waiting = self.waiting, None
        if look is not None:
            self._judge(look)

    def _judge(self, look: _Look) -> None:
        loss, *norms = look.read()
        bad = [not math.isfinite(value) for value in norms]
        if not any(bad):
            self.began = None
        elif self.began is None:
            self.began = (look.step, look.parameters, bad)
        if math.isfinite(loss):
            return
        raise ValueError(
            f"the loss is {loss} at step {look.step}: {self._reason(look)}"
            f" {self._last_good(look.step)}"
        )

    def _reason(self, look: _Look) -> str:
        if any(_masked(batch) for batch in look.batches):
            return (
                "a batch has no label to learn from, all of them are -100 (masked). Look at how the"
                " rows are masked and cut, and leave out those without a label."
            )
        parts = ["training has diverged."]
        if self.began is not None:
            parts.append(self._gradients(*self.began))
        first = self.began is None or self.began[0] == look.step
        if first and not look.moved and (name := self._output(look.batches)) is not None:
            parts.append(f"In the forward pass {name!r} is the first whose output is not finite.")
        parts.append(
            "Lower the learning rate (`--learning-rate`), or let it rise more slowly"
            " (`--warmup-ratio`); with float16 weights train in a wider type (`--dtype float32`)."
        )
        return " ".join(parts)

    def _gradients(self, step: int, parameters: list[Tensor], bad: list[bool]) -> str:
        """Where gradients first were not finite, in the order of the backward pass."""
        place = {name: i for i, (name, _) in enumerate(self.adapters.model.named_modules())}
        owner = {id(t.parameter): t.site for t in self.adapters.trained()}
        sites = {owner.get(id(p), "?") for p in parameters}
        hit = {owner.get(id(p), "?") for p, b in zip(parameters, bad, strict=True) if b}
        last = max(hit, key=lambda name: place.get(name, -1))
        return (
            f"Gradients are not finite from step {step} on, first in {last!r} (from the loss"
            f" backwards), in {len(hit)} of {len(sites)} layers that train."
        )

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

    def _last_good(self, step: int) -> str:
        """None is ever written of values that are not finite, so the last whole one is good."""
        for path in reversed(checkpoints.found(self.folder)):
            if int(path.name.rpartition("-")[2]) < step and checkpoints.flaw(path) is None:
                return f"The last good checkpoint is {path}"
        return "There is no checkpoint before it"


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
            self.guard.look(self.optimizer, self.state.global_step + 1)
        return loss

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


def _figures(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """(1 + parameters,): the loss, then the norm of each gradient, 0 where there is none; summed
    over processes, which keeps what is not finite."""
    loss = torch.stack([*losses]).sum().float()
    parts = [None if p.grad is None else shard_of(p.grad)[0] for p in parameters]
    held = [g for g in parts if g is not None and g.numel()]
    norms = iter(_foreach_norm(held, 2) if held else ())  # the largest element costs 20 times that
    zero = loss.new_zeros(())
    every = [zero if g is None or not g.numel() else next(norms) for g in parts]
    where: Any = {"device": loss.device, "dtype": loss.dtype, "non_blocking": True}
    figures = torch.stack([loss, *(value.to(**where) for value in every)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(figures)
    return figures


def _lags(device: torch.device) -> bool:
    """Whether the figures of a step are read only at the next one."""
    return device.type == "cuda"


def _later(figures: Tensor) -> Callable[[], list[float]]:
    """Reads them; on a GPU without a wait if the next step has been launched by then."""
    if not figures.is_cuda:
        values = figures.tolist()
        return lambda: values
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return host.tolist()

    return read


def _labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"labels": batch["labels"]} if "labels" in batch else {}


def _masked(batch: Mapping[str, Any]) -> bool:
    """Whether no label of this batch counts."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return bool((labels == IGNORED).all())
