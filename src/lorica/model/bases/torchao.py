"""Weights that torchao quantised in place, weight only: the module is an `nn.Linear` still, and its
weight is a tensor subclass with `dequantize()` (int8, float8 and intx of torchao 0.18).

Formats that also round activations are refused: their products have no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.model.bases._quantised import Quantised


class TensorSubclass(Quantised):
    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        if type(module) is not nn.Linear:
            return False
        held = type(module.weight.data)
        return held.dequantize is not Tensor.dequantize

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
        weight: Any = self.parameter
        _, context = weight.__tensor_flatten__()
        narrow = context.get("target_dtype") or weight.qdata.dtype
        return f"{str(narrow).removeprefix('torch.')} (torchao)"

    def stored(self) -> Mapping[str, Tensor]:
        weight: Any = self.parameter
        names, _ = weight.__tensor_flatten__()
        return {f"weight.{n}": getattr(weight, n) for n in names}

    def weight(self) -> Tensor:
        return self.parameter.detach().dequantize()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.parameter
        inner: torch.dtype = weight.dtype
        bias = None if bias is None else bias.to(inner)
        return F.linear(x.to(inner), weight, bias).to(x.dtype)
