"""What every training run can be told: the groups together."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lorica.run.options.checks import UsageError, check_not_both, check_path, flag, refuse
from lorica.run.options.data import DataOptions
from lorica.run.options.method import MethodOptions
from lorica.run.options.output import OutputOptions
from lorica.run.options.steps import StepOptions
from lorica.run.options.training_arguments import NEED_EVALUATION, TrainingArgumentsOptions


# Fields come in reverse: `--help` lists the method first.
@dataclass(frozen=True, kw_only=True)
class RunOptions(
    TrainingArgumentsOptions, DataOptions, OutputOptions, StepOptions, MethodOptions, abc.ABC
):
    """The options of every training run; each command adds its own."""

    aliases: ClassVar[Mapping[str, str]] = {"resume_from_checkpoint": "resume"}
    # Options that may name files, which config.yaml has from the root on -> words that name none.
    paths: ClassVar[Mapping[str, Collection[str]]]

    @abc.abstractmethod
    def brings_evaluation(self) -> bool:
        """Whether there is something to evaluate on."""

    @abc.abstractmethod
    def check(self) -> None:
        """Check what can be told from the options alone.

        Raises:
            UsageError: a value out of range, or options that contradict each other.
        """

    def check_run(self) -> None:
        """The part of `check` that all verbs share.

        Raises:
            UsageError: as `check`.
        """
        for name in self.paths:
            check_path(name, getattr(self, name))
        self.check_output()
        self.check_further()
        self.check_steps()
        self.check_data()
        refuse(
            self.warmup_ratio is not None and "warmup_steps" in self.further,
            "`--warmup-ratio` and `--warmup-steps` say the same thing; leave one of the two out",
        )

    def check_one_evaluation_source(
        self, eval_data: str | tuple[str, ...] | None, eval_split: str | None
    ) -> None:
        """Raises UsageError: evaluation rows are to be held out and to come from elsewhere, too."""
        for name, value in (("eval_data", eval_data), ("eval_split", eval_split)):
            check_not_both(
                name, value, "eval_fraction", self.eval_fraction,
                "evaluation rows come from one place",
            )  # fmt: skip

    def refuse_late(self, remedy: str, **own: bool) -> None:
        """Options about evaluations, where there is nothing to evaluate on.

        Args:
            remedy: options that bring rows to evaluate on.
            own: options of the verb that need them -> whether each was given.

        Raises:
            UsageError: one was given.
        """
        if self.brings_evaluation():
            return
        asked = (None, False, "no")  # `--eval-strategy no` asks for what there is
        late = own | {name: self.further.get(name) not in asked for name in NEED_EVALUATION}
        for name in [name for name, given in late.items() if given]:
            raise UsageError(
                f"`{flag(name)}` needs something to evaluate on: give {remedy} too, or leave it out"
            )
