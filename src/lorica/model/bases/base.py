"""Bases: how the frozen weight of a layer is stored, and how to multiply with it.

A file here says which module classes it serves and presents each as W (out, in), whatever the
module's own layout.
"""

from __future__ import annotations

import abc
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn


class AbstractBase(abc.ABC):
    """A view of one module; holds the module, never its tensors (sharding replaces those)."""

    gives: ClassVar[frozenset[str]] = frozenset()
    lookup: bool = False
    padding: int | None = None  # the token id whose row does not train
    in_features: int
    out_features: int

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trained_bias: nn.Module | None = None  # where the layer trains a bias of its own

    @classmethod
    @abc.abstractmethod
    def serves(cls, module: nn.Module) -> bool:
        """Whether this file can present `module`."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this very module cannot be adapted though its class could, or None."""
        return None

    @property
    @abc.abstractmethod
    def parameter(self) -> nn.Parameter:
        """The stored weight in its own layout."""

    transposed: bool = False  # the stored weight is Wᵀ (in, out)

    @abc.abstractmethod
    def weight(self) -> Tensor:
        """W (out, in), a view where the storage allows."""

    @abc.abstractmethod
    def bias(self) -> Tensor | None:
        """b (out,)."""

    @abc.abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ."""

    @abc.abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""

    def finish(self, y: Tensor) -> Tensor:
        """What the module does with the product of its weight, adapted or not."""
        return y


@functools.cache
def all_bases() -> tuple[type[AbstractBase], ...]:
    """Every final class of the files of this package."""
    found: list[type[AbstractBase]] = []
    package = __name__.rpartition(".")[0]
    names = [info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)])]
    for name in names:
        module = importlib.import_module(f"{package}.{name}")
        found += [
            c
            for c in vars(module).values()
            if inspect.isclass(c)
            and issubclass(c, AbstractBase)
            and c.__module__ == module.__name__
        ]
    return tuple(c for c in found if not inspect.isabstract(c) and not c.__name__.startswith("_"))


def base_for(module: nn.Module) -> type[AbstractBase] | None:
    """The file that serves this module, or None."""
    return next((c for c in all_bases() if c.serves(module)), None)
