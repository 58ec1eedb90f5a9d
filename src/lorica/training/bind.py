"""bind: schedules and the checks of gradients run on the optimizer's step hooks.

The optimizer is the one object that a plain loop and the Trainer share, and both save it. Its step
hooks call the schedules, and their state lives in `param_groups[0]["lorica"]`, the one place that
torch's checkpoint API, Accelerate and the Trainer all keep. `bind` is lazy: it registers hooks and
writes numbers, and touches no weight or optimizer state before the first real step; it holds names,
not tensors.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lorica.methods.arguments import whole_argument
from lorica.methods.optional import FitsHorizon
from lorica.methods.schedules.base import AbstractSchedule
from lorica.model.adapters import Adapters
from lorica.tensors import figures
from lorica.tensors.dtensor_ops import on_cpu, reduce_scalar
from lorica.tensors.linalg import floats
from lorica.tensors.matmul import no_autocast
from lorica.text import clear_errors
from lorica.training.checks import GradientCheck
from lorica.training.horizon import fitted_method
from lorica.training.left_out import LeftOut, Look
from lorica.training.training import Training

logger = logging.getLogger("lorica")
KEY = "lorica"
VERSION = 1


# -- what a call of `optimizer.step` is: a real step, torch's dummy, or one that GradScaler skips


def in_full(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[object]:
    """No autocast: what an event rounds stays rounded."""
    return no_autocast(optimizer.param_groups[0]["params"][0].device.type)


def is_fake(optimizer: torch.optim.Optimizer) -> bool:
    """torch's checkpoint API steps an optimizer without state once, with zero rates and
    gradients."""
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return not any(reduce_scalar(grads))


def is_empty(optimizer: torch.optim.Optimizer) -> bool:
    """Nothing has a gradient, so torch's optimizers do nothing, and schedules do as they do."""
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


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
    vars(optimizer)["grad_scale"] = None


# -- the hooks


StepArgs = tuple[Any, ...]  # Any: whatever a caller hands to `optimizer.step`


def run_closure(
    optimizer: torch.optim.Optimizer, args: StepArgs, kwargs: dict[str, Any]
) -> tuple[StepArgs, dict[str, Any]]:
    """Evaluate the closure of `step(closure)` before all else that looks at gradients. torch's
    optimizers do the same as they begin; this one finds the loss in its place."""
    given = dict(zip(("self", "closure"), args, strict=False)) | kwargs
    closure: Callable[[], object] | None = given.get("closure")
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    return args[:1], {**kwargs, "closure": lambda: loss}


Own = dict[str, Any]  # Any: what `bind` writes below, numbers, strings and tensors


class _Binding:
    """The hooks on one optimizer, which run the schedules around each real step."""

    def __init__(
        self,
        adapters: Adapters,
        optimizer: torch.optim.Optimizer,
        schedules: Sequence[AbstractSchedule],
        curve: str,
    ) -> None:
        self.adapters = adapters
        self.schedules = schedules
        self.fitted = fitted_method(adapters.recipe) or curve
        self.total_steps: int = optimizer.param_groups[0][KEY]["total_steps"]
        self.real = False
        self.rates: list[float | torch.Tensor] = []
        self.gradient_check = GradientCheck(adapters)
        self.left_out = LeftOut(adapters)
        optimizer.register_step_pre_hook(run_closure)
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        optimizer.register_load_state_dict_pre_hook(self.check_loaded)
        optimizer.register_load_state_dict_post_hook(self.loaded)
        optimizer.register_state_dict_pre_hook(self.read)

    # -- around a step

    @on_cpu
    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: StepArgs, kwargs: Own) -> None:
        self.real = not (fake := is_fake(optimizer)) and not is_skipped(optimizer)
        self.gradient_check.skipped += fake
        if not self.real:
            return
        self.adapters.check_attached()
        if self.schedules:
            unscale(optimizer)
        own = optimizer.param_groups[0][KEY]
        self.gradient_check.check_held(optimizer, own["total_steps"])
        if is_empty(optimizer):
            self.real = False
            self.gradient_check.check_empty(own["seen"])
            return
        self.gradient_check.check(own["seen"], own["step"])
        training = Training(optimizer, self.adapters, own)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        with in_full(optimizer):
            for schedule in self.schedules:
                schedule.before_step(own["schedules"][schedule.name], training)
        self.left_out.before(optimizer, own)

    @on_cpu
    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: StepArgs, kwargs: Own) -> None:
        if not self.real:
            return
        self.left_out.after(optimizer)
        own = optimizer.param_groups[0][KEY]
        training = Training(optimizer, self.adapters, own)
        with in_full(optimizer):
            for schedule in self.schedules:
                schedule.after_step(own["schedules"][schedule.name], training)
        own["rate"] = float(optimizer.param_groups[0]["lr"])
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        own["step"] += 1

    def read(self, optimizer: torch.optim.Optimizer) -> None:
        """Count every step that was left out so far."""
        self.left_out.read(optimizer.param_groups[0][KEY])

    # -- checkpoints

    def check_loaded(self, optimizer: torch.optim.Optimizer, state: Own) -> None:
        if not isinstance(state.get("state"), dict) or not state.get("param_groups"):
            raise ValueError(
                "this is no optimizer's state, which has `state` and `param_groups`; pass what"
                " `optimizer.state_dict()` returned"
            )
        own: Own = optimizer.param_groups[0][KEY]
        saved: Own | None = state["param_groups"][0].get(KEY)
        if saved is None:
            raise ValueError(
                "the optimizer's checkpoint has no state of Lorica: it was written by another"
                " optimizer. Resume with a checkpoint of this recipe, or start anew"
            )
        longer = 0 < saved["total_steps"] < own["total_steps"]
        if longer and self.fitted:
            raise ValueError(
                f"the checkpoint has total_steps {saved['total_steps']}, this run"
                f" {own['total_steps']}, and {self.fitted} is fitted to the length of the run;"
                " resume with the same total_steps, or start anew in another folder"
            )
        for name in ("version", "method", "seed", *(() if longer else ("total_steps",))):
            if saved[name] != own[name]:
                raise ValueError(
                    f"the checkpoint has {name} {saved[name]!r}, this run {own[name]!r}; resume"
                    f" with the same {name}, or start anew in another folder"
                )
        self._check_state(optimizer, state)

    def _check_state(self, optimizer: torch.optim.Optimizer, state: Own) -> None:
        """Every tensor is of the shape that the rule keeps for its parameter, and finite: torch
        would copy it as it is, and a later step would fail, or spoil the weights."""
        names = {id(t.parameter): t.name for t in self.adapters.trained()}
        mine, theirs = optimizer.param_groups, state["param_groups"]
        counts = [[len(g["params"]) for g in groups] for groups in (mine, theirs)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"the checkpoint's optimizer moves {sum(counts[1])} parameters in"
                f" {len(counts[1])} groups, this one {sum(counts[0])} in {len(counts[0])}: other"
                " layers trained, or at other rates. Attach and make the optimizer as it was then"
            )
        rule = self.adapters.recipe.rule
        ours = rule.keeps_state_of(optimizer)
        held: list[tuple[str, torch.Tensor]] = []
        for group, other in zip(mine, theirs, strict=True):
            for p, i in zip(group["params"], other["params"], strict=True):
                name = names.get(id(p), "a parameter")
                shapes: Mapping[str, tuple[int, ...]] = rule.state_shapes(group, p) if ours else {}
                entries: Own = state["state"].get(i, {})
                kept = {
                    key
                    for key, value in entries.items()
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                }
                if entries and (lost := sorted(shapes.keys() - kept)):
                    raise ValueError(
                        f"the optimizer's state of {name!r} has no numbers {', '.join(lost)}, which"
                        f" `{rule.text()}` keeps there: it was changed, or another optimizer's."
                        " Resume from a checkpoint of this recipe"
                    )
                for key, value in entries.items():
                    if not isinstance(value, torch.Tensor):
                        continue
                    if (shape := tuple(value.shape)) != shapes.get(key, shape):
                        raise ValueError(
                            f"the optimizer's state has {key!r} of shape {shape} for {name!r},"
                            f" which is {tuple(p.shape)} and needs {shapes[key]}: it is of another"
                            " rank, or of another model. Attach with the rank that was saved"
                        )
                    if value.is_floating_point():
                        held.append((f"{key!r} of {name!r}", value))
        if not held:
            return
        values = [value for _, value in held]
        norms = figures.local_norms(values, values[0].device, of=lambda value: value)
        if bad := [name for (name, _), x in zip(held, floats(norms), strict=True) if x - x != 0]:
            raise ValueError(
                f"the optimizer's state has values that are not finite in {bad[0]}"
                f" ({len(bad)} of {len(held)} tensors): it was saved after training had diverged,"
                " or it is damaged. Resume from an earlier checkpoint"
            )

    @on_cpu
    def loaded(self, optimizer: torch.optim.Optimizer) -> None:
        own = optimizer.param_groups[0][KEY]
        own["total_steps"] = self.total_steps  # a run may have been lengthened
        self.left_out.loaded(own)
        states = own.setdefault("schedules", {})
        training = Training(optimizer, self.adapters, own)
        for schedule in self.schedules:  # an empty state may have been dropped on the way
            schedule.restore(states.setdefault(schedule.name, {}), training)


@on_cpu
@clear_errors()
def bind(
    optimizer: torch.optim.Optimizer,
    adapters: Adapters,
    *,
    total_steps: int | None = None,
    seed: int = 0,
    curve: str = "",
) -> torch.optim.Optimizer:
    """Run the recipe's schedules and the check of gradients on `optimizer`.

    Args:
        optimizer: holds the parameters of `adapters`; made before or after sharding, bound before
        the first step.
        total_steps: the horizon, in optimizer steps, where a schedule needs it.
        seed: of the schedules' random draws, at least 0.
        curve: what of the caller's learning rate is fitted to `total_steps`: a checkpoint of a
            shorter run is then refused. Default: nothing is.

    Raises:
        ValueError: an argument is out of its range; the optimizer is bound already, or moves
            parameters by another rule than the recipe's; the model was made where torch computes
            no gradients; what a schedule refuses of the horizon.
    """
    recipe = adapters.recipe
    if total_steps is not None:
        say = "the run's optimizer steps, a whole number, at least 1, e.g. 1000; or leave it out"
        total_steps = whole_argument("total_steps", total_steps, say)
    seed = whole_argument("seed", seed, "a whole number, at least 0, e.g. 42", least=0)
    if KEY in optimizer.param_groups[0]:
        raise ValueError("this optimizer is bound already; make a new one with `lorica.optimizer`")
    if any(p.is_inference() for p in adapters.model.parameters()):
        raise ValueError(
            f"parameters of this {type(adapters.model).__name__} were made under"
            " `torch.inference_mode()`, and torch computes no gradients with them. Load the model"
            " and attach outside of it; `torch.no_grad()` does no harm"
        )
    if not recipe.rule.made(optimizer):
        raise ValueError(
            f"this {type(optimizer).__name__} does not move parameters by `{recipe.rule.name}`, the"
            f" rule of `{recipe.text()}`: make the optimizer with `lorica.optimizer(adapters,"
            " ...)`, or leave the rule out of the method"
        )
    schedules = [s.fit(total_steps) for s in recipe.schedules]
    sites = {t.site for t in adapters.trained()}
    optimizer.param_groups[0][KEY] = {
        "version": VERSION,
        "method": recipe.text(),
        "step": 0,
        "seed": seed,
        "total_steps": total_steps or 0,
        "rate": 0.0,  # what the last step was taken with, where a schedule changes it
        "seen": torch.zeros(len(sites), dtype=torch.bool),
        "left_out": LeftOut.state(),
        "schedules": {s.name: s.init(adapters) for s in schedules},
    }
    binding = _Binding(adapters, optimizer, schedules, curve)
    plans = {s.name: s.plan(total_steps) for s in schedules}
    if isinstance(recipe.rule, FitsHorizon):
        plans[recipe.rule.name] = recipe.rule.horizon(optimizer, total_steps)
    for name, plan in plans.items():
        if plan:
            logger.info("  %s: %s", name, plan)
    binding.loaded(optimizer)
    _bindings[optimizer] = binding
    return optimizer


_bindings: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Binding] = weakref.WeakKeyDictionary()


def is_bound(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `bind` was called with this very optimizer, and not with one that it wraps."""
    return optimizer in _bindings


def steps_left_out(optimizer: torch.optim.Optimizer) -> int:
    """How many steps this bound optimizer has left out so far; see `lorica.training.left_out`.
    Waits for the device.

    Raises:
        TooManyLeftOut: too many.
    """
    _bindings[optimizer].read(optimizer)
    own: Own = optimizer.param_groups[0][KEY]
    return own["left_out"]["steps"]


def seen_before_clipping(optimizer: torch.optim.Optimizer, look: Look) -> None:
    """A caller that clips has looked at the gradients of the step that comes, which then need not
    be looked at again."""
    _bindings[optimizer].left_out.given = look


def first_left_out(optimizer: torch.optim.Optimizer) -> Look | None:
    """Of the steps just left out, one after the other, the first."""
    return _bindings[optimizer].left_out.began


@clear_errors()
def optimizer(
    adapters: Adapters,
    lr: float | None = None,
    *,
    weight_decay: float = 0.0,
    modules_lr: float | None = None,
    total_steps: int | None = None,
    seed: int = 0,
    **options: Any,  # Any: of torch's optimizers, each its own
) -> torch.optim.Optimizer:
    """The recipe's rule over the recipe's groups, with its schedules bound: an ordinary torch
    optimizer.

    Args:
        lr: learning rate; default the method's own (see the summary).
        weight_decay: decoupled; spares vectors. Default 0, the Trainer's.
        modules_lr: rate of the modules that train in full beside the targets. Default: `lr`.
        total_steps: the horizon, where a schedule needs it.
        **options: of the rule's optimizer, e.g. `betas`, `eps`.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> adapters = lorica.attach(model, "lora", r=2, verbose=False)
        >>> lorica.optimizer(adapters).param_groups[0]["lr"]
        0.0002
    """
    if lr is None:
        default = adapters.recipe.learning_rate
        if default is None:
            raise ValueError(f"`{adapters.recipe.text()}` has no default rate; give `lr`")
        lr = float(default[0])
    made = adapters.recipe.rule.make(adapters.param_groups(lr, weight_decay, modules_lr), options)
    return bind(made, adapters, total_steps=total_steps, seed=seed)
