"""Walks over a model's modules and parameters, past torch's wrappers; train and eval modes; hooks
on loading."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from torch import nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

M = TypeVar("M", bound=nn.Module)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Within, every module is in evaluation mode; afterwards each has the mode it had before.

    Example:
        >>> import torch
        >>> from lorica.tensors.modules import evaluating
        >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
        >>> with evaluating(model):
        ...     [m.training for m in model]
        [False, False]
        >>> [m.training for m in model]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call_before_loading(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call `hook(module, state, prefix, ...)` before each `load_state_dict` that reaches the
    module.

    Args:
        hook: a function of a module's top level, so that the model can still be pickled.
    """
    module.register_load_state_dict_pre_hook(hook)  # pyright: ignore[reportUnknownMemberType]  # torch has no type for it


def call_after_loading(module: M, hook: Callable[[M, object], None]) -> None:
    """Call `hook(module, keys)` after each `load_state_dict` that reaches the module.

    Args:
        hook: a function of a module's top level, so that the model can still be pickled.
    """
    module.register_load_state_dict_post_hook(hook)  # pyright: ignore[reportUnknownMemberType]  # torch has no type for it


# Attributes in which torch's wrappers that change nothing but how a module runs (compiled, with its
# activations recomputed or offloaded) hold the module itself. They pass on its other attributes, so
# `get_submodule` finds everything without these parts of a path.
_HOLDERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


_WRAPPERS: tuple[type[nn.Module], ...] = (OptimizedModule, ActivationWrapper)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, of one that `torch.compile` or torch's `checkpoint_wrapper` wraps.

    Example:
        >>> import torch
        >>> from lorica.tensors.modules import unwrapped
        >>> layer = torch.nn.Linear(2, 2)
        >>> compiled = torch.compile(layer, backend="eager")
        >>> unwrapped(compiled) is layer, unwrapped(layer) is layer
        (True, True)
    """
    while isinstance(module, _WRAPPERS):
        module = next(module.children())
    return module


def plain_path(path: str) -> str:
    """A path without the parts that such wrappers add.

    Example:
        >>> from lorica.tensors.modules import plain_path
        >>> plain_path("layers.0._orig_mod.mlp.weight")
        'layers.0.mlp.weight'
    """
    return ".".join(part for part in path.split(".") if part not in _HOLDERS)


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, nn.Module]]:
    """(path, module) of a model and all within it, a parent before its children; wrappers as in
    `unwrapped` are left out, of the paths too.

    Args:
        remove_duplicate: a module with several names is listed once, under the first.
    """
    walk: Callable[..., Iterator[tuple[str, nn.Module]]] = model.named_modules
    found: list[tuple[str, nn.Module]] = [*walk(remove_duplicate=remove_duplicate)]
    return [(plain_path(n), m) for n, m in found if unwrapped(m) is m]


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, nn.Parameter]]:
    """(path, parameter) of a model, with paths as in `named_modules`."""
    walk: Callable[..., Iterator[tuple[str, nn.Parameter]]] = model.named_parameters
    return [(plain_path(n), p) for n, p in walk(remove_duplicate=remove_duplicate)]


def refuse_meta(model: nn.Module, what: str) -> None:
    """Refuse a model without values. Weights that Accelerate offloads pass: they are on the meta
    device between two forwards.

    Args:
        what: what was to be done, e.g. "save".

    Raises:
        ValueError: naming the first parameter on the meta device.
    """
    for path, module in named_modules(model):
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta and "_hf_hook" not in vars(module):
                full = f"{path}.{name}" if path else name
                raise ValueError(
                    f"cannot {what} this {type(model).__name__}: {full} is on the meta device,"
                    " where a tensor has a shape and no values. Load the weights first"
                    " (`from_pretrained` outside of `torch.device('meta')`, or `to_empty` and"
                    " `load_state_dict`)"
                )
