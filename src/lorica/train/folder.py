"""The folder of a run: what lies in it, who may write to it, and how it is written.

config.yaml       the options, all filled in; running it again repeats the run
metrics.jsonl     a line a log step
result.json       written last: a run that has it is done
adapter/ model/   what was trained
tokenizer/        one that was trained for the run
checkpoint-<n>/   complete or absent; its checkpoint.json lists the files
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorica.train import checkpoints, lock
from lorica.train.options import UsageError

logger = logging.getLogger("lorica")

LOCK = ".lock"
_PARTS = (
    "config.yaml", "metrics.jsonl", "result.json", "adapter", "model", "tokenizer", "runs",
    ".unfinished",
)  # fmt: skip
_TORN = ".part"  # a file that was being written


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
        """Every checkpoint, the latest last; `lorica.train.checkpoints.flaw` tells a whole one."""
        return checkpoints.found(self.path)

    def check(self, *, resume: str | None, overwrite: bool, silent: bool = False) -> Path | None:
        """The checkpoint to go on from, or None for a fresh run, and for one that had none yet.

        Args:
            silent: do not say which checkpoints are damaged.

        Raises:
            UsageError: a run is here already, or there is nothing to go on from.
        """
        self._refuse_file()
        if resume is not None:
            return self._last(silent) if resume == "last" else self._named(resume)
        done = [name for name in ("result.json", "adapter", "model") if (self / name).exists()]
        done += [p.name for p in self.checkpoints()]
        if done and not overwrite:
            some = ", ".join(done[:3]) + (", ..." if len(done) > 3 else "")
            raise UsageError(
                f"`--output-dir {self.path}` holds a run already ({some}); type `--resume` to go"
                " on with it, `--overwrite-output-dir` to remove it, or name another folder"
            )
        return None

    def _refuse_file(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"`--output-dir {self.path}` is a file; name a folder")

    def _last(self, silent: bool) -> Path | None:
        last, flaws = checkpoints.newest(self.path)
        say = logger.debug if silent else logger.warning
        if last is not None:
            if flaws:
                say(f"{checkpoints.told(flaws)}. Going on from {last.name}")
            return last
        if flaws:
            raise UsageError(
                f"`--resume`: no checkpoint in `{self.path}` is whole: {checkpoints.told(flaws)}."
                " Put the files back, or start anew with `--overwrite-output-dir`"
            )
        if (self / "result.json").is_file():
            raise UsageError(
                f"`--resume`: the run in `{self.path}` is done and kept no checkpoint; start anew"
                " with `--overwrite-output-dir`, or name another folder"
            )
        if not (self / "config.yaml").is_file():
            raise UsageError(
                f"`--resume`: there is no run in `{self.path}`; leave it out to start one, or name"
                " the run's folder with `--output-dir`"
            )
        say(f"`{self.path}` has no checkpoint yet: the run begins again at its first step")
        return None

    def _named(self, resume: str) -> Path:
        path = Path(resume).expanduser()
        if (why := checkpoints.flaw(path)) is not None:
            raise UsageError(
                f"`--resume {resume}` is no whole checkpoint: {why}. Name a folder"
                " checkpoint-<step>, or leave the path out for the last whole one"
            )
        return path

    def clear(self) -> None:
        """Remove a run, and nothing else that lies here."""
        for path in self.checkpoints():
            shutil.rmtree(path)
        for name in _PARTS:
            path = self / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within this context the folder is this process's alone; what a failure leaves unfinished
        is removed, and so is a folder in which nothing was made. Complete things stay.

        Raises:
            ValueError: another living process holds it.
            UsageError: nothing can be written there.
        """
        self._refuse_file()
        fresh = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = {p.name for p in self.path.iterdir()}
            handle = lock.take(self / LOCK)
        except OSError as error:
            raise UsageError(
                f"`--output-dir {self.path}` cannot be written to ({error.strerror}); name another"
                " folder"
            ) from None
        try:
            self._mend()
            yield
        except BaseException:
            shutil.rmtree(self / ".unfinished", ignore_errors=True)
            log = self / "metrics.jsonl"
            if not self.checkpoints() and not (log.is_file() and log.stat().st_size):
                for name in {"config.yaml", "metrics.jsonl"} - there:
                    with contextlib.suppress(OSError):  # what failed is the error to tell
                        (self / name).unlink()
                if "tokenizer" not in there:
                    shutil.rmtree(self / "tokenizer", ignore_errors=True)
            raise
        finally:
            lock.release(self / LOCK, handle)
            for path in fresh:
                with contextlib.suppress(OSError):  # not empty: something was made
                    path.rmdir()

    def _mend(self) -> None:
        """Clear away what a process that died here was writing."""
        shutil.rmtree(self / ".unfinished", ignore_errors=True)
        for name in _PARTS:
            if any(self.path.glob(f".*{name}.*")):
                from lorica.io.folder import mend  # torch's weight, seldom borne

                mend(self / name)
                for left in self.path.glob(f".{name}.*{_TORN}"):
                    left.unlink(missing_ok=True)

    # -- writing -----------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """Write a file at once: a reader sees the old one or the new one."""
        from lorica.io.folder import sync, umask  # torch's weight, borne only by a run that writes

        handle, aside = tempfile.mkstemp(prefix=f".{name}.", suffix=_TORN, dir=self.path)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o666 & ~umask())
            os.replace(aside, self / name)
            sync(self.path)
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
