"""Weights quantised by optimum-quanto: `QLinear`, a kind of `nn.Linear` whose frozen weight is a
tensor subclass with `dequantize()` (int8, float8, int4, int2).

Written against 0.2.7. int4 and int2 are unpacked by an extension that quanto compiles when they
are first used; they were not tried. A layer that rounds activations too is refused: its scales
would go on being calibrated. The package is never imported here.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lorica.model.bases._quantised import TensorSubclass, is_subclass


class Quanto(TensorSubclass):
    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        modules: dict[str, Any] = sys.modules  # Any: quanto has no types
        quanto = modules.get("optimum.quanto")
        return quanto is not None and isinstance(module, quanto.nn.QLinear)

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Linear)
        if not is_subclass(module.weight):
            return (
                "its weight is quantised anew at every call; freeze the model first, with"
                " `optimum.quanto.freeze(model)`"
            )
        if vars(module).get("activation_qtype") is not None:
            return "it rounds activations as well; quantise the weights only"
        return None

    @property
    def format(self) -> str:
        return f"{self.parts.qtype.name} (quanto)"
