"""The folder of a run: what lies in it, who may write to it, and how it is written.

config.yaml       the options, all filled in; running it again repeats the run
metrics.jsonl     a line a log step
result.json       written last: a run that has it is done
adapter/ model/   what was trained
tokenizer/        one that was trained for the run
checkpoint-<n>/   complete or absent
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorica.train.options import UsageError

LOCK = ".lock"
_PARTS = (
    "config.yaml", "metrics.jsonl", "result.json", "adapter", "model", "tokenizer", "runs",
    ".unfinished",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """One run's folder.

    Args:
        path: need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the latest last."""
        if not self.path.is_dir():
            return []
        found = [(m, p) for p in self.path.iterdir() if (m := _CHECKPOINT.fullmatch(p.name))]
        done = [(int(m[1]), p) for m, p in found if (p / "trainer_state.json").is_file()]
        return [path for _, path in sorted(done)]

    def check(self, *, resume: str | None, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, or None for a fresh run.

        Raises:
            UsageError: a run is here already, or there is nothing to go on from.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"`--output-dir {self.path}` is a file; name a folder")
        if resume is not None:
            return self._resumed(resume)
        done = [name for name in ("result.json", "adapter", "model") if (self / name).exists()]
        done += [p.name for p in self.checkpoints()]
        if done and not overwrite:
            some = ", ".join(done[:3]) + (", ..." if len(done) > 3 else "")
            raise UsageError(
                f"`--output-dir {self.path}` holds a run already ({some}); type `--resume` to go"
                " on with it, `--overwrite-output-dir` to remove it, or name another folder"
            )
        return None

    def _resumed(self, resume: str) -> Path:
        if resume == "last":
            if not (every := self.checkpoints()):
                raise UsageError(
                    f"`--resume`: there is no complete checkpoint in `{self.path}`; leave it out to"
                    " start anew, or name the run's folder with `--output-dir`"
                )
            return every[-1]
        path = Path(resume).expanduser()
        if not (path / "trainer_state.json").is_file():
            raise UsageError(
                f"`--resume {resume}` is no complete checkpoint (it has no trainer_state.json);"
                " name a folder checkpoint-<step>, or leave the path out for the last one"
            )
        return path

    def clear(self) -> None:
        """Remove a run, and nothing else that lies here."""
        for path in self.path.iterdir() if self.path.is_dir() else []:
            if path.name in _PARTS or _CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within this context the folder is this process's alone; what a failure leaves unfinished
        is removed, complete checkpoints stay.

        Raises:
            ValueError: another living process holds it.
        """
        fresh = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            yield
        except BaseException:
            shutil.rmtree(self / ".unfinished", ignore_errors=True)
            log = self / "metrics.jsonl"
            if not self.checkpoints() and not (log.is_file() and log.stat().st_size):
                for name in ("config.yaml", "metrics.jsonl"):
                    (self / name).unlink(missing_ok=True)
                shutil.rmtree(self / "tokenizer", ignore_errors=True)
            raise
        finally:
            (self / LOCK).unlink(missing_ok=True)
            for path in fresh:
                with contextlib.suppress(OSError):  # not empty: something was made
                    path.rmdir()

    def _lock(self) -> None:
        lock, own = self / LOCK, f"{os.getpid()} {socket.gethostname()}"
        for _ in range(2):
            try:
                handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._break_stale(lock)
                continue
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(own)
            return
        raise ValueError(f"`{self.path}` was taken by another process just now; try again")

    def _break_stale(self, lock: Path) -> None:
        """Take a dead process's lock away; a living one's is an error."""
        try:
            owner = lock.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        if _lives(owner.split()):
            raise ValueError(
                f"`{self.path}` is in use by process {' on '.join(owner.split())}: two runs cannot"
                " share a folder. Name another with `--output-dir`; if that process is gone, remove"
                f" {lock}"
            )
        aside = lock.with_name(f"{LOCK}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.replace(lock, aside)
            if aside.read_text(encoding="utf-8") != owner:  # another process was faster: give back
                os.replace(aside, lock)
            else:
                aside.unlink()

    # -- writing -----------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """Write a file at once: a reader sees the old one or the new one."""
        from lorica.io.folder import umask  # torch's weight, borne only by a run that writes

        handle, aside = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o666 & ~umask())
            os.replace(aside, self / name)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise

    def lines(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        log = self / "metrics.jsonl"
        out = []
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):  # torn by a kill: the last one at most
                out.append(json.loads(line))
        return out


def strict(data: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [strict(value) for value in data]
    return data


def _lives(owner: list[str]) -> bool:
    """Whether the process that wrote the lock may still run."""
    if len(owner) != 2 or not owner[0].isdigit():
        return False  # torn while it was written
    if owner[1] != socket.gethostname():
        return True  # another machine's: there is no telling
    try:
        os.kill(int(owner[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
