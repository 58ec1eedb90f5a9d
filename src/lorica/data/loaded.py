"""Data sets that the `datasets` library loads, and whatever it raises on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lorica.text import no_memory, one_line, refusal

T = TypeVar("T")


def load(source: str, split: str | None, *, streaming: bool = False) -> Any:
    """What `datasets.load_dataset` makes of a folder or a hub id (`org/name:config`).

    Raises:
        ValueError: it cannot be had, or not read.
    """
    import datasets

    path, _, config = source.partition(":")
    with _told(source, split):
        return datasets.load_dataset(path, config or None, split=split, streaming=streaming)


def examples(source: str, split: str | None, data: Iterable[T]) -> Iterator[T]:
    """Those of a streamed data set: its files are opened, and found broken, as they come.

    Raises:
        ValueError: one cannot be read.
    """
    with _told(source, split):
        yield from data


@contextlib.contextmanager
def _told(source: str, split: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its builders, and what decodes for them, raise of every kind
        if no_memory(error):
            raise
        local = Path(source).is_dir()
        way_out = (
            "Mend or replace the file: `lorica.data.read`, or leaving `--streaming` out, names it"
            " and the line"
            if local
            else f"Check the path (it is taken from {Path.cwd()}), the id (`org/name`, or"
            " `org/name:config`), the split, and the network (`HF_HUB_OFFLINE=1` forbids it)"
        )
        what = "read" if local else "found here, nor loaded from the Hugging Face hub"
        raise ValueError(
            f"the data set `{source}` (split {split or 'not given'}) could not be {what}:"
            f" {_reason(error)}. {way_out}"
        ) from error


def _reason(error: BaseException) -> str:
    """Why, in one line: the error that came first says more than those made of it."""
    said = str(error)
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    if isinstance(first, StopIteration):
        return "a file of it holds no rows"
    if refused := refusal(first):
        return refused
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    why = one_line(lines[0] if lines else type(first).__name__).rstrip(".")
    if not isinstance(first, (OSError, ValueError)):
        why = f"{type(first).__name__}: {why}" if lines else why
    file = said.partition("file://")[2].split()[:1] if first is not error else []
    return f"{why} ({file[0]})" if file and file[0] not in why else why
