"""What all quantised weights have in common.

W is made of what is stored, for one layer at a time, wherever its values are needed: norms, starts,
the gradient of x, merges. The product x Wᵀ in forward is the format's own kernel. Nothing writes to
a packed weight, so such a base stays as published.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.model.bases.base import AbstractBase


class Quantised(AbstractBase):
    gives: ClassVar[frozenset[str]] = frozenset({"base_unchanged", "base", "separate"})
    dense = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        sizes = vars(module)  # of an `nn.Linear`, or of what has the names of its fields
        self.in_features, self.out_features = sizes["in_features"], sizes["out_features"]

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    @abc.abstractmethod
    def format(self) -> str:
        """As users know it, e.g. `nf4`."""

    def flaw(self) -> str | None:
        """Why the module can't compute without Lorica, or None."""
        return None

    def bias(self) -> Tensor | None:
        owner = self.module if self.trained_bias is None else self.trained_bias
        return owner.bias  # type: ignore[return-value]

    @abc.abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b by the format's own kernel, in x's dtype."""

    def product(self, x: Tensor) -> Tensor:
        return self.multiply(x, None)

    def linear(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias())

    def replaced(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        own: Tensor | None = self.module.bias  # type: ignore[assignment]
        bias = own if bias is None else bias
        plain = nn.Linear(
            self.in_features, self.out_features, bias=bias is not None, device="meta"
        ).train(self.module.training)
        plain.weight = nn.Parameter(weight.detach().to(dtype).contiguous())
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype).clone())
        return plain


class TensorSubclass(Quantised):
    """A weight that is a tensor subclass with `dequantize()`, multiplied by torch's own functions,
    which the subclass overrides."""

    @property
    def parts(self) -> Any:  # Any: each package's own class
        return self.parameter

    def stored(self) -> Mapping[str, Tensor]:
        return dict(_plain("weight", self.parts))

    def weight(self) -> Tensor:
        return self.parameter.detach().dequantize()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.parameter
        inner: torch.dtype = weight.dtype
        bias = None if bias is None else bias.to(inner)
        return F.linear(x.to(inner), weight, bias).to(x.dtype)


def is_subclass(weight: object) -> bool:
    return isinstance(weight, Tensor) and type(weight.data).dequantize is not Tensor.dequantize


def _plain(name: str, held: Any) -> Iterator[tuple[str, Tensor]]:  # Any: as above
    """The plain tensors that a subclass consists of, which may be of subclasses in turn."""
    if type(held.data) is Tensor:
        yield name, held
        return
    names, _ = held.__tensor_flatten__()
    for inner in names:
        yield from _plain(f"{name}.{inner}", getattr(held, inner))
