"""Groups: who trains, and at which rate.

A group sees every trained parameter with its declared role, and adjusts the options of its
optimizer group.
To add one: copy `loraplus.py`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lorica.rooms import Choice


@dataclass(frozen=True)
class Trained:
    """One trained parameter, as its owner declares it."""

    name: str  # path in the model
    parameter: nn.Parameter
    role: str  # "A", "B", "diagonal", "core", "magnitude", "bias", "module"
    site: str  # path of the layer it belongs to
    lookup: bool = False  # belongs to an adapted embedding


@dataclass(frozen=True, kw_only=True)
class AbstractGroup(Choice, abc.ABC):
    room: ClassVar[str] = "groups"
    freezes: ClassVar[frozenset[str]] = frozenset()  # roles that stay at their start

    @abc.abstractmethod
    def adjust(self, trained: Trained, options: dict[str, Any]) -> dict[str, Any]:
        """Options (`lr`, `weight_decay`) of this parameter's optimizer group."""
