"""PRILoRA: more rank the deeper a block lies, and A pruned again and again.

    X̄_j ← β·X̄_j + (1 − β)·‖X_:j‖₂,   S_ij = |A_ij|·X̄_j

X are the inputs of a layer over all tokens of an optimizer step, padding left out. After every
`every` steps, and after the last one, the entries of A (r, in) with the smallest S are set to 0,
the same part of each row. There is no mask: what was set to 0 receives gradients, keeps its
moments, and may grow back until the next time. X̄ starts at 0: its bias is one factor for all of a
row and changes no order.

The paper's text was not available, only what others wrote about it; every = 40, fraction = 0.5 and
β = 0.9 are taken from there. The pruning at the end is ours, so that what is written is as sparse
as was asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike, TrainingLike
from lorica.methods.fields import number, whole
from lorica.methods.optional import Regrows
from lorica.methods.ranks.linear import Linear
from lorica.methods.schedules.base import AbstractSchedule, State, is_last
from lorica.tensors.dtensor_ops import copy_, read_full, sum_over_processes

if TYPE_CHECKING:
    from typing_extensions import Self

EVERY = 40


def pruned(A: Tensor, norms: Tensor, fraction: float) -> Tensor:
    """A (r, in) with round(fraction·in) entries of each row at 0, those of the smallest
    |A_ij|·norms_j; norms (in,)."""
    least = (A.abs() * norms).argsort(dim=1, stable=True)[:, : round(fraction * A.shape[1])]
    return A.scatter(1, least, 0.0)


@dataclass(frozen=True, kw_only=True)
class PriLora(AbstractSchedule, Regrows):
    """Ranks grow with depth, and half of A is set to zero every few steps, by weight and input.

    A pruning changes the function at once. Nothing is faster or smaller in training, and merged
    weights are dense; the update as written has sparse A. Inputs are seen in training mode alone: a
    layer that has had none (an expert without a token, a model that trains in evaluation mode) is
    pruned by |A|.

    Cost: LoRA's, and a running norm of every input feature.
    When: deeper blocks need more rank.

    Args:
        every: optimizer steps between prunings; default 40, and less where that would be fewer than
            two in the run.
        fraction: part of each row of A that is set to 0, in (0, 1); default 0.5.
        beta: β in [0, 1) of the average of input norms; default 0.9. 0: the last step's alone.
        first, last: ranks of the first and the last block; default r/2 and 3r/2, see `linear`.

    Raises:
        ValueError: an interval that never fires; an adapted embedding, whose input is a token id; a
            fraction below one entry of every layer's rows.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("prilora(every=20)", r=8)
        >>> recipe.rank.name, recipe.schedules[0].fit(100).plan(100)
        ('linear', 'every=20, 5 prunings of 50 % of A')

    Reference:
        @inproceedings{benedek2024prilora,
          title = {PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation},
          author = {Benedek, Nadav and Wolf, Lior}, booktitle = {Findings of EACL}, year = {2024},
          eprint = {2401.11316}
        }
    """

    every: int | None = None
    fraction: float = 0.5
    beta: float = 0.9
    first: int | None = None
    last: int | None = None

    preset: ClassVar[Mapping[str, str]] = {"ranks": "linear"}
    needs: ClassVar[frozenset[str]] = frozenset({"pair"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded"})
    edits: ClassVar[frozenset[str]] = frozenset({"pair"})
    regrows: ClassVar[frozenset[str]] = frozenset({"A"})  # a frozen A would only ever lose
    hooks: ClassVar[frozenset[str]] = frozenset({"input_squares"})

    def __post_init__(self) -> None:
        say = "whole optimizer steps, at least 1, e.g. 40; left out, it is fitted to the run"
        whole(self, "every", optional=True, say=say)
        say = "a number in (0, 1), e.g. 0.5; for ranks by depth without pruning type `linear`"
        number(self, "fraction", above=0, below=1, say=say)
        number(self, "beta", least=0, below=1, say="a number in [0, 1), e.g. 0.9")
        if self.first is not None or self.last is not None:
            ranks = Linear(first=self.first, last=self.last).text()
            object.__setattr__(self, "preset", {"ranks": ranks})
            object.__setattr__(self, "requires", frozenset({"ranks"}))

    # -- when

    def fit(self, total_steps: int | None) -> Self:
        if self.every is None:
            fitted = EVERY if total_steps is None else max(1, min(EVERY, total_steps // 2))
            return dataclasses.replace(self, every=fitted)
        if total_steps is not None and total_steps < self.every:
            raise ValueError(
                f"`prilora(every={self.every})` would prune 0 times within {total_steps} steps;"
                f" give at most {total_steps}, or leave `every` out to have it fitted"
            )
        return self

    def plan(self, total_steps: int | None) -> str:
        assert self.every is not None
        count = "" if total_steps is None else f"{-(-total_steps // self.every)} "
        return f"every={self.every}, {count}prunings of {100 * self.fraction:g} % of A"

    def final_from(self, total_steps: int | None) -> int:
        return total_steps or 0  # A fills up again after each pruning but the last

    def due(self, training: TrainingLike) -> bool:
        """Whether A is pruned after this step; past the horizon always, so that it stays sparse."""
        assert self.every is not None
        return (training.step + 1) % self.every == 0 or is_last(training)

    # -- what

    def init(self, adapters: AdaptersLike) -> State:
        layers = {name: adapters.layers[name] for name, _ in adapters.pairs()}
        widest = max(layer.in_features for layer in layers.values())
        if not round(self.fraction * widest):
            raise ValueError(
                f"`prilora(fraction={self.fraction!r})` is less than one entry of a row of A, of at"
                f" most {widest} here; give at least {1 / widest:.2g}"
            )
        return {"norms": {name: torch.zeros(la.in_features) for name, la in layers.items()}}

    def state_bytes(self, adapters: AdaptersLike) -> int:
        return sum(4 * pair.A.shape[1] for _, pair in adapters.pairs())

    @torch.no_grad()
    def after_step(self, state: State, training: TrainingLike) -> None:
        self._learn(state["norms"], training.adapters)
        for name, pair in training.adapters.pairs() if self.due(training) else ():
            A, norms = read_full(pair.A), state["norms"][name].to(pair.A.device)
            norms = torch.where(norms.any(), norms, 1.0)
            copy_(pair.A, pruned(A, norms, self.fraction))

    def _learn(self, norms: dict[str, Tensor], adapters: AdaptersLike) -> None:
        """X̄ of every layer that had a token in this step, on some process."""
        seen = adapters.hooks.input_squares
        devices = {name: adapters.layers[name].store.device for name in norms}
        held = {name: old.to(devices[name]) for name, old in norms.items()}
        own = [seen.get(name, torch.zeros_like(old)) for name, old in held.items()]
        for (name, old), squares in zip(held.items(), sum_over_processes(own), strict=True):
            new = self.beta * old + (1 - self.beta) * squares.sqrt()
            norms[name] = torch.where(squares.any(), new, old)
        seen.clear()
