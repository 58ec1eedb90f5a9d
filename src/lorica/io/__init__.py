"""Files: adapters (PEFT's form where PEFT's formula is exact), merged models, and what a file
holds."""

from __future__ import annotations

from lorica.io.native import load, restore, save

__all__ = ["load", "restore", "save"]
