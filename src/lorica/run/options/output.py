"""Where a run goes: its folder, what it goes on from, where else it logs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from lorica.run.options.checks import check_path, checkpoint_path, refuse
from lorica.run.options.kinds import FOLDER, HINT, NAMES, RESUME, Unsaid, hint

O = TypeVar("O", bound="OutputOptions")  # noqa: E741


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where a run writes, and what it continues.

    Args:
        output_dir: the run folder.
        resume: continue from a checkpoint: the given one, or the last one in `output_dir`.
            Options that you leave out are read from that run's configuration, and the run
            continues in the folder of the checkpoint unless `output_dir` is given.
        overwrite_output_dir: delete the run that is in `output_dir`.
        report_to: also log to `tensorboard`, `wandb` or another tracker; `none` for no tracker.
        report_html: write the page of the run, report.html, into its folder, with a few examples
            answered before and after training.
        verbose: also print every kind of parameter and layer, and the best evaluation's choice.
    """

    output_dir: Annotated[str, FOLDER, HINT] = Unsaid("lorica-run")
    resume: Annotated[
        str | None,
        RESUME,
        tyro.conf.arg(help_behavior_hint=hint, aliases=("--resume-from-checkpoint",)),
    ] = None
    overwrite_output_dir: bool = False
    report_to: Annotated[tuple[str, ...], NAMES, HINT] = ("none",)
    report_html: bool = True
    verbose: bool = False

    def placed(self: O) -> O:
        """The same with the folder that is meant: a checkpoint that is named goes on where it lies,
        unless a folder was typed."""
        folder = str(self.output_dir)
        if isinstance(self.output_dir, Unsaid) and self.resume not in (None, "last"):
            folder = str(checkpoint_path(self.resume).parent)
        return dataclasses.replace(self, output_dir=folder)

    def check_output(self) -> None:
        """Raises UsageError: an empty path, or a run that is to be both resumed and removed."""
        check_path("output_dir", self.output_dir)
        check_path("resume", self.resume)
        refuse(
            self.resume is not None and self.overwrite_output_dir,
            "`--resume` and `--overwrite-output-dir` contradict each other: leave one of the two"
            " out",
        )
