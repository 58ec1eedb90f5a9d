"""Walks over a model's modules, their train and eval modes, and hooks on loading, with types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from torch import nn

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


def call_after_loading(module: M, hook: Callable[[M, object], None]) -> None:
    """Call `hook(module, keys)` after each `load_state_dict` that reaches the module.

    Args:
        hook: a function of a module's top level, so that the model can still be pickled.
    """
    module.register_load_state_dict_post_hook(hook)  # pyright: ignore[reportUnknownMemberType]  # torch has no type for it


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, nn.Module]]:
    """(path, module) of a model and all within it, a parent before its children.

    Args:
        remove_duplicate: a module with several names is listed once, under the first.
    """
    walk: Callable[..., Iterator[tuple[str, nn.Module]]] = model.named_modules
    return [*walk(remove_duplicate=remove_duplicate)]
