"""XGBLoRA: gradient boosting with updates of rank 1 over a few blocks at a time.

    booster t, blocks S_t:  W_l ← W_l + s·b_{l,t}·a_{l,t} for l in S_t,  a (1, in), b (out, 1)

S_t is drawn uniformly without replacement and stays for the booster's κ steps; then its products
are merged, and the next set is drawn. Weights outside S_t are frozen for now, their optimizer state
included. After T boosters each weight has had about T·|S_t|/L terms of rank 1. The step size α_t of
boosting is 1, as in the paper's experiments. Its penalty on ‖A‖² and ‖B‖² (Eq. 7) is left out: the
optimizer's weight decay acts on the same numbers. There is no public code of the authors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike, TrainingLike
from lorica.methods.fields import number, whole
from lorica.methods.optional import FreezesLayers
from lorica.methods.ranks import base as ranks
from lorica.methods.schedules._restart import Chain
from lorica.methods.schedules.base import State
from lorica.tensors.dtensor_ops import seeded
from lorica.tensors.linalg import ints

SHARE = 11 / 32


def block_of(path: str) -> str:
    """The transformer block of a module; what lies in none is its own."""
    return ranks.block_of(path) or path


@dataclass(frozen=True, kw_only=True)
class Xgblora(Chain, FreezesLayers):
    """Boosting: rank-1 updates, each trained for a few steps on randomly drawn blocks.

    Blocks are those of the model's path (`model.layers.3`); all adapted weights of a block train
    together, what lies in no block counts as one. The rank is 1. One rate curve over the run: with
    a whole cosine for each small booster little would be learnt.

    Cost: rank 1, a third of the blocks at a time: the least memory and time of all.
    When: memory decides, and many short boosters are acceptable.

    Args:
        every: steps of a booster (κ). Default: fitted, 49 restarts a run, so 50 boosters (Lorica's
            choice, near the best in a small experiment; the paper sweeps κ).
        layers: blocks that train at a time: a whole number, or a fraction in (0, 1] of them all.
            Default: 11/32 of them, the paper's best for 32 blocks.
        accumulate: where finished boosters go: `factors` (default: frozen beside the base, which
            keeps its bytes; saved as one plain LoRA whose rank grows by 1 with each) or `base`,
            which is better for many hundreds of boosters.
        lr_scheduler_type: `continued` (default: the run's scheduler covers all boosters), or the
            rate within each booster, in its place: `cosine`, `linear` or `constant`.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("xgblora(every=25, layers=0.5)").r
        1

    Reference:
        @misc{zhang2024less,
          title = {Less is More: Extremely Gradient Boosted Rank-1 Adaption for Efficient Finetuning
                   of LLMs},
          author = {Zhang, Yifei and Zhu, Hao and Liu, Aiwei and Yu, Han and Koniusz, Piotr and
                    King, Irwin},
          year = {2024}, eprint = {2410.19694}
        }
    """

    layers: int | float | None = None

    links: ClassVar[int] = 49
    default_r: ClassVar[int | None] = 1
    only_r: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        say = "blocks that train at a time, a whole number of at least 1 or a fraction in (0, 1]"
        if isinstance(self.layers, float):
            number(self, "layers", above=0, most=1, say=f"{say}, e.g. 0.5")
        else:
            whole(self, "layers", optional=True, say=f"{say}, e.g. 0.5")

    @property
    def freezes_layers(self) -> bool:
        return True

    def init(self, adapters: AdaptersLike) -> State:
        return {**super().init(adapters), "trainable": self._drawn(adapters, 0)}

    def restore(self, state: State, training: TrainingLike) -> None:
        super().restore(state, training)
        training.set_trainable(self._trainable(state, training.adapters))

    def restart(self, state: State, training: TrainingLike, layers: Iterable[str]) -> None:
        adapters = training.adapters
        super().restart(state, training, self._trainable(state, adapters))
        state["trainable"] = self._drawn(adapters, state["links"])
        self.restore(state, training)

    def _trainable(self, state: State, adapters: AdaptersLike) -> list[str]:
        now = ints(state["trainable"])
        return [name for name, trains in zip(adapters.layers, now, strict=True) if trains]

    def _drawn(self, adapters: AdaptersLike, booster: int) -> Tensor:
        """Which adapted layers train in this booster (number of layers,), from the recipe's seed
        alone: the first is wanted before there is an optimizer step."""
        of = [block_of(name) for name in adapters.layers]
        blocks = list(dict.fromkeys(of))
        count, given = len(blocks), SHARE if self.layers is None else self.layers
        if isinstance(given, int) and given > count:
            raise ValueError(
                f"`xgblora(layers={given})`: the model has {count} blocks with adapters"
                f" ({blocks[0]!r}, ...); give at most {count}, or a fraction such as 0.5"
            )
        size = given if isinstance(given, int) else max(1, round(given * count))
        generator = seeded(f"{adapters.recipe.seed}/{self.name}/{booster}")
        drawn = {blocks[i] for i in ints(torch.randperm(count, generator=generator)[:size])}
        return torch.tensor([block in drawn for block in of])
