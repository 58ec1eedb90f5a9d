"""Fine-tune a model on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lorica.cli._outcome import Others, Outcome, VerbOptions
from lorica.cli._training import (
    SMALLER,
    TrainingFields,
    outcome,
    resumable,
    resumed_file,
    steps,
)
from lorica.run.options import GROUPS, Group, TrainOptions


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions, VerbOptions):
    __doc__ = TrainOptions.__doc__
    groups: ClassVar[tuple[Group, ...]] = GROUPS
    smaller: ClassVar[str] = SMALLER

    @classmethod
    def others(cls) -> Others:
        return TrainingFields(TrainOptions, "train")

    def base_file(self) -> Path | None:
        return resumed_file(self)


def run(options: Options) -> Outcome:
    from lorica.run.finetune import train

    result = resumable("train", options.placed(), train)
    folder = str(options.placed().output_dir)
    return Outcome(result, (f"{result['method']}: {steps(result)}", *outcome(result, folder)))
