"""Files: adapter folders, merged models and exports.

An adapter is written in PEFT's form if PEFT computes the same function from it, and in Lorica's own
form otherwise. Start with `adapter_file.py` (what a folder holds), `save.py` and `load.py`;
`peft/` is PEFT's form, `lorica_json.py` our own description beside it, and `stored_state.py`
matches a file's tensors with a model's. `merge.py`, `export.py` and `compressed.py` write what
other programs read, `describe.py` is `lorica inspect`. `safe_files.py` and `fields.py` check what
is read, and `atomic_folder.py` makes every folder complete or absent.
"""

from __future__ import annotations

from lorica.formats.describe import inspect
from lorica.formats.export import Exported, export
from lorica.formats.load import load, restore
from lorica.formats.merge import Merged, merge_to
from lorica.formats.save import save

__all__ = ["Exported", "Merged", "export", "inspect", "load", "merge_to", "restore", "save"]
