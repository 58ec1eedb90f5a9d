"""A hostile input handed to the library in a forked child, with limits, and what came of it.

The parent has imported everything, so a child costs a few milliseconds and starts from the same
memory. It has no terminal: who asks a question on standard input is answered "y" for ever.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hostile_kinds import raw

import lorica
from lorica.run.options import UsageError

HOUSE = str(Path(lorica.__file__).parent)
GROWTH = 256 << 20  # bytes that reading a file of a few KiB may add to a process
SPACE = 3 << 30  # bytes of address space above what the parent has
WALL = 20  # of the clock to the processor, on a machine that others use too
LONGEST = 4000  # characters of a message that a person may be shown
GOOD = ("success", "refused")

Step = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Outcome:
    """What came of one step.

    Attributes:
        kind: `success`; `refused` (one clear error of ours); `foreign` (anybody else's error, or a
            message without its parts); `hang`; `memory`; `killed`; `executed` (code ran).
        text: the message.
        seconds: of processor time.
        memory: most bytes that it added to the process.
    """

    step: str
    kind: str
    text: str = ""
    where: str = ""
    seconds: float = 0.0
    memory: int = 0


class Enough(BaseException):
    """A step went as far as it should."""


class Said(Exception):
    """The command line refused with this, printed by its parser."""


def judged(step: str, error: BaseException) -> Outcome:
    """Whether this is one clear error of the house."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    where = f"{last.filename}:{last.lineno}" if last else ""
    text = str(error)
    if isinstance(error, Said):
        return Outcome(step, "refused", text, where)
    ours = type(error) in (ValueError, UsageError) and where.startswith(HOUSE)
    if not ours:
        near = next((f for f in reversed(frames) if f.filename.startswith(HOUSE)), None)
        place = f" (called from {near.filename}:{near.lineno})" if near else ""
        return Outcome(step, "foreign", f"{type(error).__name__}: {text[:300]}", where + place)
    if lacking := lacks(text):
        return Outcome(step, "foreign", f"{lacking}: {text[:300]}", where)
    return Outcome(step, "refused", text, where)


def lacks(text: str) -> str | None:
    """What a message lacks: what and where (a name, a file), what is allowed and what to do."""
    if len(text) > LONGEST:
        return f"a message of {len(text)} characters"
    if not re.search(r"[`'/\"]|\w\.\w+, line \d", text):
        return "a message that names nothing"
    if not re.search(r"[;:.,)] \S", text):
        return "a message of one clause, without a way out"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text):
        return "control characters in a message"
    return None


def forked(
    steps: Sequence[Step],
    *,
    seconds: float,
    canary: Path,
    finish: Callable[[], object] | None = None,
) -> list[Outcome]:
    """Run the steps one after the other in one child, each judged by itself.

    Args:
        seconds: of processor time for all steps together, and `WALL` times that of a clock; then
            the child is killed.
        canary: a file that exists only if code from the input has run.
        finish: called before the child starts its steps (patches).
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(steps, writer, finish, math.ceil(seconds))
    os.close(writer)
    data, alive = b"", True
    end = time.monotonic() + WALL * seconds
    while alive:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            break
        block = os.read(reader, 1 << 16)
        data, alive = data + block, bool(block)
    os.close(reader)
    if alive:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = [Outcome(**json.loads(line)) for line in data.splitlines() if line.endswith(b"}")]
    if len(found) < len(steps):
        step = steps[len(found)][0]
        spent = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        kind = "hang" if alive or spent else "killed"
        found.append(Outcome(step, kind, f"{seconds} s" if alive else f"status {status}"))
    if canary.exists():
        canary.unlink()
        found.append(Outcome(steps[-1][0], "executed", "code from the input has run"))
    return found


def _child(
    steps: Sequence[Step], writer: int, finish: Callable[[], object] | None, limit: int
) -> None:
    try:
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        pages = Path("/proc/self/statm").read_text().split()
        size = resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (int(pages[0]) * size + SPACE,) * 2)
        before = int(pages[1]) * size
        out = tempfile.TemporaryFile()
        answers = tempfile.TemporaryFile()
        answers.write(b"y\n" * 100)
        answers.seek(0)
        for source, target in ((answers, 0), (out, 1), (out, 2)):
            os.dup2(source.fileno(), target)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        if finish is not None:
            finish()
        for name, step in steps:
            began = time.process_time()
            try:
                step()
                found = Outcome(name, "success")
            except Enough:
                found = Outcome(name, "success")
            except BaseException as error:
                found = judged(name, error)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            kind = "memory" if peak > GROWTH and found.kind in GOOD else found.kind
            told = asdict(found) | {
                "kind": kind, "seconds": time.process_time() - began, "memory": peak,
            }  # fmt: skip
            os.write(writer, json.dumps(told).encode() + b"\n")
    finally:
        os._exit(0)


def command(*words: object) -> None:
    """`lorica ...` in this process; its one error is raised, what is more than one message too."""
    from lorica import cli

    errors: list[Exception] = []
    plain = cli._message

    def message(error: Exception, smaller: str) -> str:
        errors.append(error)
        return plain(error, smaller)

    cli._message = message
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as told,
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(told if "--json" not in words else sys.stdout),
    ):
        try:
            status = cli.main([str(word) for word in words])
        finally:
            cli._message = plain
        told.seek(0)
        text = told.read()
    if (found := raw(text)) is not None:
        raise RuntimeError(f"{found} reaches the terminal: {text[-300:]!r}")
    if status == 0:
        return
    if errors:
        messages = [line for line in text.splitlines() if line.startswith("lorica: ")]
        if status not in (1, 2) or len(messages) != 1 or "Traceback" in text:
            raise RuntimeError(f"status {status}, {len(messages)} messages: {text[-300:]}")
        raise errors[0]
    raise Said(text)


def normal(text: str) -> str:
    """A message without what differs from input to input."""
    text = re.sub(r"(?<![\w.])/[^\s:,;)'`\"]*", "PATH", text)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`", "X", text)
    text = re.sub(r"\([^()]*\)", "()", text)
    text = re.sub(r"-?\d[\d.,e+]*", "N", text)
    text = re.sub(r"X(?:, X)+", "X", text)
    return " ".join(text.split())[:160]
