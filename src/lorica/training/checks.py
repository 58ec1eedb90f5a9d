"""Checks that training takes place: what was asked for happens, or the run stops.

Within ten steps (or in all of a shorter run) every adapter must have had a gradient, unless the
model did not call its layer, no token came by, or the loss does not use the output; such layers are
named. A layer that is computed past its adapter stops the second step. An adapter that is loaded
for use must change something.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lorica.model import unbound
from lorica.model.adapters import Adapters
from lorica.model.heads import head_names
from lorica.model.layer import AdaptedLinear
from lorica.model.targets import matches
from lorica.tensors.dtensor_ops import all_reduce_, read_full, reduce_scalar
from lorica.tensors.linalg import floats
from lorica.training.idle_experts import IdleExperts

WATCHED_STEPS = 10
logger = logging.getLogger("lorica")


@torch.no_grad()
def changes_nothing(adapters: Adapters) -> bool:
    """Whether the adapted model is the base, bit for bit in every effective weight and bias; ends
    at the first that differs. Updates that are no matrix count as a change."""
    for module in adapters.saved.values():
        old = dict(module.base.named_parameters())
        new = dict(module.copy.named_parameters())
        if any(not torch.equal(new[n], p.to(new[n].dtype)) for n, p in old.items() if n in new):
            return False
    for table in adapters.tables.values():
        old = read_full(table.base.get_parameter("weight"))[table.indices]
        if not torch.equal(old, read_full(table.rows).to(old.dtype)):
            return False
    if adapters.layers and "weight" not in adapters.recipe.given():
        return False
    for _, layer in adapters:
        weight, bias = layer.effective()
        base = layer.store.weight()
        if not torch.equal(read_full(weight), read_full(base).to(weight.dtype)):
            return False
        was = layer.store.bias()
        if (bias is None) != (was is None):
            return False
        if bias is not None and was is not None:
            if not torch.equal(read_full(bias), read_full(was).to(bias.dtype)):
                return False
    return not adapters.direct


def attached(model: nn.Module) -> Adapters | None:
    """The handle of an adapted model; None: it is plain."""
    try:
        return Adapters.of(model)
    except ValueError:
        return None


def loaded_for_use(adapters: Adapters) -> bool:
    """Whether they were loaded to be used as they are (`trainable=False`), and act: nothing of them
    trains, and they are not disabled. What still trains may be fresh and change nothing."""
    modules = [*adapters.layers.values(), *adapters.saved.values(), *adapters.tables.values()]
    trains = any(t.parameter.requires_grad for t in adapters.trained())
    return adapters.base_unchanged and not trains and not any(m.disabled for m in modules)


def check_effect(adapters: Adapters, where: str) -> None:
    """Of adapters loaded for use, that they change something.

    Args:
        adapters: others are let pass, see `loaded_for_use`.
        where: what is about to be made with them, for the message.

    Raises:
        ValueError: they change nothing.
    """
    if loaded_for_use(adapters) and changes_nothing(adapters):
        raise ValueError(no_effect(adapters, where))


def no_effect(adapters: Adapters, where: str) -> str:
    """What an adapter without effect is told."""
    return (
        f"the adapter `{adapters.recipe.text()}` ({len(adapters.layers)} layers,"
        f" {len(adapters.saved)} modules in full) changes no logit, so {where} would be that of the"
        " base alone: it was saved before its first step, or its values were lost. `lorica inspect"
        " FOLDER` shows the norm of each layer's update; train it, or load the right folder"
    )


class Use(IntEnum):
    """What became of a layer without a gradient; of several forwards the last in this order."""

    NOT_CALLED = 0  # an expert without a token may not be called; nor a tower without images
    READ_PAST = 1  # the model multiplied with its weight, or called what the adapter replaced
    NO_TOKEN = 2  # called with nothing
    NO_GRAPH = 3  # called where no gradient is computed
    UNUSED = 4  # its output has a graph, through which no gradient came
    ZERO = 5  # there is a gradient, and it is 0


_NAMED: Mapping[Use, str] = {
    Use.NOT_CALLED: (
        "%d adapted layer(s) were not called in the first %d steps, so nothing trains there so far:"
        " %s. Unless they wait for other examples (an expert, a tower without images), leave them"
        " out with `exclude_modules`"
    ),
    Use.NO_TOKEN: "no token reached %d adapted layer(s) in the first %d steps: %s",
    Use.UNUSED: (
        "the loss has no gradient for the output of %d adapted layer(s) in the first %d steps, so"
        " nothing trains there: %s. The model leaves the output unused, or detaches it; leave them"
        " out with `exclude_modules`"
    ),
}
_CAUSES: Mapping[Use, str] = {
    Use.NOT_CALLED: " Never called: %s; leave out with `exclude_modules` what the model needs not.",
    Use.READ_PAST: (
        " The model's code reads the weight past the layer, or calls the layer that the adapter"
        " replaced: %s; leave them out with `exclude_modules`."
    ),
    Use.UNUSED: (
        " The loss does not depend on the output of %s: the model leaves it unused, or detaches it;"
        " leave out with `exclude_modules` what the task does not use."
    ),
}


class _Reads(TorchFunctionMode):
    """Notes which of some weights functions compute with during a model's forwards. (To be asked
    for its dtype alone proves nothing.)

    Attributes:
        watched: ids of the weights.
        seen: those of them that were computed with.
        ran: whether any forward was looked at; those of a compiled model are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: set[int] = set()
        self.seen: set[int] = set()
        self.ran = False

    def watch(self, model: nn.Module, layer: AdaptedLinear) -> list[RemovableHandle]:
        """The hooks on the model, of the first layer alone."""
        first = not self.watched
        self.watched.add(id(layer.store.parameter))
        if not first:
            return []
        after = model.register_forward_hook(self._end, always_call=True)
        return [model.register_forward_pre_hook(self._begin), after]

    def _begin(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self.ran = True
            self.__enter__()

    def _end(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            leave: Callable[..., object] = cast(Any, self).__exit__
            leave(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: of whatever function
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not torch.compiler.is_compiling():
            for x in _each([*args, *cast("dict[str, Any]", kwargs or {}).values()]):
                if id(x) in self.watched:
                    self.seen.add(id(x))
        return result


def _each(given: Iterable[Any]) -> Iterator[Any]:  # Any: arguments of whatever function
    """Arguments, and what is in those that are lists (of tensors to stack)."""
    for x in given:
        yield x
        if isinstance(x, (list, tuple)):
            yield from cast("Iterable[Any]", x)


class GradientCheck:
    """Looks at gradients before each of the first steps; costs nothing once all were seen."""

    def __init__(self, adapters: Adapters) -> None:
        unbound.discard(adapters)
        self.adapters = adapters
        self.watched = WATCHED_STEPS
        self.uses: dict[str, Use] = {}  # of the layers without a gradient so far
        self.hooks: list[RemovableHandle] = []
        self.held = False
        self.skipped = 0  # steps that counted as none: at rate 0, without any gradient
        self.empty = 0  # steps in a row for which nothing had a gradient
        self.told: set[str] = set()  # frozen by the caller
        self.reads = _Reads()
        self.idle_experts = IdleExperts(adapters)

    def check_held(self, optimizer: torch.optim.Optimizer, total_steps: int | None) -> None:
        """The groups' parameters are the layers' own: after a `fully_shard` by hand, or under an
        engine that flattens parameters, they are not, and steps would move nothing."""
        if self.held:
            return
        # A run's first step alone does not tell an idle layer from one that no token reached.
        left = (total_steps or WATCHED_STEPS) - self.skipped
        self.watched = max(1 if self.skipped else 2, min(WATCHED_STEPS, left))
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
            ValueError: at the last watched step, some had none and should have one.
        """
        self.idle_experts.check(step, self.watched)
        if step >= self.watched or bool(seen.all()):
            self._stop_looking()
            return
        self.empty = 0
        units = self._units()
        sites, frozen = list(units), self._frozen(units)
        resting = {site for site, layer in self.adapters.layers.items() if layer.frozen_for_now}
        waiting = [i for i in range(len(sites)) if not bool(seen[i])]
        grads = [(i, p.grad) for i in waiting for p in units[sites[i]] if p.grad is not None]
        squares = reduce_scalar([g for _, g in grads])
        for (i, _), square in zip(grads, squares, strict=True):
            if square != 0:  # a non-finite gradient is one, too
                seen[i] = True
            elif self.uses.get(sites[i], Use.NOT_CALLED) >= Use.NO_GRAPH:
                self.uses[sites[i]] = Use.ZERO
        resting |= frozen
        missing = [sites[i] for i in waiting if not bool(seen[i]) and sites[i] not in resting]
        for site in missing:
            self._look(site)
        if past := {site: Use.READ_PAST for site in missing if self._is_read_past(site)}:
            self._refuse(past, step + 1)
        if missing and step == self.watched - 1:
            self._report(missing, [site for i, site in enumerate(sites) if bool(seen[i])])

    def check_empty(self, seen: Tensor) -> None:
        """Count a step for which nothing has a gradient, and which is none.

        Raises:
            ValueError: there were as many in a row as are watched, and some adapter never had one.
        """
        self.empty += 1
        if bool(seen.all()):
            return
        units = self._units()
        sites, frozen = list(units), self._frozen(units)
        resting = {site for site, layer in self.adapters.layers.items() if layer.frozen_for_now}
        learning = [site for i, site in enumerate(sites) if bool(seen[i])]
        missing = [site for site in sites if site not in {*learning, *frozen, *resting}]
        for site in missing:
            self._look(site)
        if missing and self.empty >= self.watched:
            self._report(missing, learning)

    def _units(self) -> dict[str, list[nn.Parameter]]:
        units: dict[str, list[nn.Parameter]] = {}
        for t in self.adapters.trained():
            units.setdefault(t.site, []).append(t.parameter)
        return units

    def _frozen(self, units: dict[str, list[nn.Parameter]]) -> set[str]:
        """Adapters that the caller froze, perhaps to unfreeze them later; each is logged once."""
        frozen = {s for s, group in units.items() if not any(p.requires_grad for p in group)}
        if new := [s for s in units if s in frozen - self.told]:
            logger.warning(
                "%d of %d adapters do not train for now, since their parameters have"
                " `requires_grad=False`: %s", len(new), len(units), ", ".join(new),
            )  # fmt: skip
        self.told |= frozen
        return frozen

    def _look(self, site: str) -> None:
        """From now on remember what becomes of this layer."""
        if site in self.uses:
            return
        self.uses[site] = Use.NOT_CALLED
        layer = self.adapters.layers.get(site)
        module = self.adapters.model.get_submodule(site if layer is None else layer.place)
        table = self.adapters.tables.get(site)
        if layer is not None:
            layer.weight_read = False
            if isinstance(module, AdaptedLinear):
                self.hooks += self.reads.watch(self.adapters.model, module)

        def note(called: nn.Module, args: tuple[Any, ...], y: Any) -> None:  # Any: of any module
            if not (called.training or torch.is_grad_enabled()):
                return  # an evaluation in between
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if called is not module:  # hooks are shared with the base, which the layer never calls
                use = Use.READ_PAST
            elif x is not None and not (x.numel() if table is None else table.reached(x)):
                use = Use.NO_TOKEN
            else:
                graph = isinstance(y, Tensor) and y.requires_grad
                use = Use.UNUSED if graph else Use.NO_GRAPH
            self.uses[site] = max(self.uses[site], use)

        self.hooks.append(module.register_forward_hook(note))

    def _stop_looking(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        self.reads = _Reads()
        for site in self.uses:
            if (layer := self.adapters.layers.get(site)) is not None:
                layer.weight_read = None

    def _is_read_past(self, site: str) -> bool:
        """Whether forwards since the first step have shown it: the layer was not called, and its
        weight was taken from it and computed with, or what it replaced was called."""
        layer = self.adapters.layers.get(site)
        if layer is None or self.uses[site] > Use.READ_PAST:
            return False
        taken = bool(layer.weight_read) and id(layer.store.parameter) in self.reads.seen
        return taken or self.uses[site] is Use.READ_PAST

    def _found(self, missing: list[str]) -> dict[str, Use]:
        """What became of these layers, on any process."""
        for site in missing:
            layer = self.adapters.layers.get(site)
            taken = layer is not None and bool(layer.weight_read)
            if self._is_read_past(site) or taken and not self.reads.ran:
                self.uses[site] = max(self.uses[site], Use.READ_PAST)
        found = torch.tensor([self.uses[s] for s in missing], dtype=torch.int32)
        if dist.is_initialized():  # an expert may have had its tokens on another process
            found = found.to(next(self.adapters.model.parameters()).device)
            all_reduce_(found, op=dist.ReduceOp.MAX)
        return {s: Use(int(use)) for s, use in zip(missing, floats(found), strict=True)}

    def _report(self, missing: list[str], learning: Collection[str]) -> None:
        found = self._found(missing)
        # Every token reaches a head; one that none reached is computed past its adapter.
        heads, asked = head_names(self.adapters.model), self._of_idle_names(missing, learning)
        groups: dict[Use, list[str]] = {}
        for site, use in found.items():
            must = site in heads or use is Use.UNUSED and site in asked
            if learning and use in _NAMED and not must:
                groups.setdefault(use, []).append(site)
        for use, sites in groups.items():
            logger.warning(_NAMED[use], len(sites), self.watched, ", ".join(sites))
        named = {site for sites in groups.values() for site in sites}
        if silent := {site: use for site, use in found.items() if site not in named}:
            self._refuse(silent, self.watched)

    def _of_idle_names(self, missing: list[str], learning: Collection[str]) -> list[str]:
        """Layers that a name in `target_modules` means of which none learns."""
        names = self.adapters.recipe.target_modules
        idle = [
            name
            for name in (() if isinstance(names, str) else names)
            if not any(matches(name, site) for site in learning)
        ]
        return [site for site in missing if any(matches(name, site) for name in idle)]

    def _refuse(self, silent: Mapping[str, Use], steps: int) -> None:
        told = ""
        for use, cause in _CAUSES.items():
            if sites := [site for site, u in silent.items() if u is use]:
                told += cause % ", ".join(sites)
        if any(use not in _CAUSES for use in silent.values()):
            told += (
                " Does the loss depend on these layers, and does gradient checkpointing keep"
                " gradients (use_reentrant=False, or model.enable_input_require_grads())?"
            )
        raise ValueError(
            f"{len(silent)} adapter(s) had no gradient in {steps} steps, so nothing there is"
            f" being trained: {', '.join(silent)}.{told}"
        )
