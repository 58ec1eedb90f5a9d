"""A schedule of the tests' own: put every update into the base, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorica.methods.schedules.base import AbstractSchedule
from lorica.training.weight_edits import merge_


@dataclass(frozen=True, kw_only=True)
class MergeOften(AbstractSchedule):
    """Merge all layers every `every` steps."""

    every: int = 2
    needs: ClassVar[frozenset[str]] = frozenset({"pair", "factors", "writable_base"})
    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    edits: ClassVar[frozenset[str]] = frozenset({"base", "pair"})

    def init(self, adapters: Any) -> dict[str, Any]:
        return {"links": 0}

    def after_step(self, state: dict[str, Any], training: Any) -> None:
        if (training.step + 1) % self.every:
            return
        state["links"] += 1
        for name, layer in training.adapters:
            merge_(
                layer,
                training.optimizer,
                link=state["links"],
                init=training.adapters.recipe.init,
                generator=training.generator(name),
            )
