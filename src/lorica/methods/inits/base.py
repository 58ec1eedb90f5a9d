"""Inits: how A and B are filled at the start.

`fill` writes the start into a pair. It is pure, and deterministic for a given generator. A method
that does not give `zero_start` leaves ΔW₀ ≠ 0; the layer then keeps −ΔW₀ as frozen factors, so the
base is never written to and attaching keeps the model's function. The suite checks every file for
that.

To add one: copy `gaussian.py` (ΔW = 0 at the start), `olora.py` (with frozen factors) or, for a
start that is made from a few batches, `loraga.py`.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.interfaces import Pair
from lorica.methods.choice import Choice
from lorica.tensors.dtensor_ops import copy_


@dataclass(frozen=True, kw_only=True)
class AbstractInit(Choice, abc.ABC):
    axis: ClassVar[str] = "inits"
    experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"pair"})
    reads_weight: ClassVar[bool] = False  # False: `fill` gets a weight on the meta device
    # The value of PEFT's `init_lora_weights` with which it subtracts the same start from the base.
    peft_frozen_start: ClassVar[str | None] = None

    @abc.abstractmethod
    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        """Write the start into `pair.A` (r, in) and `pair.B` (out, r).

        Args:
            weight: the present weight (out, in), in at least float32; on the meta device unless the
                file declares `reads_weight`, so that an unread weight is not gathered.
            pair: see `lorica.interfaces.Pair`.
            generator: on the CPU, seeded by the recipe's seed and the layer's name.
        """


@torch.no_grad()
def fill_(pair: Pair, init: AbstractInit, weight: Tensor, generator: torch.Generator) -> None:
    """Apply an init to a pair, plain or sharded: filled full-size, then cut."""
    full = dataclasses.replace(pair, A=_like(pair.A), B=_like(pair.B))
    init.fill(weight, full, generator)
    copy_(pair.A, full.A)
    copy_(pair.B, full.B)


def _like(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device))
