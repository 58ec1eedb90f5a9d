"""The folder of a run: what lies in it, who may write to it, and how it is written.

config.yaml       the options, all filled in; running it again repeats the run
defaults.json     which of them were not given, and what chose their values
metrics.jsonl     a line a log step
samples.json      a few examples, answered before and after training
result.json       a run that has it is done
report.html       the page of the run, made of the files above
adapter/ model/   what was trained
tokenizer/        one that was trained for the run
checkpoint-<n>/   complete or absent; its checkpoint.json lists the files

The command line looks at folders before torch is imported, so what needs torch
(`lorica.formats.atomic_folder`) is imported inside the functions that write.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorica.run import checkpoints, lock
from lorica.run.options import UsageError, checkpoint_path
from lorica.text import clear_errors, parse_json, to_path

logger = logging.getLogger("lorica")

HEAD = "# Written by lorica"  # how config.yaml begins
DEFAULTS = "defaults.json"
SAMPLES = "samples.json"
REPORT = "report.html"
REPORT_HEAD = "<!-- Written by lorica"  # how a page begins
LOCK = ".lock"
_PARTS = (
    "config.yaml", DEFAULTS, "metrics.jsonl", "result.json", SAMPLES, REPORT, "adapter", "model",
    "tokenizer", "runs", ".unfinished",
)  # fmt: skip
# What each run writes.
_EVERY_RUN = ("config.yaml", DEFAULTS, "metrics.jsonl", "result.json", SAMPLES, REPORT)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_TORN = ".part"  # a file that was being written


class RunFolder:
    """One run's folder.

    Args:
        path: need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = to_path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def checkpoints(self) -> list[Path]:
        """Every checkpoint, the latest last; `lorica.run.checkpoints.flaw` tells a whole one."""
        return checkpoints.found(self.path)

    @clear_errors()
    def check(
        self,
        *,
        resume: str | None,
        overwrite: bool,
        silent: bool = False,
        writes: tuple[str, ...] = ("adapter", "model"),
    ) -> Path | None:
        """The checkpoint to go on from, or None for a fresh run, and for one that had none yet.

        Args:
            silent: do not say which checkpoints are damaged.
            writes: folders that the run may write here.

        Raises:
            UsageError: a run is here already, or other things of these names, or there is nothing
                to go on from.
        """
        self._refuse_file()
        checkpoint = None
        if resume == "last":
            return self._last(silent)
        if resume is not None:
            checkpoint = self._named(resume)
            if checkpoint.parent.resolve() == self.path.resolve():
                return checkpoint
        ours = self.ours()
        done = [name for name in ("result.json", "adapter", "model") if name in ours]
        done += [name for name in ours if name.startswith("checkpoint-")]
        done = done or [name for name in ours if name == "config.yaml"]
        if done and not overwrite:
            some = ", ".join(done[:3]) + (", ..." if len(done) > 3 else "")
            raise UsageError(
                f"`--output-dir {self.path}` holds a run already ({some}); "
                + (
                    "type `--resume` to go on with it, `--overwrite-output-dir` to remove it, or"
                    " name another folder"
                    if checkpoint is None
                    else f"`--resume {resume}` goes on in another folder, or without"
                    " `--output-dir` where that checkpoint lies"
                )
            )
        self._refuse_foreign(ours, writes)
        return checkpoint

    @clear_errors()
    def ours(self) -> list[str]:
        """The names of what a run has written here; what carries no mark of a run is not among
        them."""
        told = _head_and_values(self / "config.yaml")
        result = _mapping(self / "result.json")
        finished = isinstance(result.get("versions"), dict) and "lorica" in result["versions"]
        saved = [p for p in self.checkpoints() if _is_checkpoint(p)]
        filled = isinstance(_mapping(self / DEFAULTS).get("lorica"), str)
        if told is None and not finished and not saved:
            # Written first, by a run that died there, and a page that announces a run.
            alone = {DEFAULTS: filled, REPORT: is_report(self / REPORT)}
            return [name for name, ours in alone.items() if ours]
        headed, told = told is not None, told or {}
        scratch = "model_config" in told
        output = Path(str(result.get("output"))).name if finished else ""
        model = scratch or output == "model" or (self / "model" / _OWN).is_file()
        events = [p for p in (self / "runs").rglob("*") if p.is_file()]
        logged = all("tfevents" in p.name for p in events) and told.get("report_to") != ["none"]
        marks = {
            "config.yaml": headed,
            DEFAULTS: filled,
            "metrics.jsonl": True,
            "result.json": finished,
            SAMPLES: isinstance(_mapping(self / SAMPLES).get("lorica"), str),
            REPORT: is_report(self / REPORT),
            "adapter": (self / "adapter" / _OWN).is_file(),
            "model": model,
            "tokenizer": scratch and told.get("tokenizer") is None,
            "runs": bool(events) and logged,
            ".unfinished": True,
        }
        there = [name for name in _PARTS if marks[name] and os.path.lexists(self / name)]
        return [*there, *(p.name for p in saved)]

    def _refuse_foreign(self, ours: list[str], writes: tuple[str, ...]) -> None:
        names = [name for name in (*_EVERY_RUN, *writes) if os.path.lexists(self / name)]
        names += [p.name for p in self.checkpoints()]
        if foreign := [f"`{name}`" for name in names if name not in ours]:
            raise UsageError(
                f"`--output-dir {self.path}` holds {', '.join(foreign[:3])}, which no run has"
                " written there and this one would replace; name another folder, or move"
                f" {'it' if len(foreign) == 1 else 'them'} away"
            )

    @clear_errors()
    def refuse_inputs(self, inputs: Iterable[tuple[str, str]]) -> None:
        """What is read does not lie where the run writes, or removes what an earlier one wrote.

        Args:
            inputs: flags and paths.

        Raises:
            UsageError: one does.
        """
        home = self.path.resolve()
        for flag, name in inputs:
            try:
                path = Path(name).expanduser().resolve(strict=True)
            except (OSError, ValueError, RuntimeError):  # a hub id, or what its reader will refuse
                continue
            part = path.relative_to(home).parts[:1] if path.is_relative_to(home) else ()
            if part and (part[0] in _PARTS or _CHECKPOINT.fullmatch(part[0])):
                raise UsageError(
                    f"`{flag} {name}` lies where the run writes its own `{part[0]}`"
                    f" (`--output-dir {self.path}`), and would be lost; name another"
                    " `--output-dir`, or move it"
                )

    def _refuse_file(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"`--output-dir {self.path}` is a file; name a folder")

    def _last(self, silent: bool) -> Path | None:
        last, flaws = checkpoints.newest(self.path)
        say = logger.debug if silent else logger.warning
        if last is not None:
            if flaws:
                say(f"{checkpoints.describe_flaws(flaws)}. Going on from {last.name}")
            _refuse_bare("--resume", last)
            return last
        if flaws:
            first = "Put the files back, or start" if checkpoints.mendable(flaws) else "Start"
            raise UsageError(
                f"`--resume`: no checkpoint in `{self.path}` is whole: "
                f"{checkpoints.describe_flaws(flaws)}. {first} anew with `--overwrite-output-dir`"
            )
        if (self / "result.json").is_file():
            raise UsageError(
                f"`--resume`: the run in `{self.path}` is done and kept no checkpoint; start anew"
                " with `--overwrite-output-dir`, or name another folder"
            )
        if _head_and_values(self / "config.yaml") is None:
            raise UsageError(
                f"`--resume`: there is no run in `{self.path}`; leave it out to start one, or name"
                " the run's folder with `--output-dir`"
            )
        say(f"`{self.path}` has no checkpoint yet: the run begins again at its first step")
        return None

    def _named(self, resume: str) -> Path:
        path = checkpoint_path(resume)
        if (why := checkpoints.flaw(path)) is not None:
            raise UsageError(
                f"`--resume {resume}` is no whole checkpoint: {why}. Name a folder"
                " checkpoint-<step>, or leave the path out for the last whole one"
            )
        _refuse_bare(f"--resume {resume}", path)
        return path

    @clear_errors()
    def clear(self) -> None:
        """Remove a run, and nothing else that lies here."""
        for name in self.ours():
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
                for name in {"config.yaml", DEFAULTS, "metrics.jsonl"} - there:
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
                from lorica.formats.atomic_folder import mend

                mend(self / name)
                for left in self.path.glob(f".{name}.*{_TORN}"):
                    left.unlink(missing_ok=True)

    # -- writing -----------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """Write a file at once: a reader sees the old one or the new one."""
        from lorica.formats.atomic_folder import sync, umask

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

    @clear_errors()
    def lines(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        log = self / "metrics.jsonl"
        out = []
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # torn by a kill: the last one
                read = parse_json(line)
                if isinstance(read, dict) and all(
                    isinstance(read.get(name), (int, float)) for name in ("step", "seconds")
                ):
                    out.append(read)
        return out


def is_report(file: Path) -> bool:
    """Whether a file is a page that Lorica has written."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        return opened.read(len(REPORT_HEAD)) == REPORT_HEAD.encode()
    return False


_OWN = "lorica.json"  # beside every adapter and every model whose weights trained in place


def _head_and_values(config: Path) -> dict[str, Any] | None:
    """What a config.yaml that a run wrote says; None: no run did. One that can't be read is an
    error: whose it is can't be told."""
    import yaml

    with contextlib.suppress(UnicodeDecodeError):
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        if not text.startswith(HEAD):
            return None
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            told = yaml.safe_load(text)
            return told if isinstance(told, dict) else {"": told}
        return {"": None}
    return None


def _mapping(file: Path) -> dict[str, Any]:
    """A JSON mapping, or an empty one where the file holds none."""
    with contextlib.suppress(ValueError):
        told = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return told if isinstance(told, dict) else {}
    return {}


def _is_checkpoint(path: Path) -> bool:
    return any((path / mark).is_file() for mark in (checkpoints.LIST, _OWN))


def _refuse_bare(told: str, checkpoint: Path) -> None:
    """Without the run's options nobody can tell whether those that are given are the same."""
    if not (checkpoint.parent / "config.yaml").is_file():
        raise UsageError(
            f"`{told}`: {checkpoint} can only be gone on from beside its run's config.yaml, which"
            f" is not there; copy that to {checkpoint.parent / 'config.yaml'}, or start a run of"
            " its own without `--resume`"
        )


def strict(data: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [strict(value) for value in data]
    return data
