"""AdamW with a step count per vector: per row of A and per column of B.

    t (r, 1) for A, (1, r) for B;   m, v as AdamW's
    p ← (1 − ηλ)p − η·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε),  both corrections elementwise in t

Where rank i is exchanged or reset, its moments and its count start anew and those of the other
ranks stay; with one count for the whole matrix its first steps would be up to
(1−β₁)/√(1−β₂) = 3.2 times too long. The count of a vector whose gradient is held at zero keeps
rising, as in the code this is for. As long as nothing is reset all counts are equal, and this is
AdamW to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorica.methods.groups.base import Options
from lorica.methods.rules._elementwise import Shape
from lorica.methods.rules._engine import PairRule, PairState, Shared, Stack


@dataclass(frozen=True, kw_only=True)
class VectorAdamW(PairRule):
    """AdamW that corrects the bias of each rank's moments by that rank's own age.

    For methods that exchange or reset single vectors of a pair; they choose it themselves. What is
    in no pair gets ordinary AdamW.

    Cost: AdamW's, and a count for each vector.
    When: vectors are exchanged or reset one by one; such methods choose it themselves.

    Example:
        >>> from lorica import Recipe
        >>> sorted(Recipe.parse("vector-adamw").rule.gives)
        ['row_state', 'row_wise', 'sharded', 'vector_step']

    Reference:
        @inproceedings{zhou2024switchlora,
          title = {SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information},
          author = {Zhou, Kaiye and Wang, Shucheng and Xu, Jun}, year = {2024}, eprint =
          {2406.06564}
        }
    """

    trainer_names: ClassVar[frozenset[str]] = frozenset({"adamw_torch", "adamw_torch_fused"})
    gives: ClassVar[frozenset[str]] = frozenset({"sharded", "row_state", "row_wise", "vector_step"})

    def shapes(self, r: int, d: int, partner: int, options: Options) -> dict[str, Shape]:
        return {**self.plain.shapes((r, d), options), "step": (r, 1)}

    def update(self, stack: Stack, state: PairState, shared: Shared) -> Sequence[Tensor | None]:
        return [
            self.plain.stacked(
                factor.value(), factor.gradient(), own,
                factor.lr, stack.options["weight_decay"], stack.options,
            )
            if factor.moves
            else None
            for (factor, _), own in zip(stack.sides, state, strict=True)
        ]  # fmt: skip
