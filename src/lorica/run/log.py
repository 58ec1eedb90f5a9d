"""What a run says while it runs: a line a log step, in metrics.jsonl and on standard error."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lorica.run.checkpoints import saving
from lorica.run.folder import RunFolder, strict
from lorica.run.progress import Bar, Remaining, left, pauses

if TYPE_CHECKING:
    from lorica.inference.metrics import Scores

logger = logging.getLogger("lorica")

DEGENERATE = "eval_degenerate"  # in an evaluation's figures, and no number
CONFUSION = "confusion"  # beside them, in the Trainer's log


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of the accelerator's allocator, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RunLog(TrainerCallback, ExportableState):
    """Writes metrics.jsonl, tells of progress, evaluates at the last step, and stops a run whose
    loss is no number.

    What a line holds is in the Trainer's own log too, which every checkpoint keeps. So a file that
    was deleted, emptied, cut or changed, while the run went on or before it is resumed, is written
    anew with every line, and a warning says so.

    Args:
        folder: where metrics.jsonl lies; lines after the step that a run goes on from are dropped.
        device: whose memory is measured.
        facts: saved with every checkpoint, e.g. the hash of the data.
        main: whether this process is the one that writes.
        remedy: what else to say where the loss is no number.
        tokens_per_step: where every step has as many; None: the Trainer counts them.
        scores: the task's, which keep the confusion of the last evaluation.
        pause: what an evaluation takes, in training steps, until one was measured.
    """

    def __init__(
        self,
        folder: RunFolder,
        device: torch.device,
        facts: dict[str, Any],
        main: bool = True,
        *,
        remedy: str = "",
        tokens_per_step: int | None = None,
        scores: Scores | None = None,
        pause: float = 0.0,
    ) -> None:
        self.folder, self.device, self.facts, self.main = folder, device, facts, main
        self.remedy, self.tokens_per_step, self.scores = remedy, tokens_per_step, scores
        self.before = 0.0  # seconds of the sessions that this one goes on from
        self.start = self.last = self.mark = time.perf_counter()
        self.idle = 0.0  # seconds since the last line in which nothing was trained
        self.first = self.tokens = 0  # step and tokens that this session begins with
        self.remaining = Remaining(0, pause)
        self.bar = Bar(main and sys.stderr.isatty())
        self.evaluated = 0  # batches of the evaluation that is going on
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl
        self.stamp: tuple[int, ...] | None = None  # of the file as this process left it

    def state(self) -> dict[str, Any]:
        log = self.folder / "metrics.jsonl"
        if self.main and log.is_file():  # the lines reach the disk before the checkpoint does
            with open(log, "rb") as file:
                os.fsync(file.fileno())
        return {"args": {}, "attributes": {"facts": self.facts}}

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin(state)

    def begin(self, state: Any) -> None:
        """Keep the lines up to the step that the run goes on from."""
        step = state.global_step
        found = [line for line in self.folder.lines() if line["step"] <= step] if step else []
        self.lines = [strict(_line(entry)) for entry in state.log_history if "seconds" in entry]
        resumed = (self.folder / f"checkpoint-{step}").is_dir()
        if self.lines and resumed and found != self.lines:
            self._warn(f"it held {len(found)} of the {len(self.lines)} lines up to step {step}")
        self.lines = self.lines or found  # a checkpoint of an older version has none
        self.before = max((line["seconds"] for line in self.lines), default=0.0)
        self.first, self.tokens = step, state.num_input_tokens_seen
        self.remaining = Remaining(step, self.remaining.pause)
        if self.main:
            self._rewrite()
        self.start = self.last = self.mark = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        now = time.perf_counter()
        self.remaining.stepped(now - self.mark)
        self.mark = now
        if self.tokens_per_step is not None:
            state.num_input_tokens_seen = state.global_step * self.tokens_per_step
        if state.global_step >= state.max_steps:
            control.should_log = True
            # Where it goes by passes, the end of the last one does it.
            control.should_evaluate = args.eval_strategy == "steps"
            control.should_save = args.save_strategy == "steps"
        else:
            done, whole = state.global_step, state.max_steps
            self.bar.draw(done, whole, f"step {done}/{whole}  {self._left(args, state)}")
        return control

    def _left(self, args: Any, state: Any) -> str:
        done, last = state.global_step, state.max_steps
        epochs = float(state.num_train_epochs or 1)
        planned = pauses(args, self.first, last, epochs)
        return left(self.remaining.seconds(done, last, pauses=planned))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.bar.shown and eval_dataloader is not None:
            self.evaluated += 1
            whole = len(eval_dataloader)
            words = f"step {state.global_step}: evaluating, batch {self.evaluated} of {whole}"
            self.bar.draw(self.evaluated, whole, words)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._train_line(args, state, logs)
        elif any(name.startswith("eval_") for name in logs):
            self._eval_line(state, logs)

    def _train_line(self, args: Any, state: Any, logs: dict[str, Any]) -> None:
        now = time.perf_counter()
        tokens, self.tokens = state.num_input_tokens_seen - self.tokens, state.num_input_tokens_seen
        pace = tokens / max(now - self.last - self.idle, 1e-9)
        self.last, self.idle = now, 0.0
        entry = state.log_history[-1]  # what was just logged; a checkpoint keeps it
        entry |= {"tokens": state.num_input_tokens_seen, "seconds": round(self.seconds, 3)}
        entry |= {"tokens_per_second": round(pace, 1), "peak_memory": peak_memory(self.device)}
        self._write(entry)
        done = state.global_step
        rate = logs.get("learning_rate", 0)
        self._say(
            f"step {done}/{state.max_steps}  loss {logs['loss']:.4f}"
            f"  lr {rate:.2e}  {pace:,.0f} tokens/s  {self._left(args, state)}"
        )
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"the loss is {logs['loss']} at step {done}: training has diverged. Lower"
                f" `--learning-rate`, or raise `--warmup-ratio`{self.remedy}"
            )

    def _eval_line(self, state: Any, logs: dict[str, Any]) -> None:
        figures = {k: v for k, v in logs.items() if k.startswith("eval_") and measures(k)}
        alike = logs.get(DEGENERATE)
        entry = state.log_history[-1]
        entry["seconds"] = round(self.seconds, 3)
        self._keep_confusion(state, entry)
        self._write(entry)
        shown = "  ".join(f"{k[5:]} {v:.4f}" for k, v in figures.items())
        self._say(f"step {state.global_step}/{state.max_steps}  evaluation: {shown}")
        if alike is not None and self.main:
            logger.warning(
                f"step {state.global_step}: {alike['text']}. Early in a run that is usual; if it"
                " stays so, give more steps (`--max-steps`), or a higher or lower"
                " `--learning-rate`"
            )
        self._rested(whole=True)

    def _keep_confusion(self, state: Any, entry: dict[str, Any]) -> None:
        """Beside this evaluation's figures; of the earlier ones only the best keeps its own, as
        every checkpoint holds the whole log."""
        if self.scores is None or self.scores.confused is None:
            return
        for other in state.log_history:
            if other["step"] != state.best_global_step:
                other.pop(CONFUSION, None)
        entry[CONFUSION] = self.scores.confused

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rested(whole=args.eval_strategy == "no")

    def _rested(self, *, whole: bool) -> None:
        """An evaluation or a checkpoint took the time since the step's end."""
        now = time.perf_counter()
        self.remaining.paused(now - self.mark, whole=whole)
        self.idle, self.mark, self.evaluated = self.idle + now - self.mark, now, 0

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line, to a file that holds all those before it."""
        if not self.main:
            return
        line = strict(_line(entry))
        with saving(f"the line of step {line['step']} in metrics.jsonl", self.folder.path):
            self.check()
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        self.stamp = self._stamp()

    def check(self) -> None:
        """The file is as this process left it; else it is written anew."""
        if not self.main or self._stamp() == self.stamp:
            return
        if (found := self.folder.lines()) != self.lines:
            self._warn(f"it held {len(found)} of {len(self.lines)} lines")
        self._rewrite()

    def _rewrite(self) -> None:
        with saving("metrics.jsonl", self.folder.path):
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            self.folder.write("metrics.jsonl", text)
        self.stamp = self._stamp()

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            told = os.stat(self.folder / "metrics.jsonl")
        except OSError:
            return None
        return told.st_ino, told.st_size, told.st_mtime_ns

    def _warn(self, what: str) -> None:
        if self.main:
            logger.warning(
                f"{self.folder / 'metrics.jsonl'} was deleted, cut or changed by something else"
                f" ({what}). It is written again with every line"
            )

    def _say(self, text: str) -> None:
        self.bar.clear()
        if self.main:
            logger.info(text)


class StreamPlace(TrainerCallback, ExportableState):
    """Where a streamed data set is to be gone on with, in every checkpoint.

    Args:
        streamed: see `lorica.data.streamed.Streamed`.
        rows_per_step: over all processes.
    """

    def __init__(self, streamed: Any, rows_per_step: int) -> None:
        self.streamed, self.rows_per_step, self.consumed = streamed, rows_per_step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of a resumed run the Trainer counts the steps since; a stream is one pass.
        state.epoch = state.global_step / state.max_steps
        self.consumed = state.global_step * self.rows_per_step
        self.streamed.place(self.consumed)  # earlier ones are not needed again

    def state(self) -> dict[str, Any]:
        place = self.streamed.place(self.consumed)
        return {"args": {}, "attributes": {"place": place, "consumed": self.consumed}}


def _line(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl, of an entry of the Trainer's log."""
    cost = ("tokens", "seconds", "tokens_per_second", "peak_memory")
    if "loss" in entry:
        names = ("loss", "grad_norm", "learning_rate", *cost)
        epoch = {"epoch": round(entry["epoch"], 6)}
        return {"step": entry["step"], **epoch, **{k: entry[k] for k in names if k in entry}}
    figures = {k: v for k, v in entry.items() if k.startswith("eval_") and measures(k)}
    alike = entry.get(DEGENERATE)
    return {"step": entry["step"], **figures, "seconds": entry["seconds"]} | (
        {} if alike is None else {"degenerate": degenerate(alike)}
    )


def degenerate(told: dict[str, Any]) -> dict[str, Any]:
    """What a file holds of an evaluation that gave one class only (`lorica.inference.metrics`)."""
    return {name: told[name] for name in ("class", "share")}


def measures(name: str) -> bool:
    """Whether it is a figure of the model, not of the machine."""
    return name != DEGENERATE and not name.endswith(("_runtime", "_per_second", "_time"))
