"""Restarts: after each `every` steps the update is merged, and a fresh adapter with fresh optimizer
state trains from there.

    link i trains (Aᵢ, Bᵢ) on W₀ + Σ_{j<i} sBⱼAⱼ;  at its end sBᵢAᵢ is added to W, or to the frozen
    factors beside it, and B = 0

The event comes after the step (never between backward and step), and not after the last one: the
adapter that is saved is the last link. Links are drawn from (seed, step, layer), the same on every
process. Shared by the schedules that restart; no method by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch.distributed.tensor import DTensor

from lorica.interfaces import AdaptersLike, TrainingLike
from lorica.methods.fields import one_of, whole
from lorica.methods.schedules.base import AbstractSchedule, State, is_last, is_over

if TYPE_CHECKING:
    from typing_extensions import Self

CONTINUED = "continued"


def curve(name: str, part: float) -> float:
    """Factor of the rate when `part` of a link, in [0, 1], is over."""
    return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[name]


@dataclass(frozen=True, kw_only=True)
class Restarts(AbstractSchedule):
    every: int | None = None

    links: ClassVar[int]  # how many restarts a run has where `every` is left out
    warm_start: ClassVar[int] = 0  # steps before the first link, of those that have it; see `_warm`

    needs: ClassVar[frozenset[str]] = frozenset(
        {"wrapped", "weight", "factors", "separate", "restarts"}
    )
    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function"})
    edits: ClassVar[frozenset[str]] = frozenset({"base", "pair"})

    def __post_init__(self) -> None:
        say = "whole optimizer steps, at least 1, e.g. 1000; left out, it is fitted to the run"
        whole(self, "every", optional=True, say=say)

    def write_base(self) -> None:
        """Declare that the base is written to, and no frozen factors are kept."""
        object.__setattr__(self, "needs", self.needs - {"factors"} | {"writable_base"})
        object.__setattr__(self, "withdraws", self.withdraws | {"base_unchanged"})

    # -- when

    def fit(self, total_steps: int | None) -> Self:
        if self.every is None:
            if total_steps is None:
                raise ValueError(
                    f"`{self.name}`: without `total_steps` the interval cannot be fitted; give it"
                    f" to `lorica.optimizer`, or type `{self.name}(every=...)`"
                )
            every = self._fitted(total_steps)
            if every < 1:
                raise ValueError(
                    f"`{self.name}`: {total_steps} steps are too few for two restarts;"
                    f" {self._what_to_type(total_steps, 2)}"
                )
            return dataclasses.replace(self, every=every)
        if total_steps is not None and self.events(total_steps) < 1:
            spare = self._spare(total_steps)
            remedy = f"give at most {spare}"
            if spare < 1:
                remedy = self._what_to_type(total_steps, self.every)
            if self._fitted(total_steps) >= 1:
                remedy += ", or leave `every` out to have it fitted"
            raise ValueError(
                f"`{self.name}(every={self.every})` would restart 0 times in {total_steps} steps;"
                f" {remedy}"
            )
        return self

    def _what_to_type(self, total_steps: int, spare: int) -> str:
        """For this many steps that may end a link."""
        free = self._spare(total_steps) + self.warm_start  # without any
        if not self.warm_start or free < min(spare, 2):
            return f"train for at least {total_steps - self._spare(total_steps) + spare} steps"
        most, also = (free - spare, "") if free >= spare else (free - 2, " and leave `every` out")
        return f"`warm_start={self.warm_start}` leaves no room: give it at most {most} steps{also}"

    def _fitted(self, total_steps: int) -> int:
        spare = self._spare(total_steps)
        return min(-(-(spare + 1) // (self.links + 1)), spare // 2)

    def _spare(self, total_steps: int) -> int:
        return total_steps - 1  # the last step ends no link

    def events(self, total_steps: int) -> int:
        """Restarts in a run of `total_steps`."""
        assert self.every is not None
        return max(self._spare(total_steps), 0) // self.every

    def plan(self, total_steps: int | None) -> str:
        count = "" if total_steps is None else f", {self.events(total_steps)} restarts"
        return f"every={self.every}{count}"

    def ends(self, training: TrainingLike) -> bool:
        """Whether a link ends with this step."""
        assert self.every is not None
        return (training.step + 1) % self.every == 0 and not is_last(training)

    # -- what

    def init(self, adapters: AdaptersLike) -> State:
        return {"links": 0}

    def after_step(self, state: State, training: TrainingLike) -> None:
        if self.ends(training):
            state["links"] += 1
            self.restart(state, training, training.adapters.layers)

    def restart(self, state: State, training: TrainingLike, layers: Iterable[str]) -> None:
        """Merge the updates of these layers and start fresh ones."""
        self.merge(state, training, layers)

    def merge(
        self, state: State, training: TrainingLike, layers: Iterable[str], *,
        accumulate: str = "base", keep_state: bool = False,
    ) -> None:  # fmt: skip
        """See `training.merge_`; tells all schedules."""
        names = [*layers]
        for name in names:
            training.merge_(
                training.adapters.layers[name], link=state["links"],
                generator=training.generator(name), accumulate=accumulate, keep_state=keep_state,
            )  # fmt: skip
        training.restarted(names)


@dataclass(frozen=True, kw_only=True)
class Chain(Restarts):
    """Restarts for fine-tuning: finished links become frozen factors or are written to the base,
    and each may have its own rate curve."""

    accumulate: str = "factors"
    lr_scheduler_type: str = CONTINUED

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "accumulate", "factors", "base")
        one_of(self, "lr_scheduler_type", CONTINUED, "constant", "linear", "cosine")
        if self.accumulate == "base":
            self.write_base()

    def plan(self, total_steps: int | None) -> str:
        own = self.lr_scheduler_type != CONTINUED
        rate = f", rate {self.lr_scheduler_type} in each, in the run's place" if own else ""
        return super().plan(total_steps) + rate

    def before_step(self, state: State, training: TrainingLike) -> None:
        if self.accumulate == "factors" and training.step == 0:
            self._refuse_shards(training.adapters)
        if self.lr_scheduler_type != CONTINUED:
            training.lr_factor(curve(self.lr_scheduler_type, self._part(training)))

    def _refuse_shards(self, adapters: AdaptersLike) -> None:
        """ValueError now, and not at the first restart, where frozen factors could not grow."""
        for name, layer in adapters:
            if any(isinstance(p, DTensor) for p in layer.update.delta.parameters()):
                raise ValueError(
                    f"`{self.text()}`: the parameters of {name!r} are sharded, so the frozen"
                    " factors beside them cannot grow; write finished updates to the base instead,"
                    f" with `{self.name}(accumulate='base')`"
                )

    def _part(self, training: TrainingLike) -> float:
        """How much of the link that this step belongs to is over; past the horizon all of it."""
        every = self.every
        assert every is not None
        if is_over(training):
            return 1.0
        begun = training.step - training.step % every
        left = (training.total_steps or begun + every) - begun
        return (training.step - begun) / min(every, left)

    def restart(self, state: State, training: TrainingLike, layers: Iterable[str]) -> None:
        self.merge(state, training, layers, accumulate=self.accumulate)
