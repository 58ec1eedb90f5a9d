"""The embedded tasks under names that stand where a data set's path would.

`lorica:new` are the new tasks, `lorica:old` the old ones, `lorica:new+old` both in turn: who trains
on the new ones alone forgets the old ones. Each has a split `train` and a split `test`. Rows are
generated, so `max_samples` may ask for more than there are by default, and fewer are always the
beginning of more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.embedded.sampling import SIDES, generate

PREFIX = "lorica:"
NEW = f"{PREFIX}new"  # what `--data` means where it is left out
BOTH = f"{PREFIX}new+old"
TRAIN, TEST = SIDES
# Hidden column with the place an example came from ("train.jsonl, line 12"), so that an error found
# long after reading can still name the file and the line.
WHERE = "__where__"
ROWS = {TRAIN: 2000, TEST: 200}  # without `max_samples`


def is_embedded(source: str | Path) -> bool:
    """Whether a data set's name means embedded tasks.

    Example:
        >>> is_embedded("lorica:new"), is_embedded("train.jsonl")
        (True, False)
    """
    return str(source).startswith(PREFIX)


def examples(source: str, split: str | None = None, count: int | None = None) -> list[dict]:
    """The rows of one of the names above, as `generate` makes them. The same on every machine.

    Args:
        source: `lorica:` and kinds of tasks joined by `+`; the kinds take turns.
        split: `train` (the default) or `test`, which share no input.
        count: how many rows. Default: 2,000 of `train`, 200 of `test`.

    Raises:
        ValueError: another kind or split.

    Example:
        >>> [row["task"] for row in examples("lorica:new+old", "test", 4)]
        ['tail', 'add', 'descend', 'swap']
    """
    kinds = source.removeprefix(PREFIX).split("+")
    split = TRAIN if split is None else split
    if split not in SIDES:
        raise ValueError(
            f"`split={split!r}` was given for `{source}`, which has the splits"
            f" {' and '.join(f'`{side}`' for side in SIDES)}: type one of these"
        )
    count = ROWS[split] if count is None else count
    try:
        streams = [generate(kind, -(-count // len(kinds)), seed=0, side=split) for kind in kinds]
    except ValueError:
        raise ValueError(
            f"the data `{source}` is none of the embedded ones: allowed are `{NEW}`,"
            f" `{PREFIX}old` and `{BOTH}`; the new tasks are `{NEW}`"
        ) from None
    return [streams[i % len(kinds)][i // len(kinds)] for i in range(count)]


def dataset(source: str, split: str | None = None, count: int | None = None) -> Any:
    """`examples` as a `datasets.Dataset`; every row knows its place."""
    import datasets

    rows = examples(source, split, count)
    name = f"{source} ({TRAIN if split is None else split})"
    return datasets.Dataset.from_list(
        [{**row, WHERE: f"{name}, row {i}"} for i, row in enumerate(rows, 1)]
    )
