"""Checkpoints on the disk: which there are, which are whole, which have served their time.

A checkpoint is written into a folder aside, the list of its files last, and then given its name. So
a folder without that list, or one that is not what the list says, is damaged: it is named and
never gone on from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorica.text import clear_errors, parse_json

LIST = "checkpoint.json"
_SEAL = "seal"  # of the list itself
_BARE = "it holds weights only (`save_only_model`), no state of the optimizer"
ASIDE = ".unfinished"  # where a checkpoint is written before it is named, or unnamed to be removed
_NAME = re.compile(r"checkpoint-(\d+)")


@clear_errors()
def found(folder: Path) -> list[Path]:
    """Every checkpoint of a run's folder, whole or not, in the order of their steps."""
    if not folder.is_dir():
        return []
    named = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted((int(m[1]), p) for m, p in named)]


def seal(folder: Path, **more: Any) -> None:
    """Write the list of a checkpoint's files, which makes it whole.

    Args:
        more: what else to keep there, JSON-ready.
    """
    from lorica.formats.safe_files import (
        sha256,  # torch's weight, borne only where there are checkpoints
    )

    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LIST
    }
    data = {**more, "files": files}
    text = json.dumps({**data, _SEAL: _digest(data)}, indent=2)
    (folder / LIST).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What `seal` wrote of a whole checkpoint.

    Raises:
        ValueError: it was changed since.
        OSError: it cannot be read.
    """
    try:
        data = parse_json((folder / LIST).read_text(encoding="utf-8"))
        if data.pop(_SEAL) != _digest(data):
            raise ValueError("another digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{LIST} is cut or was changed") from error
    return data


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@clear_errors()
def flaw(folder: Path) -> str | None:
    """Why a run cannot go on from this folder; None: it can."""
    if (why := damage(folder)) is not None:
        return why
    if not read(folder)["whole"]:
        return _BARE
    return None


@clear_errors()
def damage(folder: Path) -> str | None:
    """What is amiss with what was written; None: nothing.

    Every byte is read: a file that was cut, or changed, or is gone is found.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / LIST).is_file():
        return f"it has no {LIST}, which is written last"
    from lorica.formats.safe_files import sha256

    try:
        told = read(folder)
    except ValueError as error:
        return str(error)
    for name, entry in told["files"].items():
        path, size, digest = folder / name, entry["bytes"], entry["sha256"]
        if not path.is_file():
            return f"{name} is missing"
        if (now := path.stat().st_size) != size:
            return f"{name} has {now:,} bytes instead of {size:,}"
        if sha256(path) != digest:
            return f"{name} holds other bytes than were written"
    return None


def newest(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The last checkpoint that a run can go on from, and what ails the later ones, by name."""
    flaws: dict[str, str] = {}
    for path in reversed(found(folder)):
        if (why := flaw(path)) is None:
            return path, flaws
        flaws[path.name] = why
    return None, flaws


def resumable(folder: Path) -> list[Path]:
    """Those of `found` that hold more than weights, by what they say of themselves."""
    out = []
    for path in found(folder):
        with contextlib.suppress(OSError, ValueError):
            if read(path)["whole"]:
                out.append(path)
    return out


def describe_flaws(flaws: dict[str, str]) -> str:
    """The flaws as one clause."""
    return "; ".join(
        f"{name} {why.removeprefix('it ') if why == _BARE else f'is damaged: {why}'}"
        for name, why in flaws.items()
    )


def mendable(flaws: dict[str, str]) -> bool:
    """Whether files that are put back would make one of them whole."""
    return any(why != _BARE for why in flaws.values())


def rotate(folder: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but none of `keep`.

    Each loses its name before its files, so that what has a name is whole.
    """
    every = found(folder)
    surplus = len(every) - max(limit, len(keep)) if limit and limit > 0 else 0
    for path in [p for p in every if p not in keep][: max(surplus, 0)]:
        aside = folder / ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        os.replace(path, aside / path.name)
        shutil.rmtree(aside)


@contextlib.contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """What fails within is told as `what` not being written.

    Raises:
        OSError: the disk is full, a limit is reached, or writing is forbidden.
    """
    from safetensors import SafetensorError

    from lorica.formats.atomic_folder import NotWritten, free, reason

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's writer raises the last
        if isinstance(error, NotSaved):
            raise
        why = reason(error.__cause__ or error if isinstance(error, NotWritten) else error)
        if not folder.is_dir():
            raise NotSaved(
                f"{what} was not written: `{folder}` is gone. It was moved or removed while this"
                " ran. What is complete in it is good: move it back, or find it where it is now,"
                " and go on from its last checkpoint with `--resume` (in Python:"
                " `resume_from_checkpoint=True`)"
            ) from error
        raise NotSaved(
            f"{what} was not written to `{folder}`: {why} ({free(folder)} are free there)."
            f" {_left(folder)}"
        ) from error


def _left(folder: Path) -> str:
    """What there is to go on from once nothing keeps the run from writing, and how."""
    if named := [path.name for path in resumable(folder)]:
        return (
            f"{named[-1]} is there, and only what came after it is lost: once that is mended, go on"
            " from it with `--resume` (in Python: `resume_from_checkpoint=True`)"
        )
    log = folder / "metrics.jsonl"
    if (folder / "config.yaml").is_file() and log.is_file() and log.stat().st_size:
        return (  # what `RunFolder.held` leaves behind
            "There is no checkpoint to go on from: once that is mended, the same command with"
            " `--resume` begins again at the first step"
        )
    return "There is no checkpoint to go on from: once that is mended, start again"


class NotSaved(OSError):
    """Something of a run could not be written; what was complete before still is."""
