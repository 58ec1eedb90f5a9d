"""ReLoRA: merge and restart, with the optimizer's memory erased and the rate warmed up anew.

    W ← W + s·B·A, A drawn, B = 0, after each step u ≥ q with u mod q = 0
    Adam's moments of A and B ← 0 or pruned, after each step u ≥ R with u mod R = 0, merge or none

q is `every`, R the cycle (default q), wr `rewarm`; u counts from 0 after the warm start. The step
before a reset has rate 0: it feeds Adam's moments only, and the merge comes after the rate was
dropped, as in the authors' code.

    continued  the run's own rate, times j/wr for j = u mod R < wr, u ≥ R
    jagged     λ(u) = u/w1 for u < w1;  (j/wr)·D(kR + wr) for j < wr, u ≥ R, k = ⌊u/R⌋;  else D(u)
               D(z) = μ + (1 − μ)·½(1 + cos(π(z − w1)/(T − w1)))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lorica.interfaces import AdaptersLike, LayerLike, TrainingLike
from lorica.methods.fields import number, one_of, whole, without_effect
from lorica.methods.optional import BringsCurves
from lorica.methods.schedules._restart import CONTINUED, Restarts
from lorica.methods.schedules.base import State, is_last, is_over
from lorica.methods.schedules.relora.jagged import jagged, prune_state
from lorica.methods.schedules.relora.warm_start import WarmStart
from lorica.tensors.dtensor_ops import reset_state

if TYPE_CHECKING:
    from typing_extensions import Self

JAGGED = "jagged_cosine"


@dataclass(frozen=True, kw_only=True)
class Relora(WarmStart, Restarts, BringsCurves):
    """Pre-training in rounds: each low-rank update is merged, and a fresh one starts.

    A sum of N updates of rank r can reach rank N·r. Most of the published gain is the full-rank
    warm start; reset and re-warm-up help only together.

    Cost: LoRA's; the base becomes training state, and a warm start costs full training while it
    lasts.
    When: pre-training, with a quarter of the run as `warm_start`.

    Args:
        every: steps between restarts (q). Default: fitted, 3 restarts a run, as 5,000 of 20,000.
        warm_start: steps of full-rank training before that: the targets' weights train and the
            adapters are frozen; then the optimizer starts anew. Default 0; the authors take 5,000.
        reset: of the optimizer's state of the adapters after each cycle: `zero` (moments and step
            count; default), or `random` / `magnitude` pruning of the moments, which keeps the step
            count as the authors do.
        prune_ratio: share of the moments that pruning erases; the authors recommend 0.9 with
            `magnitude`, and use 0.999 with `random`.
        masks: of pruning: `shared` (default: the first moment's) or `separate` as in the authors'
            code, where a first moment may outlive its second: a huge step, which only the
            re-warm-up hides.
        cycle: steps between resets and re-warm-ups, restart or none; default `every`.
        rewarm: steps of re-warm-up (wr). Default: a tenth of the cycle, at most the authors' 100.
        lr_scheduler_type: `continued` (default: the run's scheduler, times the ramp) or
            `jagged_cosine`, the paper's curve, which replaces it.
        warmup_steps: w1 of the jagged cosine.
        min_lr_ratio: its floor μ.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("relora(every=1000)+dora").text()
        'dora+relora(every=1000)'

    Reference:
        @inproceedings{lialin2024relora,
          title = {ReLoRA: High-Rank Training Through Low-Rank Updates},
          author = {Lialin, Vladislav and Shivagunde, Namrata and Muckatira, Sherin and Rumshisky,
                    Anna},
          booktitle = {ICLR}, year = {2024}, eprint = {2307.05695}
        }
    """

    reset: str = "zero"
    prune_ratio: float = 0.9
    masks: str = "shared"
    cycle: int | None = None
    rewarm: int | None = None
    lr_scheduler_type: str = CONTINUED
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1

    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function", "sharded"})
    links: ClassVar[int] = 3
    below_full: ClassVar[bool] = True
    lr_scheduler_types: ClassVar[frozenset[str]] = frozenset({JAGGED})
    default_learning_rate: ClassVar[float | None] = 1e-3  # the authors' at 250M: twice full's

    def __post_init__(self) -> None:
        super().__post_init__()
        self.write_base()
        one_of(self, "reset", "zero", "random", "magnitude")
        one_of(self, "masks", "shared", "separate")
        one_of(self, "lr_scheduler_type", CONTINUED, JAGGED)
        whole(self, "warm_start", least=0, say="whole steps, at least 0, e.g. 5000; 0: none")
        whole(self, "warmup_steps", least=0, say="whole steps, at least 0, e.g. 100; 0: none")
        say = "whole steps, at least 0, e.g. 100; left out, a tenth of the cycle"
        whole(self, "rewarm", least=0, optional=True, say=say)
        say = "whole steps, at least 1, e.g. 1000; left out, `every`"
        whole(self, "cycle", optional=True, say=say)
        number(self, "prune_ratio", least=0, most=1, say="a number in [0, 1], e.g. 0.9")
        number(self, "min_lr_ratio", least=0, most=1, say="a number in [0, 1], e.g. 0.1")
        if self.lr_scheduler_type != JAGGED:
            why = f"it belongs to `lr_scheduler_type={JAGGED!r}`"
            without_effect(self, "warmup_steps", 0, why)
            without_effect(self, "min_lr_ratio", 0.1, why)
        if self.reset == "zero":
            why = "it belongs to pruning, `reset='random'` or `'magnitude'`"
            without_effect(self, "prune_ratio", 0.9, why)
            without_effect(self, "masks", "shared", why)

    def with_curve(self, name: str, warmup_steps: int) -> Relora:
        return dataclasses.replace(self, lr_scheduler_type=name, warmup_steps=warmup_steps)

    # -- when

    def fit(self, total_steps: int | None) -> Self:
        if self.lr_scheduler_type == JAGGED:
            left = None if total_steps is None else total_steps - self.warm_start
            if left is None or left <= self.warmup_steps:
                raise ValueError(
                    f"`relora(lr_scheduler_type={JAGGED!r})` is a curve over the whole run: give"
                    f" `total_steps` (here {total_steps}), above warm_start + warmup_steps ="
                    f" {self.warm_start + self.warmup_steps}"
                )
        fitted = super().fit(total_steps)
        cycle, rewarm = fitted._cycle()
        if total_steps is not None and cycle > (spare := self._spare(total_steps)):
            raise ValueError(
                f"`relora(cycle={cycle})` would reset 0 times in {total_steps} steps; give at most"
                f" {spare}, or leave `cycle` out to have it with every restart"
            )
        if rewarm >= cycle:
            raise ValueError(
                f"`relora(rewarm={rewarm})` does not end within a cycle of {cycle} steps"
            )
        return fitted

    def _spare(self, total_steps: int) -> int:
        return total_steps - self.warm_start - 2  # neither the first step nor the last is one

    def plan(self, total_steps: int | None) -> str:
        cycle, _ = self._cycle()
        count = "" if total_steps is None else f", {self._spare(total_steps) // cycle} resets"
        return f"{super().plan(total_steps)}, cycle={cycle}{count}"

    def ends(self, training: TrainingLike, every: int | None = None) -> bool:
        u, steps = training.step - self.warm_start, every or self.every
        assert steps is not None
        return u > 0 and u % steps == 0 and not is_last(training)

    def _cycle(self) -> tuple[int, int]:
        """Steps of a cycle, and of its re-warm-up."""
        cycle = self.cycle or self.every
        assert cycle is not None
        return cycle, min(100, cycle // 10) if self.rewarm is None else self.rewarm

    # -- the rate

    def before_step(self, state: State, training: TrainingLike) -> None:
        u, (cycle, rewarm) = training.step - self.warm_start, self._cycle()
        if self.lr_scheduler_type == JAGGED:
            steps, curve = training.total_steps, (self.warmup_steps, self.min_lr_ratio)
            assert steps is not None
            if is_over(training):
                training.lr_factor(self.min_lr_ratio)
                return
            warming = jagged(training.step, steps, *curve, steps, 0)  # a plain cosine up to here
            factor = jagged(u, steps - self.warm_start, *curve, cycle, rewarm)
            training.lr_factor(warming if u < 0 else factor)
            return
        begun = u >= (0 if self.warm_start else cycle)
        if begun and u % cycle < rewarm and not is_over(training):
            training.lr_scale(u % cycle / rewarm)

    # -- what

    def init(self, adapters: AdaptersLike) -> State:
        return {**super().init(adapters), "warming": self.trains_base}

    def after_step(self, state: State, training: TrainingLike) -> None:
        if self.ends_warm(state, training):
            self.merge(state, training, training.adapters.layers)
        super().after_step(state, training)
        if self.ends(training, self._cycle()[0]):
            for name, layer in training.adapters:
                self._forget(layer, training.optimizer, training.generator("prune", name))

    def restart(self, state: State, training: TrainingLike, layers: Iterable[str]) -> None:
        self.merge(state, training, layers, keep_state=True)  # cycles reset it

    def _forget(
        self, layer: LayerLike, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Drop the optimizer's state of the layer's update; magnitudes and biases keep theirs."""
        update = [p for _, p, role in layer.trained() if role not in ("bias", "magnitude")]
        if self.reset == "zero":
            reset_state(optimizer, *update)
            return
        for p in update:
            prune_state(
                optimizer.state.get(p, {}), p.shape, self.reset, self.prune_ratio,
                shared=self.masks == "shared", generator=generator,
            )  # fmt: skip
