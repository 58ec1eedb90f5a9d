"""How often a position takes its turn: a frequency that falls over the run, and its sum.

    ρ_t/interval,  ρ_t = max(κ^((t+1)/(ratio·T)), 1e-8)
    Σρ = (1 − e^(−θT))/(e^θ − 1) with θ = ln(1/κ)/(ratio·T), or T at κ = 1

A turn occupies a position for `freeze` steps, and half of the ring is the other side's: so the
interval is at least twice that.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lorica.interfaces import AdaptersLike
from lorica.methods.fields import number, whole
from lorica.methods.schedules.base import AbstractSchedule
from lorica.methods.schedules.switchlora.ring import capacity

if TYPE_CHECKING:
    from typing_extensions import Self

INTERVAL, FREEZE = 40, 5  # the authors'
TURNS = 2  # what a left-out interval is to give each position, where that can be
FEW = 0.01  # turns of a position in the whole run: fewer are none


@dataclass(frozen=True, kw_only=True)
class Paced(AbstractSchedule):
    interval: float | None = None
    swaps: float | None = None
    ratio: float = 0.1
    kappa: float = 1 / 3
    freeze: int | None = None

    below_full: ClassVar[bool] = True

    def __post_init__(self) -> None:
        say = f"a number of steps above 0, e.g. {INTERVAL}; left out, it is fitted to the run"
        number(self, "interval", above=0, optional=True, say=say)
        say = "a number of exchanges above 0, e.g. 91; left out, it follows from the interval"
        number(self, "swaps", above=0, optional=True, say=say)
        number(self, "ratio", above=0, say="a number above 0, e.g. 0.1")
        number(self, "kappa", above=0, most=1, say="a number above 0, at most 1, e.g. 1/3")
        say = f"whole steps, at least 0, e.g. {FREEZE}; 0: none"
        whole(self, "freeze", least=0, optional=True, say=say)
        given = f"`{self.name}(interval={self.interval!r}"
        if self.interval is not None and self.swaps is not None:
            raise ValueError(
                f"{given}, swaps={self.swaps!r})`: either follows from the other; leave one out"
            )
        if self.interval is not None and self.interval < (least := self._least(self.freeze or 0)):
            cause = f", freeze={self.freeze}" if self.freeze else ""
            half = f", or `freeze={int(self.interval // 2)}`" if self.interval >= 2 else ""
            raise ValueError(
                f"{given}{cause})`: a position may be frozen on one side or exchanged on the other,"
                f" so the interval is at least {least} steps; type `interval={least}`{half}"
            )

    @staticmethod
    def _least(freeze: int) -> int:
        return max(2, 2 * freeze)

    def frequency(self, step: int, total_steps: int | None) -> float:
        """Expected turns of a position in this step, 0-based; none past the horizon."""
        assert self.interval is not None
        if total_steps is not None and step >= total_steps:
            return 0.0
        if self.kappa == 1 or total_steps is None:
            return 1 / self.interval
        return max(self.kappa ** ((step + 1) / (self.ratio * total_steps)), 1e-8) / self.interval

    def _sum(self, total_steps: int) -> float:
        """Σρ over the run."""
        if self.kappa == 1:
            return total_steps
        theta = -math.log(self.kappa) / (self.ratio * total_steps)
        return math.exp(-theta) * math.expm1(-theta * total_steps) / math.expm1(-theta)

    def fit(self, total_steps: int | None) -> Self:
        if total_steps is None and (self.kappa < 1 or self.swaps is not None):
            raise ValueError(
                f"`{self.name}` slows down over the run: give `total_steps`, its length in"
                f" optimizer steps, to `lorica.optimizer`, or type `{self.name}(kappa=1)` for a"
                " frequency that stays"
            )
        total = math.inf if total_steps is None else self._sum(total_steps)
        interval, freeze = self.interval, FREEZE if self.freeze is None else self.freeze
        if interval is None:
            least = self._least(freeze)
            interval = max(least, min(INTERVAL, total / TURNS))
            if self.swaps is not None:
                interval = self._of_swaps(total, total_steps, least)
        elif self.freeze is None:
            freeze = min(FREEZE, int(interval // 2))
        if (self.interval or self.swaps) and total < FEW * interval:
            raise ValueError(
                f"`{self.text()}` in {total_steps} steps exchanges a position"
                f" {total / interval:.2g} times, so nothing happens; give an `interval` of at most"
                f" {max(total, 2):.3g}, or leave it out"
            )
        return dataclasses.replace(self, interval=interval, freeze=freeze, swaps=None)

    def _of_swaps(self, total: float, total_steps: int | None, least: int) -> float:
        assert self.swaps is not None
        if (interval := total / self.swaps) < least:
            half = int(interval // 2)
            lower = f", or `freeze={half}` beside it" if interval >= 2 else ""
            raise ValueError(
                f"`{self.text()}` in {total_steps} steps: turns would begin {interval:.3g} steps"
                f" apart, and at least {least} are needed (2·freeze); type at most"
                f" `swaps={math.floor(10 * total / least) / 10:g}`{lower}"
            )
        return interval

    def state_bytes(self, adapters: AdaptersLike) -> int:
        """The pools: min(in, out) vectors of either side a layer."""
        total = 0
        for _, layer in adapters:
            n, m = layer.in_features, layer.out_features
            total += capacity(layer) * (m + n) * layer.site.dtype.itemsize
        return total

    def plan(self, total_steps: int | None) -> str:
        assert self.interval is not None
        held = f"its counterpart frozen for {self.freeze} steps" if self.freeze else "none frozen"
        often = f"each position is exchanged every {self.interval:.4g} steps"
        if total_steps is None or self.kappa == 1:
            return f"{often}, {held}"
        turns = self._sum(total_steps) / self.interval
        return (
            f"{often} at first, {turns:.3g} times in {total_steps} steps; falls to {self.kappa:.3g}"
            f" of that in {self.ratio * total_steps:.0f}; {held}"
        )
