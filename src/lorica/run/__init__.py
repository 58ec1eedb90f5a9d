"""Training runs: from options to a finished run folder, on the Hugging Face Trainer.

`finetune.py` is `lorica train`, `pretrain.py` is `lorica pretrain`, and `options/` holds their
options. Both are a line of functions over one plan (`plan.py`): data → arguments → model → train.
What they share is in `start.py`, `arguments.py`, `resume.py` and `loop.py`. `trainer.py` makes any
Trainer train adapters. `folder.py`, `config.py` and `checkpoints.py` say what a run writes and
resumes from, and `guard.py` stops runs that diverge.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Reference": "lorica.run.reference",
    "SaveOnSignal": "lorica.run.signals",
    "Trainer": "lorica.run.trainer",
    "TrainerMixin": "lorica.run.trainer",
}
__all__ = ["Reference", "SaveOnSignal", "Trainer", "TrainerMixin"]

if TYPE_CHECKING:
    from lorica.run.reference import Reference as Reference
    from lorica.run.signals import SaveOnSignal as SaveOnSignal
    from lorica.run.trainer import Trainer as Trainer
    from lorica.run.trainer import TrainerMixin as TrainerMixin


def __getattr__(name: str) -> Any:  # transformers' Trainer is heavy: imported on first use
    if name not in _WHERE:
        raise AttributeError(f"module 'lorica.run' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
