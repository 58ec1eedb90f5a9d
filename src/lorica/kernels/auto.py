"""The order with the fewest multiplies for the call's actual shapes.

The factors' order costs Nr(m + n) beside the frozen product, the materialised one mnr: the latter
from N > mn/(m + n) tokens on, whatever the rank. Not in half precision, where W + ΔW would lose
small updates to rounding, and not with dropout on the update, where no one weight exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.kernels import AbstractKernel
from lorica.kernels.materialised import Materialised
from lorica.kernels.reference import Reference

_FACTORS, _SUM = Reference(), Materialised()
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Auto(AbstractKernel):
    """Chooses per call by arithmetic.

    Example:
        >>> from lorica.kernels.auto import Auto
        >>> Auto().threshold(512, 512)
        257
    """

    def product(self, x: Tensor, base, update, *, bias: bool) -> Tensor:
        return self.choose(x, base, update).product(x, base, update, bias=bias)

    def choose(self, x: Tensor, base, update) -> AbstractKernel:
        if base.lookup or update.dropping or x.dtype not in _WIDE:
            return _FACTORS
        if torch.is_autocast_enabled(x.device.type):
            return _FACTORS
        tokens = x.numel() // max(x.shape[-1], 1)
        return _SUM if tokens >= self.threshold(base.in_features, base.out_features) else _FACTORS

    def threshold(self, in_features: int, out_features: int) -> int:
        return in_features * out_features // (in_features + out_features) + 1
