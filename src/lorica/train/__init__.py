"""Training on the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Reference": "lorica.train.reference",
    "SaveOnSignal": "lorica.train.signals",
    "Trainer": "lorica.train.trainer",
    "TrainerMixin": "lorica.train.trainer",
}
__all__ = ["Reference", "SaveOnSignal", "Trainer", "TrainerMixin"]

if TYPE_CHECKING:
    from lorica.train.reference import Reference as Reference
    from lorica.train.signals import SaveOnSignal as SaveOnSignal
    from lorica.train.trainer import Trainer as Trainer
    from lorica.train.trainer import TrainerMixin as TrainerMixin


def __getattr__(name: str) -> Any:  # transformers' Trainer is heavy: imported by whoever needs it
    if name not in _WHERE:
        raise AttributeError(f"module 'lorica.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
