"""When a budget falls: full for a while, in maskings along a cubic, then final.

    b(t) = b₀ up to t_i;  ⌊b_T + (b₀ − b_T)(1 − (t − t_i)/(T_f − t_i))³⌋ up to T_f = T − t_f;  b_T

t counts steps from 0. t_f = 0 means that the last step, T − 1, is T_f.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorica.methods.schedules.base import AbstractSchedule

if TYPE_CHECKING:
    from typing_extensions import Self

MASKINGS = 200  # about the paper's, in each of its runs


@dataclass(frozen=True, kw_only=True)
class Budgeted(AbstractSchedule):
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int | None = None

    def fit(self, total_steps: int | None) -> Self:
        T = total_steps
        if T is None:
            raise ValueError(
                f"`{self.name}` spends its budget over the whole run: give `total_steps`, its"
                " length in optimizer steps, to `lorica.optimizer`"
            )
        tinit, tfinal = self.tinit, self.tfinal
        if tfinal is None:
            tfinal = max(1, min(T // 2, (T - (tinit or 0)) // 2))
        if tinit is None:
            tinit = max(0, min(T // 8, (T - tfinal) // 4))
        left = T - max(tfinal, 1) - tinit  # steps in which the budget falls, the final one included
        if left < 2:
            raise ValueError(
                f"`{self.name}(tinit={tinit}, tfinal={tfinal})` in {T} steps leaves {max(left, 0)}"
                " for the budget to fall, and at least 2 are needed; give less of both, leave them"
                " out to have them fitted, or train for at least 3 steps"
            )
        every = self.deltaT or max(1, left // MASKINGS)
        fitted = dataclasses.replace(self, tinit=tinit, tfinal=tfinal, deltaT=every)
        if fitted.events(T) < 2:
            raise ValueError(
                f"`{self.name}(deltaT={every})`: no multiple of it lies between tinit={tinit} and"
                f" T - tfinal = {fitted.end(T)}, so it fires 0 times before the pattern is final;"
                f" give at most `deltaT={left - 1}`, or leave it out"
            )
        return fitted

    def end(self, total_steps: int) -> int:
        """T_f, the step from which on the pattern is final."""
        assert self.tfinal is not None
        return total_steps - max(self.tfinal, 1)

    def final_from(self, total_steps: int | None) -> int:
        assert total_steps is not None
        return self.end(total_steps) + 1  # the masking of T_f follows that step

    def due(self, t: int, total_steps: int) -> bool:
        """Whether a masking follows step t."""
        tinit, every, end = self._fitted(total_steps)
        return tinit < t <= end and (t == end or t % every == 0)

    def events(self, total_steps: int) -> int:
        """Maskings of a run, the final one included."""
        tinit, every, end = self._fitted(total_steps)
        return (end - 1) // every - tinit // every + 1

    def budget(self, t: int, total_steps: int, first: int, last: int) -> int:
        """b(t) between b₀ = `first` and b_T = `last`."""
        tinit, _, end = self._fitted(total_steps)
        if t <= tinit or t >= end:
            return first if t <= tinit else last
        return int((first - last) * (1 - (t - tinit) / (end - tinit)) ** 3 + last)

    def plan(self, total_steps: int | None) -> str:
        assert total_steps is not None
        tinit, every, end = self._fitted(total_steps)
        return (
            f"full budget up to step {tinit}, {self.events(total_steps)} maskings every {every}"
            f" steps, pattern final from step {end} on"
        )

    def _fitted(self, total_steps: int) -> tuple[int, int, int]:
        """t_i, Δ_T, T_f."""
        assert self.tinit is not None and self.deltaT is not None, "asked of what `fit` returned"
        return self.tinit, self.deltaT, self.end(total_steps)
