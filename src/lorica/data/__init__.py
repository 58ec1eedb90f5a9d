"""Data: from a file or a hub id to token batches.

    train, held = read_splits("gsm8k.jsonl", eval_fraction=0.05)
    ready = prepare(train, tokenizer, max_length=1024, packing="best_fit")
    print(ready.report); print(show_example(ready, tokenizer))
    Trainer(..., train_dataset=ready.dataset, data_collator=ready.collator())

The column names decide what the examples are (`shapes/`, one file per shape). `read.py` reads
files, `tokenise.py` makes token ids and labels, `pack.py` packs examples into sequences of equal
length, and `collate.py` makes batches. Importing this package imports neither torch nor
transformers nor datasets; the first call does.
"""

from __future__ import annotations

from lorica.data.collate import PackedCollator
from lorica.data.labels import Labels
from lorica.data.pack import check_causal, check_isolation
from lorica.data.read import hold_out, read, read_splits
from lorica.data.shapes import Shape, detect
from lorica.data.show import show_example
from lorica.data.tokenise import Prepared, Report, prepare

__all__ = [
    "Labels",
    "PackedCollator",
    "Prepared",
    "Report",
    "Shape",
    "check_causal",
    "check_isolation",
    "detect",
    "hold_out",
    "prepare",
    "read",
    "read_splits",
    "show_example",
]
