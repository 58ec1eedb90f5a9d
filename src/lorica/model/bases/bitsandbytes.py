"""Weights quantised by bitsandbytes: 4 bits (nf4, fp4, with or without double quantisation) and
int8.

`Linear4bit` packs W into bytes and keeps the scales in `weight.quant_state` (Dettmers et al.,
QLoRA, arXiv 2305.14314, 2023). `Linear8bitLt` keeps int8 and one scale per output row (Dettmers et
al., LLM.int8(), arXiv 2208.07339, 2022); its product rounds x to int8, too, in evaluation or on a
GPU, so there the product differs from x times W's values by that rounding, and the gradient is that
of W's values.

Written against 0.50. The package is never imported here: a model has such layers only where
somebody else did.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.model.bases._quantised import Quantised


def _package() -> Any:  # Any: bitsandbytes has no types
    modules: dict[str, Any] = sys.modules
    return modules.get("bitsandbytes")


class FourBit(Quantised):
    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        bnb = _package()
        return bnb is not None and isinstance(module, bnb.nn.Linear4bit)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        held: list[Any] = [vars(module.weight).get("quant_state"), vars(module).get("quant_state")]
        if held == [None, None]:
            return "its weight isn't packed to 4 bits yet; move the model to its device first"
        return None

    def prepare(self) -> None:
        # Evaluation would repack the weight for a kernel that has no gradient and leave it so: the
        # next training step would train nothing below this layer. It also fails at some widths.
        self._state()
        self.module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    def _state(self) -> Any:  # Any: bitsandbytes' QuantState
        """The scales; a weight that evaluation has repacked is packed as published again."""
        bnb = _package()
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self.module)
        weight = self._weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            inverse = bnb.functional._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = inverse(weight.data, weight.quant_state)
            self.module.quant_state = weight.quant_state  # type: ignore[assignment]
        return weight.quant_state

    @property
    def _weight(self) -> Any:  # Any: bitsandbytes' Params4bit
        return self.module.weight

    @property
    def format(self) -> str:
        state = self._state()
        return state.quant_type + (" with double quantisation" if state.nested else "")

    @property
    def dtype(self) -> torch.dtype:
        return self._state().dtype

    def flaw(self) -> str | None:
        block = self._state().blocksize
        if self.device.type != "cpu" or self.in_features % block == 0:
            return None
        return (
            f"it has {self.in_features} inputs, and on a CPU bitsandbytes multiplies with 4-bit"
            f" weights whose inputs are a multiple of {block} only"
        )

    def stored(self) -> Mapping[str, Tensor]:
        parts: dict[str, Tensor] = self._state().as_dict(packed=True)
        return {"weight": self._weight.data, **{f"weight.{n}": t for n, t in parts.items()}}

    def weight(self) -> Tensor:
        state = self._state()
        return _package().functional.dequantize_4bit(self._weight.data, state)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        state, module = self._state(), self.module
        if not module.compute_type_is_set:
            module.set_compute_type(x)  # type: ignore[operator]
            module.compute_type_is_set = True  # type: ignore[assignment]
        inner: Any = module.compute_dtype or x.dtype
        bias = None if bias is None else bias.to(inner)
        if self.flaw() is not None:
            return F.linear(x.to(inner), self.weight().to(inner), bias).to(x.dtype)
        y = _package().matmul_4bit(x.to(inner), self._weight, bias=bias, quant_state=state)
        return y.to(x.dtype)


class EightBit(Quantised):
    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        bnb = _package()
        return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return (
                "it quantises its weight anew at every call (`has_fp16_weights=True`), so there is"
                " no frozen int8 weight"
            )
        return None

    @property
    def format(self) -> str:
        return "int8 (bitsandbytes)"

    def _parts(self) -> tuple[Tensor, Tensor]:
        """The integers (out, in) and the largest value of each row (out,), which 127 means."""
        weight: Any = self.module.weight
        state: Any = self.module.state
        integers = weight.CB if state.CB is None else state.CB
        largest = weight.SCB if state.SCB is None else state.SCB
        return weight.data if integers is None else integers, largest

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # of the rows' scales

    def stored(self) -> Mapping[str, Tensor]:
        integers, largest = self._parts()
        return {"weight": integers, "SCB": largest}

    def weight(self) -> Tensor:
        integers, largest = self._parts()
        return integers.to(torch.float32).mul_(largest.float()[:, None] / 127)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self.module
        module.state.is_training = module.training
        if module.weight.CB is not None:
            module.init_8bit_state()
        bias = None if bias is None else bias.to(x.dtype)
        return _package().matmul(x, module.weight, bias=bias, state=module.state)
