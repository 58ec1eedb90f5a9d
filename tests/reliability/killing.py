"""Runs that are killed: real processes of the command line, forked from one that has imported all.

A child starts in milliseconds and marks, in a few bytes of shared memory and in a journal, what it
is doing, so that a kill can be aimed at a step, an evaluation or the inside of a checkpoint's
writing. The marks wrap the Trainer's methods; what they call is the real thing.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import hashlib
import io
import itertools
import json
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("start", "step", "evaluation", "checkpoint", "end")
_MARK = struct.Struct("B5I")  # the phase that it is in, and how often each began
LIMIT = 120.0  # seconds after which a run counts as hanging
WALL_CLOCK = {
    "seconds", "seconds_with_loading", "tokens_per_second", "peak_memory", "eval_runtime",
    "eval_samples_per_second", "eval_steps_per_second", "train_runtime",
    "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second",
}  # fmt: skip


# -- the process that is forked --------------------------------------------------------------------


def serve() -> None:
    """Fork a child for each line of standard input, and tell its number and how it ended."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    import datasets  # noqa: F401
    import torch

    import lorica.cli
    import lorica.formats.merge
    import lorica.run.finetune
    import lorica.run.loop
    import lorica.run.pretrain
    import lorica.run.signals
    from lorica.recipe import registry

    for axis in registry.AXES:
        for name in registry.names(axis):
            registry.find(name)
    torch.set_num_threads(1)
    codecs.lookup("latin1")  # a child that is nobody may not read Python's own files
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "warm" in asked:  # what is imported or cached at a first run is, before the first fork
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                assert lorica.cli.main(asked["warm"]) == 0, said.getvalue()
            gc.collect()
            gc.freeze()  # a child's collections then look at what is its own
            print("warm", flush=True)
            continue
        child = os.fork()
        if child == 0:
            _live(asked)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _live(asked: dict[str, Any]) -> None:
    status = 70
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if asked["user"]:
            os.setgroups([])
            os.setgid(asked["user"])
            os.setuid(asked["user"])
        if asked["largest"]:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest"],) * 2)
        _mark(Path(asked["marks"]), Path(asked["journal"]))
        from lorica.cli import main

        status = main(asked["words"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 71
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _mark(marks: Path, journal: Path) -> None:
    """Let the Trainer tell what it is doing."""
    from transformers import Trainer

    from lorica.run.trainer import TrainerMixin

    file = os.open(marks, os.O_RDWR)
    shared = mmap.mmap(file, _MARK.size)
    told = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    counts = [0] * len(PHASES)
    now = [0]

    def enter(phase: int) -> int:
        before, now[0] = now[0], phase
        counts[phase] += 1
        shared[:] = _MARK.pack(phase, *counts)
        os.write(told, f"{time.monotonic():.6f} {PHASES[phase]}\n".encode())
        return before

    def back(phase: int) -> None:
        now[0] = phase
        shared[:] = _MARK.pack(phase, *counts)
        os.write(told, f"{time.monotonic():.6f} {PHASES[phase]} again\n".encode())

    def wrap(cls: Any, name: str, phase: str, after: Any = None) -> None:
        inner = getattr(cls, name)

        def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = enter(PHASES.index(phase))
            out = inner(self, *args, **kwargs)
            if after is not None:
                os.write(told, f"{time.monotonic():.6f} {after(self)}\n".encode())
            if phase != "end":  # what is written after it belongs to it
                back(before)
            return out

        setattr(cls, name, outer)

    wrap(Trainer, "training_step", "step")
    wrap(Trainer, "evaluation_loop", "evaluation")
    saved = lambda self: f"saved {self.state.global_step}"  # noqa: E731
    wrap(TrainerMixin, "_save_checkpoint", "checkpoint", saved)
    wrap(Trainer, "_finalize_training", "end")
    enter(0)


# -- the process that kills ------------------------------------------------------------------------


@dataclass
class Child:
    """One run of the command line.

    Attributes:
        journal: what it told, `(seconds, words)`.
    """

    number: int
    nursery: Nursery
    begun: float
    words: list[object]
    status: int | None = None

    @property
    def phase(self) -> str:
        return PHASES[_MARK.unpack(self.nursery.shared[:])[0]]

    def count(self, phase: str) -> int:
        return _MARK.unpack(self.nursery.shared[:])[1 + PHASES.index(phase)]

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.number, number)

    def ended(self) -> bool:
        """Whether it is over, at once."""
        return self.status is not None or self.nursery.readable()

    def wait(self) -> int:
        """Its exit status; minus the signal's number where it was killed."""
        if self.status is None and not self.nursery.readable(LIMIT):
            self.signal(signal.SIGKILL)
        if self.status is None:
            self.status = int(self.nursery.line())
        return self.status

    @property
    def journal(self) -> list[tuple[float, str]]:
        lines = self.nursery.journal.read_text().splitlines()
        return [(float(t), words) for t, _, words in (line.partition(" ") for line in lines)]

    @property
    def said(self) -> str:
        return self.nursery.log.read_text()

    @property
    def saved(self) -> int:
        """The step of the last checkpoint whose writing has returned; 0: none."""
        steps = [int(words.split()[1]) for _, words in self.journal if words.startswith("saved")]
        return steps[-1] if steps else 0


class Nursery:
    """Where children come from; one lives at a time.

    Args:
        folder: of its own files.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.journal, self.log, self.marks = (folder / n for n in ("journal", "log", "marks"))
        self.marks.write_bytes(bytes(_MARK.size))
        self._file = open(self.marks, "r+b")
        self.shared = mmap.mmap(self._file.fileno(), _MARK.size)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )  # fmt: skip
        self._left = b""
        assert self.line() == "ready"

    def line(self) -> str:
        out = self.process.stdout
        assert out is not None
        while b"\n" not in self._left:
            got = os.read(out.fileno(), 4096)
            assert got, "the process that forks has died"
            self._left += got
        line, self._left = self._left.split(b"\n", 1)
        return line.decode()

    def readable(self, seconds: float = 0) -> bool:
        """Whether it tells something within so many seconds."""
        out = self.process.stdout
        return b"\n" in self._left or bool(select.select([out], [], [], seconds)[0])

    def start(self, words: list[object], *, user: int = 0, largest: int = 0) -> Child:
        """Run `lorica WORDS`.

        Args:
            user: as whom; 0: as this process.
            largest: bytes that a file may have; 0: any.
        """
        for path in (self.journal, self.log):
            path.write_text("")
            path.chmod(0o666)
        self.marks.chmod(0o666)
        self.shared[:] = bytes(_MARK.size)
        asked = {
            "words": [str(w) for w in words], "log": str(self.log), "journal": str(self.journal),
            "marks": str(self.marks), "user": user, "largest": largest,
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        return Child(int(self.line()), self, time.monotonic(), words)

    def warm(self, words: list[object]) -> None:
        """Run once in the process that forks, so that its children start at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"warm": [str(w) for w in words]}).encode() + b"\n")
        self.process.stdin.flush()
        assert self.line() == "warm"

    def run(self, words: list[object], **how: Any) -> Child:
        child = self.start(words, **how)
        child.wait()
        return child

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.shared.close()
        self._file.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


# -- kills -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """When to kill: a time after the `nth` beginning of a phase of the process.

    Attributes:
        phase: one of `PHASES`; "" for a time after the process's start.
    """

    phase: str
    nth: int
    delay: float


@dataclass
class Timeline:
    """How long an uninterrupted run took over what."""

    total: float
    spans: dict[str, list[float]]

    @classmethod
    def of(cls, child: Child) -> Timeline:
        journal = [(t, w) for t, w in child.journal if not w.startswith("saved")]
        spans: dict[str, list[float]] = {}
        for (t, words), (after, _) in itertools.pairwise(journal):
            if not words.endswith("again"):
                spans.setdefault(words, []).append(after - t)
        end = time.monotonic()
        spans["end"] = [max(end - t for t, w in journal if w == "end")]
        return cls(end - child.begun, spans)

    def aims(self, draw: random.Random) -> Iterator[Aim]:
        """Moments without end: three of eight anywhere, the others within a phase."""
        while True:
            phase = draw.choice(
                ["", "", "", "checkpoint", "checkpoint", "evaluation", "step", "end"]
            )
            if not phase:
                yield Aim("", 0, draw.uniform(0, self.total))
            elif spans := self.spans.get(phase):
                nth = draw.randint(1, len(spans))
                yield Aim(phase, nth, draw.uniform(0, spans[nth - 1]))


def kill(child: Child, aim: Aim) -> str | None:
    """Kill it at that moment; returns what it was doing, or None: it was done before."""
    end = child.begun + LIMIT
    if aim.phase:
        while child.count(aim.phase) < aim.nth:
            if child.ended() or time.monotonic() > end:
                return None
            time.sleep(0.001)
        moment = time.monotonic() + aim.delay
    else:
        moment = child.begun + aim.delay
    while (left := moment - time.monotonic()) > 0:
        if child.ended():
            return None
        time.sleep(min(left, 0.01))
    child.signal(signal.SIGKILL)
    doing = child.phase
    return doing if child.wait() == -signal.SIGKILL else None


@dataclass
class Count:
    """What kills did.

    Attributes:
        phases: kills by what the process was doing.
        survived: of them, those after which the run could be brought to its end.
        lost: bytes of things that were complete before a kill and not after it.
        differences: what differs from the run that nobody killed.
    """

    kills: int = 0
    survived: int = 0
    lost: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def add(self, other: Count) -> None:
        self.kills += other.kills
        self.survived += other.survived
        self.lost += other.lost
        for phase, n in other.phases.items():
            self.phases[phase] = self.phases.get(phase, 0) + n
        self.differences += other.differences


def chain(
    nursery: Nursery, words: list[object], folder: Path, straight: Snapshot, kills: int,
    aims: Iterator[Aim],
) -> Count:  # fmt: skip
    """One run, killed up to so often, resumed each time, and compared once it is done.

    Args:
        words: the run's own; `--output-dir folder` is added.
    """
    count, verb = Count(), words[0]
    while True:
        rest = ["--resume"] if (folder / "config.yaml").is_file() else words[1:]
        child = nursery.start([verb, *rest, "--output-dir", folder])
        doing = kill(child, next(aims)) if count.kills < kills else None
        if doing is None:
            break  # done before the kill came, or no more of them
        count.kills += 1
        count.phases[doing] = count.phases.get(doing, 0) + 1
        count.lost += _lost(folder, child.saved, count.differences)
    if child.wait() != 0:
        count.differences.append(f"status {child.status}: {child.said[-600:]}")
        return count
    count.survived = count.kills
    count.differences += straight.differences(Snapshot.of(folder))
    left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    count.differences += [f"{name} was left behind" for name in left]
    return count


def _lost(folder: Path, step: int, flaws: list[str]) -> int:
    """Bytes of the last checkpoint that was told written and is not there as it was."""
    from lorica.run import checkpoints

    lost = 0
    for path in checkpoints.found(folder):
        if (why := checkpoints.flaw(path)) is not None:
            flaws.append(f"{path.name}: {why}")
            lost += sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    if step and not (folder / f"checkpoint-{step}").is_dir():
        later = [p for p in checkpoints.found(folder) if int(p.name.split("-")[1]) > step]
        if not later:  # else its time was over
            flaws.append(f"checkpoint-{step} was written and is gone")
            lost += 1
    return lost


# -- comparing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What a run has left, wall-clock figures aside: a digest or a value for each name."""

    parts: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Snapshot:
        import torch

        from lorica.run import checkpoints

        parts: dict[str, Any] = {}
        for name in ("adapter", "model", "tokenizer"):
            for file in sorted((folder / name).rglob("*")):
                parts[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        for i, line in enumerate(lines):
            parts[f"metrics.jsonl, line {i + 1}"] = _timeless(json.loads(line))
        parts["metrics.jsonl, lines"] = len(lines)
        result = _timeless(json.loads((folder / "result.json").read_text()))
        parts |= {f"result.json, {k}": v for k, v in result.items() if k != "output"}
        config = (folder / "config.yaml").read_text().splitlines()
        parts["config.yaml"] = [x for x in config if not x.startswith("output_dir")]
        last = checkpoints.found(folder)[-1]
        for file in sorted(last.rglob("*")):
            name = f"last checkpoint, {file.relative_to(last)}"
            if file.suffix in (".pt", ".pth"):
                parts[name] = _digest(torch.load(file, weights_only=False))
            elif file.suffix == ".safetensors":
                parts[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            elif file.name == "trainer_state.json":
                state = json.loads(file.read_text())
                best = state["best_model_checkpoint"]
                state["best_model_checkpoint"] = best and Path(best).name
                state["log_history"] = [_timeless(x) for x in state["log_history"]]
                parts |= {f"{name}, {k}": v for k, v in state.items()}
        parts["last checkpoint"] = last.name
        return cls(parts)

    def differences(self, other: Snapshot) -> list[str]:
        """What is not the same, with both values where they are short."""
        out = []
        for name in sorted(self.parts.keys() | other.parts.keys()):
            ours, theirs = self.parts.get(name, "absent"), other.parts.get(name, "absent")
            if ours != theirs and not (ours != ours and theirs != theirs):
                ours, theirs = _apart(ours, theirs)
                out.append(f"{name}: {str(ours)[:300]} | {str(theirs)[:300]}")
        return out


def _apart(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two trees, where they part."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in {**one, **other} if one.get(k) != other.get(k)]
        pairs = {k: _apart(one.get(k), other.get(k)) for k in keys}
        return {k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()}
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [_apart(a, b) for a, b in zip(one, other, strict=True) if a != b]
        return [a for a, _ in pairs], [b for _, b in pairs]
    return one, other


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in WALL_CLOCK}


def _digest(value: Any) -> str:
    """Of a tree of tensors, numbers and words, to the bit."""
    import numpy
    import torch

    digest = hashlib.sha256()

    def walk(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        elif isinstance(part, numpy.ndarray):
            digest.update(part.tobytes())
        elif isinstance(part, dict):
            for key in part:
                digest.update(repr(key).encode())
                walk(part[key])
        elif isinstance(part, (list, tuple)):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                walk(item)
        else:
            digest.update(repr(part).encode())

    walk(value)
    return digest.hexdigest()


if __name__ == "__main__":
    serve()
