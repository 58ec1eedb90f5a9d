"""Expert tensors: one parameter (E, out, in), or (E, in, out), that holds a weight for each expert.

transformers fuses the experts of a layer into two or three such parameters of one module, which
multiplies with them itself. There is no module for each tensor, so a base is made of the module and
the parameter's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from lorica.model.bases.base import AbstractBase, is_dense


class ExpertTensor(AbstractBase):
    """One weight (out, in) for each of E experts."""

    gives: ClassVar[frozenset[str]] = frozenset({"base_unchanged", "base", "separate"})

    def __init__(self, module: nn.Module, leaf: str) -> None:
        super().__init__(module)
        self.leaf = leaf
        self.transposed = stored_transposed(module)
        self.experts, rows, columns = self.parameter.shape
        wide, tall = (rows, columns) if self.transposed else (columns, rows)
        self.in_features, self.out_features = wide, tall

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        return False  # a parameter is adapted, no module

    @classmethod
    def at(cls, model: nn.Module, path: str) -> ExpertTensor:
        owner, _, leaf = path.rpartition(".")
        return cls(model.get_submodule(owner), leaf)

    @classmethod
    def place(cls, path: str) -> str:
        return path.rpartition(".")[0]

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.leaf)

    def stored(self) -> Mapping[str, Tensor]:
        return {self.leaf: self.parameter}

    def weight(self) -> Tensor:
        """W (E, out, in)."""
        return self.parameter.mT if self.transposed else self.parameter

    def bias(self) -> None:
        """The module adds the experts' biases itself."""
        return None

    def product(self, x: Tensor) -> Tensor:
        raise AssertionError("the module itself multiplies with its expert tensors")

    linear = product

    def replaced(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        value = (weight.mT if self.transposed else weight).detach()
        own = nn.Parameter(value.to(self.dtype).contiguous())
        self.module.register_parameter(self.leaf, own)
        return self.module


def expert_tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module that hold a weight for each of several experts.

    transformers marks the classes whose products it takes over; others say how many experts they
    have, or hold several stacks of as many.
    """
    if isinstance(module, _ConvNd):
        return ()
    own = module.named_parameters(recurse=False)
    stacks = {n: p for n, p in own if p.ndim == 3 and p.shape[0] > 1 and is_dense(p)}
    told = {"is_transposed", "num_experts"} & vars(module).keys()
    alike = len(stacks) > 1 and len({p.shape[0] for p in stacks.values()}) == 1
    return tuple(stacks) if told or alike else ()


def expert_paths(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the expert tensors of all these modules."""
    return [f"{n}.{leaf}" for n, m in modules.items() for leaf in expert_tensors(m)]


def stored_transposed(module: nn.Module) -> bool:
    """Whether the module's expert tensors are (E, in, out): as transformers says it, else as the
    first tensor's output fits the last one's input."""
    told: bool | None = vars(module).get("is_transposed")
    if told is not None:
        return told
    shapes = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3]
    if len(shapes) < 2:
        return False
    first, last = shapes[0], shapes[-1]
    return first[1] == last[2] and first[2] != last[1]
