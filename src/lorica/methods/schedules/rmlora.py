"""RM-LoRA: a penalty for ranks that are not orthonormal, and gradients for some ranks only.

    L + γ/(2K) Σ_k ( ‖A_kA_kᵀ − I‖ + ‖B_kᵀB_k − I‖ );    dA ← dA on rows I,  dB ← dB on columns J

I ⊂ {1..r}, |I| = k, anew for each layer and step; J = I (`same`) or drawn by itself. The first step
has all gradients, as in the authors' code. The penalty is the objective `orthogonality`; it does
not act on B while B = 0, where its gradient is 0. It pulls the update to a size of about s·√r, a
large perturbation where s is large.

The sets come from (seed, step, layer), so nothing has to be stored. Masked does not mean frozen
under Adam: momentum and decay still move masked rows, and second moments decay. `strict` puts rows
and moments back as they were; the step count of the bias correction, one for all rows, keeps
rising. A rule that mixes the gradients of ranks would move masked ones by the gradients of others,
so with such a rule (it does not give `row_wise`) only `strict` is allowed. In the authors' loop a
parameter outside of the factors has its gradient masked to zero as well, so that a head is never
trained after the first step; here only A and B are masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike, TrainingLike
from lorica.methods.fields import number, one_of, whole
from lorica.methods.objectives.orthogonality import Orthogonality
from lorica.methods.schedules.base import AbstractSchedule, State
from lorica.tensors.dtensor_ops import read_full, row_states, write_rows, zero_rows
from lorica.tensors.linalg import ints


@dataclass(frozen=True, kw_only=True)
class RmLora(AbstractSchedule):
    """Every step trains a random half of the ranks, and a penalty keeps all of them apart.

    Cost: LoRA's, and an r × r product for each factor.
    When: ranks duplicate each other and a little accuracy may be spent on it.

    Args:
        k: ranks with a gradient, of each layer's r; default half of them. A layer with no more than
            that many trains all of them.
        gamma: γ ≥ 0 of the objective `orthogonality`; default 0.1, 0 for none (the authors use
            both).
        columns: `same` (default: A's rows and B's columns are the same ranks) or `independent`.
        strict: masked rows do not move at all, and their moments stay as they are; default False,
            the authors'. It copies the masked part of factors and moments at each step.

    Raises:
        ValueError: a k that masks nothing in any layer.

    Example:
        >>> from lorica import Recipe
        >>> recipe = Recipe.parse("rmlora(k=2, gamma=0.3)+rslora", r=8)
        >>> recipe.objectives[0].weight, recipe.text()
        (0.3, 'rslora+rmlora(k=2, gamma=0.3)')

    Reference:
        @misc{mao2024enhancing,
          title = {Enhancing Parameter Efficiency and Generalization in Large-Scale Models: A
                   Regularized and Masked Low-Rank Adaptation Approach},
          author = {Mao, Yuzhu and Ping, Siqi and Zhao, Zihao and Liu, Yang and Ding, Wenbo},
          year = {2024}, eprint = {2407.12074}, archivePrefix = {arXiv}
        }
    """

    k: int | None = None
    gamma: float = 0.1
    columns: str = "same"
    strict: bool = False

    preset: ClassVar[Mapping[str, str]] = {"objectives": "orthogonality"}
    needs: ClassVar[frozenset[str]] = frozenset({"pair", "row_state", "row_wise"})
    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function", "sharded"})
    edits: ClassVar[frozenset[str]] = frozenset({"gradient mask"})
    default_learning_rate: ClassVar[float | None] = 1e-3  # the authors' scripts

    def __post_init__(self) -> None:
        say = "a whole number of ranks, at least 1, e.g. 4; left out, half of each layer's"
        whole(self, "k", optional=True, say=say)
        number(self, "gamma", least=0, say="a number, at least 0, e.g. 0.1; 0: no penalty")
        one_of(self, "columns", "same", "independent")
        one_of(self, "strict", True, False)
        own = {"objectives": Orthogonality(weight=self.gamma).text()} if self.gamma else {}
        object.__setattr__(self, "preset", own)
        if self.strict:  # what a step has moved is put back, wherever the movement came from
            object.__setattr__(self, "gives", self.gives - {"keeps_function"})
            object.__setattr__(self, "needs", self.needs - {"row_wise"})

    def plan(self, total_steps: int | None) -> str:
        ranks = "half of the" if self.k is None else f"{self.k}"
        return f"from the second step on {ranks} ranks of a layer have a gradient"

    def init(self, adapters: AdaptersLike) -> State:
        most = max(pair.A.shape[0] for _, pair in adapters.pairs())
        if self._trained(most) >= most and (self.k is not None or not self.gamma):
            raise ValueError(
                f"`{self.text()}` masks nothing: no layer has more than {most} ranks, and"
                f" {self._trained(most)} of them train at each step. Give a smaller `k` or a larger"
                " `r`, or type `orthogonality` for the penalty alone"
            )
        return {"masked": 0}  # steps so far; an empty state is lost in torch's checkpoints

    def _trained(self, r: int) -> int:
        return min(r, self.k or max(1, r // 2))

    def _masked(self, training: TrainingLike) -> Iterator[tuple[Tensor, Tensor, int, list[int]]]:
        """(parameter, its gradient, the axis of its ranks, which of them are masked)."""
        for name, pair in training.adapters.pairs():
            r, generator = pair.A.shape[0], training.generator(name)
            count = r - self._trained(r)
            rows = columns = torch.randperm(r, generator=generator)[:count]
            if self.columns == "independent":
                columns = torch.randperm(r, generator=generator)[:count]
            for p, axis, index in ((pair.A, 0, rows), (pair.B, 1, columns)):
                if count and p.grad is not None:
                    yield p, p.grad, axis, ints(index)

    @torch.no_grad()
    def before_step(self, state: State, training: TrainingLike) -> None:
        if training.step == 0:
            return
        state["masked"] += 1
        held: list[tuple[Tensor, int, list[int], list[Tensor]]] = []
        for p, gradient, axis, index in self._masked(training):
            zero_rows(gradient, index, axis)
            if self.strict:
                where = torch.tensor(index, device=p.device)
                full = [read_full(t) for t in (p, *row_states(training.optimizer, p, axis))]
                held.append((p, axis, index, [t.index_select(axis, where) for t in full]))
        if held:  # for this step only: gone before anything can be saved
            state["held"] = held

    @torch.no_grad()
    def after_step(self, state: State, training: TrainingLike) -> None:
        for p, axis, index, kept in state.pop("held", ()):
            # A state that the step has made began at zero, and a zero gradient left it there.
            now = (p, *row_states(training.optimizer, p, axis))
            for t, rows in zip(now, kept, strict=False):
                write_rows(t, index, rows, axis)
