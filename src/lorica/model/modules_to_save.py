"""What trains in full beside low-rank updates: heads, `modules_to_save`, biases, or
everything."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from lorica.model import state
from lorica.model.layer import AdaptedLayer
from lorica.model.module_hooks import share_hooks
from lorica.model.targets import Targets
from lorica.recipe.recipe import Recipe
from lorica.tensors.modules import named_modules, named_parameters, unwrapped

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters


class TrainedModule(nn.Module):
    """A module that trains in full (a head, `modules_to_save`) beside its frozen original.

    Args:
        base: the original; stays as it is.
        dtype: of what trains; a float64 module keeps its own.
        only: names of the base's own parameters that train; None means all. The others are shared,
        not copied.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype, only: frozenset[str] | None = None):
        super().__init__()
        if any(p.dtype is torch.float64 for p in base.parameters()):
            dtype = torch.float64  # nothing is held narrower than it came
        shared = {
            id(p): p for n, p in base.named_parameters() if only is not None and n not in only
        }
        self.base = base
        self.copy = copy.deepcopy(base, dict(shared))
        for module, copied in zip(base.modules(), self.copy.modules(), strict=True):
            share_hooks(module, copied)  # a probe is the caller's object, not a copy of it
        share_hooks(nn.Module(), self.copy)
        share_hooks(base, self)  # instead of the copy
        for name, p in self.copy.named_parameters():
            if only is None or name in only:
                p.data = p.data.to(dtype)
        for b in self.copy.buffers() if only is None else ():
            b.data = _cast(b.data, dtype)
        self.only = only
        self.dtype = dtype
        self.disabled = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # Any: whatever the original takes
        if self.disabled:
            return self.base.forward(*args, **kwargs)
        own = next(self.base.parameters()).dtype
        if own == self.dtype:
            return self.copy(*args, **kwargs)
        if self.only is not None:  # the rest is shared with the base, so the few go to its dtype
            cast = {n: p.to(own) for n, p in self.copy.named_parameters() if n in self.only}
            return torch.func.functional_call(self.copy, cast, args, kwargs)
        return _cast(self.copy(*_cast(args, self.dtype), **_cast(kwargs, self.dtype)), own)

    def trained(self) -> list[tuple[str, nn.Parameter, str]]:
        role = "module" if self.only is None else "bias"
        return [
            (f"copy.{name}", p, role)
            for name, p in self.copy.named_parameters()
            if self.only is None or name in self.only
        ]

    def merged(self) -> nn.Module:
        """A plain module, in the original's dtypes, that computes what this one does."""
        for name in self.only or [n for n, _ in self.copy.named_parameters()]:
            p, original = self.copy.get_parameter(name), self.base.get_parameter(name)
            p.data = p.data.to(original.dtype)
            if self.only is not None:  # in place, for another module may share the parameter
                original.data = p.data
        for b, original in zip(self.copy.buffers(), self.base.buffers(), strict=True):
            b.data = b.data.to(original.dtype)
        share_hooks(self.base, self.copy)
        return self.copy if self.only is None else self.base

    def __getattr__(self, name: str) -> Any:  # Any: of the original
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base if self.disabled else self.copy, name)


def _cast(value: Any, dtype: torch.dtype) -> Any:  # Any: a model's inputs and outputs
    """Floating tensors in `dtype`, also within tuples, lists and mappings of the plain kinds and
    transformers' outputs; a cache stays the object that it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    kind: Callable[..., Any] = cast(Any, type(value))  # Any: the value is rebuilt as what it was
    if kind is tuple or kind is list:
        return kind(_cast(v, dtype) for v in cast(Sequence[Any], value))
    if kind is dict or isinstance(value, ModelOutput):
        items = cast(Mapping[str, Any], value).items()
        return kind(**{k: _cast(v, dtype) for k, v in items})
    return value


def bias_modules(
    model: nn.Module, recipe: Recipe, targets: Targets, dtype: torch.dtype
) -> dict[str, TrainedModule]:
    """With `bias="all"`: every other module that has a bias of its own."""
    if recipe.bias != "all":
        return {}
    out: dict[str, TrainedModule] = {}
    held: set[int] = set()
    modules: list[tuple[str, nn.Module]] = named_modules(model)
    for name, module in reversed(modules):  # a child before its parent
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        saved = any(name == s or name.startswith(s + ".") for s in targets.saved)
        if bias is not None and name and name not in targets.layers and not saved:
            if id(bias) not in held:
                out[name] = TrainedModule(module, dtype, frozenset({"bias"}))
        held.add(id(bias))  # a parent may own its child's bias as well, and does not use it then
    return dict(reversed(out.items()))


def train_in_place(
    model: nn.Module, adapters: Adapters, targets: Targets, dtype: torch.dtype, keep: bool
) -> None:
    """Parameters of the model train as they are, beside adapters or without: the targets' and those
    of modules to save, or all that no adapter stands for."""
    recipe = adapters.recipe
    roots = [*targets.layers, *targets.saved]
    stood_for = {id(p) for p in state.tensors(adapters).values()}
    whole = recipe.whole or recipe.train_rest
    chosen = {id(p) for r in roots for p in model.get_submodule(r).parameters()}
    names = [  # a shared parameter has one, which may lie outside of the module that was asked for
        n
        for n, p in named_parameters(model)
        if p.is_floating_point() and id(p) not in stood_for and (whole or id(p) in chosen)
    ]
    if keep:  # the others are held in `dtype`, too, so that one forward has one dtype
        written = stood_for | {id(model.get_parameter(n)) for n in names}
        adapters.originals = {
            n: p.data.clone()
            for n, p in state.base_parameters(adapters).items()
            if id(p) in written or (p.is_floating_point() and p.dtype != dtype)
        }
    for p in model.parameters():
        if p.is_floating_point() and p.dtype != torch.float64:
            p.data = p.data.to(dtype)
    roles: dict[int, str] = {}
    for name in targets.layers:
        layer = adapters.layers.get(name)
        owner = model.get_submodule(name) if layer is None else layer.store.module
        for leaf, p in owner.named_parameters(recurse=False):
            roles[id(p)] = leaf if leaf in ("weight", "bias") else "module"
    adapters.direct = {n: roles.get(id(model.get_parameter(n)), "module") for n in names}


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module where the one of that path stands, under all of its names."""
    names: dict[int, list[str]] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    places = {name: names[id(model.get_submodule(name))] for name in modules}
    for name, module in modules.items():
        for owner, _, leaf in (path.rpartition(".") for path in places[name]):
            parent = unwrapped(model.get_submodule(owner))
            setattr(parent.copy if isinstance(parent, TrainedModule) else parent, leaf, module)


def keep(adapters: Adapters, layers: Mapping[str, AdaptedLayer]) -> None:
    """Copies of the weights that training will write to, by their names in the plain model."""
    adapters.originals = {
        f"{name}.{leaf}": p.detach().clone()
        for name, layer in layers.items()
        for leaf, p in layer.store.module.named_parameters()
    }


def restore(adapters: Adapters) -> None:
    """Put the copies back, where there are any; the model is the plain one again."""
    parameters = dict(named_parameters(adapters.model))
    for name, original in (adapters.originals or {}).items():
        parameters[name].grad, parameters[name].data = None, original


@contextlib.contextmanager
def swapped(adapters: Adapters) -> Generator[None]:
    """Within, the kept copies stand in the model; by pointer, so a graph recorded before stays
    valid."""
    originals = adapters.originals or {}
    live = adapters.base_parameters() if originals else {}
    held = {name: live[name].data for name in originals}
    try:
        for name, original in originals.items():
            live[name].data = original
        yield
    finally:
        for name, data in held.items():
            live[name].data = data
