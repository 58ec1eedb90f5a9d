"""Objectives: what is done to the task's loss: a penalty, a distillation, a re-weighting."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lorica.rooms import Choice


@dataclass(frozen=True)
class Context:
    """What an objective sees of one micro-batch."""

    outputs: Any
    batch: Any
    adapters: Any
    share: float = 1.0  # of the update, by label tokens: what a penalty is multiplied with


@dataclass(frozen=True, kw_only=True)
class AbstractObjective(Choice, abc.ABC):
    room: ClassVar[str] = "objectives"

    @abc.abstractmethod
    def loss(self, task_loss: Tensor, context: Context) -> Tensor:
        """The loss to differentiate, from the task's (0-d)."""
