"""A schedule of the tests' own: exchange vectors of both factors, and slow the step after that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorica.methods.schedules.base import AbstractSchedule
from lorica.tensors.dtensor_ops import draw
from lorica.training.weight_edits import swap_


@dataclass(frozen=True, kw_only=True)
class SwapOften(AbstractSchedule):
    """Exchange two vectors a layer every `every` steps; half the rate in the next step."""

    every: int = 3
    needs: ClassVar[frozenset[str]] = frozenset({"pair", "writable_base"})
    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    edits: ClassVar[frozenset[str]] = frozenset({"base", "pair"})

    def init(self, adapters: Any) -> dict[str, Any]:
        return {"swapped": torch.zeros(len(adapters), dtype=torch.int64)}

    def before_step(self, state: dict[str, Any], training: Any) -> None:
        if training.step and training.step % self.every == 0:
            training.lr_scale(0.5)

    def after_step(self, state: dict[str, Any], training: Any) -> None:
        if (training.step + 1) % self.every:
            return
        for i, (name, layer) in enumerate(training.adapters):
            generator = training.generator(name)
            pair = layer.update.delta.pair()
            for side, width in (("A", pair.A.shape[1]), ("B", pair.B.shape[0])):
                rows = draw((2, width), generator, bound=0.1)
                swap_(layer, training.optimizer, side, [0, 2], rows)
            state["swapped"][i] += 2
