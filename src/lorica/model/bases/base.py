"""Bases: how the frozen weight of a layer is stored, and how to multiply with it.

A file here says which modules it serves, by what their weight is, and presents each as W (out, in),
whatever the storage. The values of W and what is stored are two things: a quantised weight is
packed integers and the scales to read them by, and W is made of them for one layer at a time.
"""

from __future__ import annotations

import abc
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class AbstractBase(abc.ABC):
    """A view of one module; holds the module, never its tensors (sharding replaces those)."""

    gives: ClassVar[frozenset[str]] = frozenset()
    dense: bool = True  # what is stored are W's values, so `parameter` is W or Wᵀ
    lookup: bool = False
    padding: int | None = None  # the token id whose row does not train
    experts: int = 0  # matrices in a stack (E, out, in), of which W is one; 0: a single matrix
    in_features: int
    out_features: int

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trained_bias: nn.Module | None = None  # where the layer trains a bias of its own

    @classmethod
    def at(cls, model: nn.Module, path: str) -> Self:
        """The view of what has this path in a model."""
        return cls(model.get_submodule(path))

    @classmethod
    def place(cls, path: str) -> str:
        """Path of the module that holds what has this path."""
        return path

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
        """What is stored, in its own layout; packed where the weight is quantised."""

    transposed: bool = False  # the stored weight is Wᵀ (in, out)

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Of W's values."""
        return self.parameter.dtype

    def stored(self) -> Mapping[str, Tensor]:
        """{name within the module: tensor} of all that W's values are made of."""
        return {"weight": self.parameter}

    @abc.abstractmethod
    def weight(self) -> Tensor:
        """W (out, in), a view where the storage allows, otherwise new."""

    @abc.abstractmethod
    def bias(self) -> Tensor | None:
        """b (out,)."""

    def published_bias(self) -> Tensor | None:
        """The module's own b (out,), whatever trains in its place."""
        return cast("Tensor | None", self.module.bias)

    def prepare(self) -> None:  # noqa: B027
        """Called before the model's first adapted forward, also where no adapter is beside this
        weight: rule out what its module would do to it by itself."""

    @abc.abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ."""

    @abc.abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""

    def finish(self, y: Tensor) -> Tensor:
        """What the module does with the product of its weight, adapted or not."""
        return y

    @abc.abstractmethod
    def replaced(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """A plain module with this weight (out, in) and bias (out,) instead.

        Args:
            bias: None: the module's own.
            dtype: of the new weight where this base has none to keep.
        """


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def own_weight(module: nn.Module) -> object:
    """The module's `weight`; None where it has none, as where a packed form took its place."""
    try:
        return module.weight
    except AttributeError:
        return None


def is_dense(weight: object) -> bool:
    """Whether a tensor holds values that torch's own products read, not a packed form of them."""
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
        return False
    return type(weight.data).dequantize is Tensor.dequantize  # quantised tensors have their own


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
