"""Pre-train a model from random weights on plain text."""

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
from lorica.run.options import GROUPS, Group, PretrainOptions


@dataclass(frozen=True, kw_only=True)
class Options(PretrainOptions, VerbOptions):
    __doc__ = PretrainOptions.__doc__
    groups: ClassVar[tuple[Group, ...]] = GROUPS
    smaller: ClassVar[str] = SMALLER

    @classmethod
    def others(cls) -> Others:
        return TrainingFields(PretrainOptions, "pretrain")

    def base_file(self) -> Path | None:
        return resumed_file(self)


def run(options: Options) -> Outcome:
    from lorica.run.cost import dry_run
    from lorica.run.pretrain import pretrain

    if options.dry_run:
        found = dry_run(options)
        return Outcome(found.as_dict(), (str(found),))
    result = resumable("pretrain", options.placed(), pretrain)
    first = f"{result['method']}: {steps(result)}, {result['tokens']:,} tokens"
    return Outcome(result, (first, *outcome(result, str(options.placed().output_dir))))
