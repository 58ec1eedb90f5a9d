"""SoRA: a soft threshold on every rank's gate after each step, so that many become exactly 0.

    g ← T_ξ(g − step(∇g)),   T_ξ(x) = sign(x)·max(|x| − ξ, 0),   ξ = λ·η of this step

the proximal step for L + λ Σ‖g‖₁. The gates' own step is the recipe's rule without decay: with
AdamW what the authors' second optimizer does, gate by gate. A rank with a gate at 0 is dropped
from what is written; in training it may come back, as long as a step is longer than ξ, so the
support is final only at the end.

The authors' code differs. Its ξ is a constant, so that under a falling rate gates die late in
training (`scaled=False`). Its threshold is three masks in a row, which also zero what they have
just shrunk below ξ: gates below 2ξ die, and one of exactly ξ is left alone (`rule='authors'`). It
adds an L1 term to the loss as well, left out here: one mechanism is enough. Between its stages the
rate is not restarted, and at the end of a linear decay only the threshold acts; here it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import AdaptersLike, TrainingLike
from lorica.methods.fields import number, one_of, whole
from lorica.methods.schedules._restart import CONTINUED, curve
from lorica.methods.schedules.base import AbstractSchedule, State
from lorica.tensors.dtensor_ops import copy_, read_full

if TYPE_CHECKING:
    from typing_extensions import Self

SCALED, CONSTANT = 0.3, 3e-4  # the authors' 3e-4, at their rates of about 1e-3


def shrink(g: Tensor, xi: float, rule: str = "soft") -> Tensor:
    """T_ξ of each entry, or the authors' form of it."""
    if rule == "soft":
        return F.softshrink(g, xi)
    near = torch.where(g.abs() > xi, g - xi * g.sign(), g)
    return torch.where(near.abs() < xi, 0, near)


@dataclass(frozen=True, kw_only=True)
class Sora(AbstractSchedule):
    """Ranks of little use shut themselves: a sparse gate for each, from a generous r down.

    How many ranks a layer keeps follows from the threshold; all begin with `r`. The last rates
    decide: a schedule that ends at 0 ends the pruning, too.

    Cost: LoRA's of the rank it begins with; what is written has the ranks that remain.
    When: the rank is not known, and a small adapter is wanted in the end.

    Args:
        threshold: λ ≥ 0 in ξ = λ·rate; with `scaled=False` ξ itself, per step. Default 0.3, or
            3e-4: the authors' 3e-4 at their rates of about 1e-3.
        scaled: whether ξ is a multiple of the rate (default, the paper's) or a constant (the
            authors' code).
        rule: `soft` (default, the paper's) or `authors`, their code's, which kills below 2ξ.
        stages: parts of the run, equally long, whose thresholds rise from 0 to `threshold` by equal
            amounts; each starts from the one before. Default 1: the threshold all along.
        lr_scheduler_type: the rate within each stage, from the full one: `linear` to 0 (default
            with several stages), `cosine`, `constant`; it replaces the run's scheduler.
            `continued` (default with one): the run's scheduler covers all stages.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("sora(threshold=0.5)+dora", r=8).delta.name
        'gated'

    Reference:
        @inproceedings{ding2023sparse,
          title = {Sparse Low-rank Adaptation of Pre-trained Language Models},
          author = {Ding, Ning and Lv, Xingtai and Wang, Qiaosen and Chen, Yulin and Zhou, Bowen and
                    Liu, Zhiyuan and Sun, Maosong}, booktitle = {EMNLP}, year = {2023},
          eprint = {2311.11696}
        }
    """

    threshold: float | None = None
    scaled: bool = True
    rule: str = "soft"
    stages: int = 1
    lr_scheduler_type: str | None = None

    preset: ClassVar[Mapping[str, str]] = {"deltas": "gated", "inits": "init.gated"}
    needs: ClassVar[frozenset[str]] = frozenset({"pair", "diagonal"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    edits: ClassVar[frozenset[str]] = frozenset({"rank"})
    default_learning_rate: ClassVar[float | None] = 8e-4  # the authors' scripts

    def __post_init__(self) -> None:
        say = "a number above 0, e.g. 0.3; for gates that nothing shuts type the method `gated`"
        number(self, "threshold", above=0, optional=True, say=say)
        whole(self, "stages", say="a whole number of at least 1, e.g. 5")
        one_of(self, "scaled", True, False)
        one_of(self, "rule", "soft", "authors")
        one_of(self, "lr_scheduler_type", None, CONTINUED, "constant", "linear", "cosine")

    # -- when

    def fit(self, total_steps: int | None) -> Self:
        staged = self.stages > 1 or self._curve != CONTINUED
        if staged and (total_steps is None or total_steps < self.stages):
            raise ValueError(
                f"`{self.text()}` divides the run into {self.stages} stage(s), and it has"
                f" {total_steps} steps; give `total_steps` to `lorica.optimizer`, at least one a"
                " stage, or fewer `stages`"
            )
        return self

    def final_from(self, total_steps: int | None) -> int:
        return total_steps or 0  # until the end a gate may open again

    def plan(self, total_steps: int | None) -> str:
        unit = " times the rate" if self.scaled else ""
        levels = ", ".join(f"{self._level(i):.3g}" for i in range(self.stages))
        return f"threshold {levels}{unit}" + (
            f", rate {self._curve} in each" if self.stages > 1 else ""
        )

    @property
    def _curve(self) -> str:
        return self.lr_scheduler_type or (CONTINUED if self.stages == 1 else "linear")

    def _level(self, stage: int) -> float:
        top = self.threshold or (SCALED if self.scaled else CONSTANT)
        return top if self.stages == 1 else top * stage / (self.stages - 1)

    def _stage(self, step: int, total_steps: int | None) -> tuple[int, float]:
        """(stage, how much of it is over) of a step; past the horizon the last one, all over."""
        if total_steps is None:
            return 0, 0.0
        first = [-(-i * total_steps // self.stages) for i in range(self.stages + 1)]
        stage = sum(step >= f for f in first[1:-1])
        return stage, min(1.0, (step - first[stage]) / (first[stage + 1] - first[stage]))

    # -- what

    def init(self, adapters: AdaptersLike) -> State:
        return {}

    def before_step(self, state: State, training: TrainingLike) -> None:
        if self._curve != CONTINUED:
            part = self._stage(training.step, training.total_steps)[1]
            training.lr_factor(curve(self._curve, part))

    @torch.no_grad()
    def after_step(self, state: State, training: TrainingLike) -> None:
        level = self._level(self._stage(training.step, training.total_steps)[0])
        rates = {
            id(p): float(g["lr"]) for g in training.optimizer.param_groups for p in g["params"]
        }
        for _, pair in training.adapters.pairs():
            if pair.E is not None and pair.E.grad is not None:
                xi = level * (rates[id(pair.E)] if self.scaled else 1.0)
                copy_(pair.E, shrink(read_full(pair.E), xi, self.rule))
