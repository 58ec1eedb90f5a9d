"""What the verbs that train share: transformers' own options, and the file of a resumed run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lorica.cli._outcome import Others
from lorica.run.effects import DECIDED
from lorica.run.folder import REPORT
from lorica.run.options import RunOptions, UsageError, checkpoint_path
from lorica.run.stopping import Stopped

SMALLER = (
    "type `--gradient-checkpointing`, a smaller `--per-device-train-batch-size` (with as many more"
    " `--gradient-accumulation-steps` the step stays the same; of an evaluation it is"
    " `--per-device-eval-batch-size`), or a smaller `--max-length`"
)


class TrainingFields(Others):
    """Fields of transformers' TrainingArguments, under their own names; only asked where a flag or
    key is not one of ours, as transformers takes a second to import.

    Args:
        options: the verb's own options, which take their names away.
        verb: for messages.
    """

    def __init__(self, options: type, verb: str) -> None:
        self.options, self.verb = options, verb

    @cached_property
    def fields(self) -> dict[str, Any]:
        from transformers import TrainingArguments

        own = {f.name for f in dataclasses.fields(self.options)} | DECIDED
        return {f.name: f for f in dataclasses.fields(TrainingArguments) if f.name not in own}

    @cached_property
    def annotations(self) -> dict[str, str]:
        """The types as written; the parser changes those of the fields."""
        from transformers import TrainingArguments

        return {name: str(kind) for name, kind in TrainingArguments.__annotations__.items()}

    @cached_property
    def parser(self) -> Any:
        from transformers import HfArgumentParser, TrainingArguments

        verb = self.verb

        class Parser(HfArgumentParser):
            def error(self, message: str) -> Any:
                raise UsageError(f"{message}. `lorica {verb} --help` lists the options")

        return Parser(TrainingArguments, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]

    def names(self) -> set[str]:
        return set(self.fields)

    def takes(self, name: str) -> bool:
        return name in self.fields or name.removeprefix("no_") in self.fields

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        if not words:
            return {}
        made = vars(self.parser.parse_args(list(words)))
        flags = [w.split("=")[0][2:].replace("-", "_") for w in words if w.startswith("--")]
        names = [f if f in self.fields else f.removeprefix("no_") for f in flags]
        return {name: _plain(made[name]) for name in names if name in self.fields}

    def value(self, name: str, value: Any, place: str) -> Any:
        if value is None:
            return None  # unset
        if isinstance(value, dict):
            if "dict" not in self.annotations[name]:
                raise UsageError(f"{place}: `{name}`: one value is wanted, not a mapping")
            return value
        words = [json.dumps(v) if isinstance(v, bool) else str(v) for v in _listed(value)]
        try:
            return self.read([f"--{name}", *words])[name]
        except (UsageError, ArgumentError) as error:
            raise UsageError(f"{place}: {error}") from None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # transformers' enumerations, as their text


def steps(result: dict[str, Any]) -> str:
    """How many steps were taken, and how many of them were left out."""
    left_out = result["steps_left_out"]
    return f"{result['steps']} steps" + (f" ({left_out} left out)" if left_out else "")


def outcome(result: dict[str, Any], folder: str) -> list[str]:
    """The last lines: what the kept weights reach on the evaluation data, and where things are.

    One batch's loss says little of a run, so without an evaluation it is the mean over its steps.
    """
    figures = result["evaluation"]
    if figures is None and result["train_loss"] is not None:
        lines = [f"  mean loss   {result['train_loss']:.4f} (training; nothing to evaluate on)"]
    else:
        best = result["best_step"]
        where = "the last step" if best is None else f"step {best}, the best"
        lines = [f"evaluation at {where}:"] if figures else []
        lines += [
            f"  {name[5:]:<12}" + ("no finite number" if value is None else f"{value:.4f}")
            for name, value in (figures or {}).items()
        ]
    page = Path(folder).expanduser() / REPORT
    lines.append(f"written: {result['output']}")
    return [*lines, *([f"look at: {page}"] if page.is_file() else [])]


def resumable(verb: str, options: RunOptions, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Run, and where a signal ends it, say how to go on.

    Args:
        run: takes the options and `callbacks` of the Trainer's kind.
    """
    from lorica.run import checkpoints
    from lorica.run.signals import SaveOnSignal

    try:
        return run(options, callbacks=[SaveOnSignal()])
    except Stopped as stop:
        folder = Path(options.output_dir).expanduser()
        if (folder / "config.yaml").is_file():
            there = checkpoints.resumable(folder)
            last = f" from {there[-1].name}" if there else ", from its first step"
            words = ["lorica", verb, "--output-dir", options.output_dir, "--resume"]
            stop.how = f". To go on{last}: {shlex.join(words)}"
            if not there and checkpoints.found(folder):
                stop.how = ". Its checkpoints hold weights only, so it cannot go on from there"
        raise


def resumed_file(options: RunOptions) -> Path | None:
    """config.yaml of the run that is gone on with, or None."""
    if options.resume is None:
        return None
    last = options.resume == "last"
    folder = Path(options.output_dir) if last else checkpoint_path(options.resume).parent
    file = folder.expanduser() / "config.yaml"
    return file if file.is_file() else None
