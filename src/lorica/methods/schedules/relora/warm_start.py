"""A full-rank warm start: the targets' weights train, and adapters are frozen for now."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.interfaces import TrainingLike
from lorica.methods.optional import FreezesLayers, TrainsBase
from lorica.methods.schedules.base import AbstractSchedule, State
from lorica.tensors.dtensor_ops import forget_state, reset_state


@dataclass(frozen=True, kw_only=True)
class WarmStart(AbstractSchedule, TrainsBase, FreezesLayers):
    """A base class to name before the schedule's own; its `init` adds `"warming": trains_base` to
    the state. What trains beside an update (a magnitude, a bias) does so from the first step on."""

    warm_start: int = 0

    @property
    def trains_base(self) -> bool:
        return self.warm_start > 0

    @property
    def freezes_layers(self) -> bool:
        return self.trains_base

    def restore(self, state: State, training: TrainingLike) -> None:
        super().restore(state, training)
        if self.trains_base:
            training.set_trainable(() if state["warming"] else None, base=state["warming"])

    def ends_warm(self, state: State, training: TrainingLike) -> bool:
        """Whether the warm start ends with this step; then the adapters train from here on, with a
        fresh optimizer. The caller then starts them anew on the present weights."""
        if not state["warming"] or training.step + 1 != self.warm_start:
            return False
        adapters, optimizer = training.adapters, training.optimizer
        reset_state(optimizer, *(t.parameter for t in adapters.trained()))
        forget_state(optimizer, *(layer.store.parameter for _, layer in adapters))
        state["warming"] = False
        self.restore(state, training)
        return True
