"""Ordinary training of every weight, what other methods are compared with.

    W ← W − η·update(∂L/∂W)

There is no ΔW apart from the weight: no layer is wrapped, nothing has to be merged, and the result
is an ordinary model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.methods.deltas.base import DeltaChoice


@dataclass(frozen=True, kw_only=True)
class Full(DeltaChoice):
    """Every weight trains (or the modules that `target_modules` matches, where it is given).

    The weights themselves train: they are held in float32, detaching needs `keep_base=True`, and
    saving writes an ordinary transformers model. The default rate is a tenth of LoRA's, the usual
    ratio of the two.

    Example:
        >>> from lorica import Recipe
        >>> sorted(Recipe.parse("full").choices[0].withdraws)
        ['base_unchanged']
    """

    wraps: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()
    withdraws: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    needs: ClassVar[frozenset[str]] = frozenset({"writable_base"})

    default_learning_rate: ClassVar[float | None] = 2e-5
