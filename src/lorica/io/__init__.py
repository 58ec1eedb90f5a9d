"""Files: adapters (in PEFT's form where PEFT's formula is exact), merged models, and what a folder
holds."""

from __future__ import annotations

from lorica.io.describe import inspect
from lorica.io.export import Exported, export
from lorica.io.merged import Merged, merge_to
from lorica.io.native import load, restore, save

__all__ = ["Exported", "Merged", "export", "inspect", "load", "merge_to", "restore", "save"]
