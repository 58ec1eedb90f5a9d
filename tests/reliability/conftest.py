"""Real processes, and what they train on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import Subjects
from killing import Child, Nursery, Snapshot


@pytest.fixture(scope="session")
def ground() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="lorica-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def subjects(ground: Path) -> Subjects:
    return Subjects(ground / "files").make()


@pytest.fixture(scope="session")
def nursery(ground: Path, subjects: Subjects) -> Iterator[Nursery]:
    before = os.umask(0o022)
    with Nursery(ground / "nursery") as made:
        for verb in ("train", "pretrain"):
            made.warm([*subjects.words(verb, "lora", 0), "--output-dir", ground / f"warm-{verb}"])
        yield made
    os.umask(before)


@pytest.fixture(scope="session")
def straight(ground: Path, subjects: Subjects, nursery: Nursery) -> tuple[Path, Snapshot, Child]:
    """A run that nobody disturbed: its folder, what it left, and its process."""
    folder = ground / "straight"
    child = nursery.run([*words(subjects), "--output-dir", folder])
    assert child.status == 0, child.said
    return folder, Snapshot.of(folder), child


def words(subjects: Subjects) -> list[object]:
    """A run with an event at every second step, checkpoints 2, 4, 6, 8, 9, of which three stay."""
    return subjects.words("train", "relora(every=2)+dora", 0)
