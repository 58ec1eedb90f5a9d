"""LoRA-FA: A stays at its start, only B trains.

ΔW then lies in the row space of the frozen A. The optimizer's state halves, and backward needs
x Aᵀ (N, r) of a layer, not x (N, in). This is the paper's first form; the later one preconditions
B's gradient as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.methods.groups.base import AbstractGroup


@dataclass(frozen=True, kw_only=True)
class LoraFa(AbstractGroup):
    """Frozen A: half the optimizer's state and less activation memory, for somewhat less accuracy.

    Cost: half of LoRA's optimizer state; activations of the adapted layers are not saved.
    When: memory decides; it usually ends somewhat worse than LoRA.

    Example:
        >>> from lorica import Recipe
        >>> sorted(Recipe.parse("lorafa").groups[0].freezes)
        ['A']

    Reference:
        @misc{zhang2023lorafa,
          title = {LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
          Fine-tuning}, author = {Zhang, Longteng and Zhang, Lin and Shi, Shaohuai and Chu, Xiaowen
          and Li, Bo}, year = {2023}, eprint = {2308.03303}
        }
    """

    needs: ClassVar[frozenset[str]] = frozenset({"sides"})
    freezes: ClassVar[frozenset[str]] = frozenset({"A"})
