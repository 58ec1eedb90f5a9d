"""Training: one optimizer step as a schedule sees it, and everything it may do to the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.interfaces import LayerLike
from lorica.model.adapters import Adapters
from lorica.model.layer import AdaptedLinear
from lorica.tensors.dtensor_ops import seeded
from lorica.training import freezing, weight_edits


class Training:
    """What a schedule sees of one optimizer step.

    Args:
        own: the schedules' home in the optimizer, `param_groups[0]["lorica"]`.

    Attributes:
        step: 0-based index of this step.
        total_steps: the horizon, where the caller gave one.
        seed: of the schedules' random draws.
        fresh: layers that were started anew after this step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        adapters: Adapters,
        own: dict[str, Any],  # Any: numbers, strings and tensors, as each schedule needs them
    ) -> None:
        self.optimizer = optimizer
        self.adapters = adapters
        self.step: int = own["step"]
        self.total_steps: int | None = own["total_steps"] or None
        self.seed: int = own["seed"]
        self.fresh: set[str] = set()
        self._states: dict[str, Any] = own["schedules"]  # Any: as above

    def generator(self, *key: object) -> torch.Generator:
        """CPU generator for this step and key: equal on every process and after every resume."""
        return seeded("/".join(map(str, (self.seed, self.step, *key))))

    def restarted(self, layers: Iterable[str]) -> None:
        """Tell all schedules that the updates of these layers were merged after this step, and
        that fresh ones train from here on: gradients still present belong to the old ones."""
        names = [*layers]
        self.fresh.update(names)
        for schedule in self.adapters.recipe.schedules:
            schedule.restarted(self._states[schedule.name], names)

    # -- the rate, for this step only

    def lr_scale(self, factor: float) -> None:
        """Multiply the scheduler's rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def lr_factor(self, factor: float) -> None:
        """Replace the scheduler's factor: lr = initial_lr · factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"]) * factor

    # -- the model

    def set_trainable(self, layers: Collection[str] | None = None, *, base: bool = False) -> None:
        """See `lorica.training.freezing.set_trainable`."""
        freezing.set_trainable(self.adapters, layers, base=base)

    def merge_(
        self, layer: LayerLike, *, link: int, generator: torch.Generator,
        accumulate: str = "base", keep_state: bool = False,
    ) -> None:  # fmt: skip
        """See `lorica.training.weight_edits.merge_`.

        Args:
            keep_state: leave the optimizer's state of the layer's parameters as it is.
        """
        assert isinstance(layer, AdaptedLinear)  # of `self.adapters`
        weight_edits.merge_(
            layer, None if keep_state else self.optimizer, link=link, accumulate=accumulate,
            init=self.adapters.recipe.init, generator=generator,
        )  # fmt: skip

    def swap_(
        self, layer: LayerLike, side: str, index: Sequence[int], rows: Tensor, *,
        keep_state: bool = False,
    ) -> None:  # fmt: skip
        """See `lorica.training.weight_edits.swap_`.

        Args:
            keep_state: leave the optimizer's state of the counterparts as it is.
        """
        assert isinstance(layer, AdaptedLinear)  # of `self.adapters`
        optimizer = None if keep_state else self.optimizer
        weight_edits.swap_(layer, optimizer, side, index, rows)
