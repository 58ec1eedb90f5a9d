"""PeriodicLoRA: stages, at whose ends the update is unloaded into the weight, in full or in part.

    P = s·B·A;   m = 0:  W ← W + P,          A drawn, B = 0
                 m > 0:  W ← W + (1 − m)·P,  A stays, B ← m·B

Both keep the function. Weights, optimizer and rate start anew in each stage, as the paper says. How
its momentum enters could not be established from what is public; the line m > 0 is the one reading
that keeps the function. A public third-party code, W ← W + m·P with both factors times 1 − m, loses
m(1 − m)·P each time and is left out. With m > 0 the next stage trains in nearly the same row space:
steadier, but far less rank is gained (no limit m → 0 leads to m = 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorica.interfaces import LayerLike, TrainingLike
from lorica.methods.fields import number
from lorica.methods.schedules._restart import Chain
from lorica.methods.schedules.base import State, pair_of
from lorica.tensors.dtensor_ops import reset_state, scale_


@dataclass(frozen=True, kw_only=True)
class Plora(Chain):
    """Fine-tuning in stages, each of which unloads its update, all of it or all but a momentum.

    Without momentum it is `cola` with another number of stages. Not to be confused with other works
    of the same short name.

    Cost: LoRA's; frozen stages add r of rank each, unless they are written to the base.
    When: as `cola`, where a part of each update should stay in the adapter.

    Args:
        every: steps of a stage, e.g. those of an epoch. Default: fitted, 4 unloadings a run
            (Lorica's choice: five stages; the paper's settings were not available).
        momentum: m in [0, 1), the part of an update that stays in the adapter. Default 0.
        accumulate: where unloaded updates go: `factors` (default: frozen beside the base, which
            keeps its bytes; saved as one plain LoRA whose rank grows) or `base`.
        lr_scheduler_type: the rate within each stage, which replaces the run's scheduler: `cosine`
            (default) or `linear` to 0, `constant`. `continued`: the run's scheduler covers all.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("plora(every=500, momentum=0.3)+dora").text()
        'dora+plora(every=500, momentum=0.3)'

    Reference:
        @misc{meng2024periodiclora,
          title = {PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization},
          author = {Meng, Xiangdi and Dai, Damai and Luo, Weiyao and Yang, Zhe and Wu, Shaoxiang and
                    Wang, Xiaochen and Wang, Peiyi and Dong, Qingxiu and Chen, Liang and Sui,
                    Zhifang},
          year = {2024}, eprint = {2402.16141}
        }
    """

    momentum: float = 0.0
    lr_scheduler_type: str = "cosine"

    links: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        say = "the part that stays, in [0, 1), e.g. 0.3; left out, all of an update is unloaded"
        number(self, "momentum", least=0, below=1, say=say)
        if self.momentum:
            object.__setattr__(self, "needs", self.needs | {"pair", "factors"})

    def restart(self, state: State, training: TrainingLike, layers: Iterable[str]) -> None:
        if not self.momentum:
            super().restart(state, training, layers)
            return
        names = [*layers]
        for name in names:
            self._unload(training.adapters.layers[name], training.optimizer)
        training.restarted(names)

    @torch.no_grad()
    def _unload(self, layer: LayerLike, optimizer: torch.optim.Optimizer) -> None:
        layer.update.accumulate_(layer.store, self.accumulate, 1 - self.momentum)
        pair = pair_of(layer)
        scale_(pair.B, self.momentum)  # ΔW is linear in B
        reset_state(optimizer, *(p for p in (pair.A, pair.B, pair.E) if p is not None))
