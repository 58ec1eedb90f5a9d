"""Files: adapters (in PEFT's form where PEFT's formula is exact), merged models, and what a folder
holds."""

from __future__ import annotations

from lorica.formats.describe import inspect
from lorica.formats.export import Exported, export
from lorica.formats.merge import Merged, merge_to
from lorica.formats.native import load, restore, save

__all__ = ["Exported", "Merged", "export", "inspect", "load", "merge_to", "restore", "save"]
