"""Weights that torchao quantised in place, weight only: the module is an `nn.Linear` still, and its
weight is a tensor subclass with `dequantize()` (int8, float8 and intx of torchao 0.18).

Formats that also round activations are refused: their products have no gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.model.bases._quantised import TensorSubclass, is_subclass
from lorica.model.bases.base import own_weight


class Torchao(TensorSubclass):
    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        return type(module) is nn.Linear and is_subclass(own_weight(module))

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Linear)
        weight: Any = module.weight
        try:
            _, context = weight.__tensor_flatten__()
        except AttributeError:
            return f"its weight is a {type(weight).__name__}, whose parts cannot be read"
        rounds = [n for n in ("act_quant_kwargs", "activation_quantization") if context.get(n)]
        if rounds:
            return (
                f"its weight ({type(weight).__name__}) rounds activations as well, and such"
                " products have no gradient; quantise the weights only"
            )
        return None

    @property
    def format(self) -> str:
        _, context = self.parts.__tensor_flatten__()
        narrow = context.get("target_dtype") or self.parts.qdata.dtype
        return f"{str(narrow).removeprefix('torch.')} (torchao)"
