"""Files: adapter folders, merged models and exports.

An adapter is written in PEFT's form if PEFT computes the same function from it, and in Lorica's own
form otherwise. Start with `native.py` (save and load); `peft.py` is PEFT's form, `merge.py` and
`export.py` write what other programs read, `describe.py` is `lorica inspect`, and
`atomic_folder.py` makes every folder complete or absent.
"""

from __future__ import annotations

from lorica.formats.describe import inspect
from lorica.formats.export import Exported, export
from lorica.formats.merge import Merged, merge_to
from lorica.formats.native import load, restore, save

__all__ = ["Exported", "Merged", "export", "inspect", "load", "merge_to", "restore", "save"]
