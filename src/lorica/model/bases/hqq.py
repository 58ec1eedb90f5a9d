"""Weights quantised by HQQ: `HQQLinear` packs W into `W_q` and keeps scales, zeros and how they are
packed in `meta` (Badri and Shaji, Half-Quadratic Quantization, 2023).

Written against 0.2.8, whose own product on a CPU makes W and multiplies with it. transformers 5.23
doesn't load this format, HQQ's own `AutoHQQHFModel` does. The package is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.model.bases._quantised import Quantised


class Hqq(Quantised):
    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        modules: dict[str, Any] = sys.modules  # Any: HQQ has no types
        quantize = modules.get("hqq.core.quantize")
        return quantize is not None and isinstance(module, quantize.HQQLinear)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        if not vars(module)["ready"]:
            return "its weight isn't packed yet; move the model to its device first"
        return None

    @property
    def _packed(self) -> Any:  # Any: as above
        return self.module

    @property
    def parameter(self) -> nn.Parameter:
        return self._packed.W_q

    @property
    def dtype(self) -> torch.dtype:
        return self._packed.compute_dtype

    @property
    def format(self) -> str:
        meta = self._packed.meta
        return f"hqq, {meta['nbits']} bits in groups of {meta['group_size']}"

    def stored(self) -> Mapping[str, Tensor]:
        meta: dict[str, Any] = self._packed.meta
        held = {f"meta.{n}": v for n, v in meta.items() if isinstance(v, Tensor)}
        return {"W_q": self.parameter.data, **held}

    def weight(self) -> Tensor:
        return self._packed.dequantize().detach()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        inner = self.dtype
        bias = None if bias is None else bias.to(inner)
        return F.linear(x.to(inner), self.weight(), bias).to(x.dtype)
