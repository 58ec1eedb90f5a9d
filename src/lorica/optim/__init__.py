"""Rules: how a gradient becomes an update.

A rule builds an ordinary `torch.optim.Optimizer` from parameter groups, so schedulers, checkpoints,
gradient clipping, Accelerate and the Trainer work unchanged. To add one: copy `adamw.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorica.rooms import Choice


@dataclass(frozen=True, kw_only=True)
class AbstractRule(Choice, abc.ABC):
    room: ClassVar[str] = "optim"
    trainer_names: ClassVar[frozenset[str]] = frozenset()  # values of `--optim` that mean this rule
    state_per_element: ClassVar[int] = 0  # float32 state elements per trained element

    @abc.abstractmethod
    def build(
        self, groups: list[dict[str, Any]], options: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """Make the optimizer. `options` (betas, eps, fused) are the caller's, e.g. the
        Trainer's."""
