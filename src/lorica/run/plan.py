"""RunPlan, which the functions of a run pass on.

A run is a line: data → arguments → model → train. `lorica.run.finetune` and `lorica.run.pretrain`
write it out; each of their functions reads what the ones before it filled in, and fills in its own
part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lorica.run.folder import RunFolder
from lorica.run.options import RunOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from lorica.model.adapters import Adapters
    from lorica.recipe.recipe import Recipe


@dataclass(kw_only=True)
class RunData:
    """What every run knows of its data.

    Attributes:
        source: the data's names, for messages.
        tokenizer: the model's, or one that was trained on the data.
        max_length: tokens a row.
        facts: saved with every checkpoint; a resumed run must find the same values.
        settled: options that reading the data settled, for config.yaml.
        evaluates: whether there are rows to evaluate on.
        measured: whether an evaluation has figures of predictions, beside the loss.
        shuffled: whether the rows' order is drawn; otherwise they are read in order.
        uniform: whether all rows have one length and fill whole batches.
    """

    source: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    facts: dict[str, Any]
    settled: dict[str, Any]
    evaluates: bool
    measured: bool
    shuffled: bool
    uniform: bool


@dataclass(kw_only=True)
class RunArguments:
    """How the run trains.

    Attributes:
        training: what the Trainer is given.
        learning_rate: peak rate.
        values: fields of TrainingArguments that the user gave or that follow from the run's length,
            for config.yaml.
    """

    training: TrainingArguments
    learning_rate: float
    values: dict[str, Any]


O = TypeVar("O", bound=RunOptions)  # noqa: E741
D = TypeVar("D", bound=RunData)


@dataclass(kw_only=True)
class RunPlan(Generic[O, D]):
    """One run. `lorica.run.start` makes it, and its later fields are filled in from top to bottom.

    Attributes:
        options: as given, with the folder that is meant.
        recipe: what the options ask for; None where the adapter that they name says it, until the
            model is loaded.
        own_recipe: whether the options say what trains.
        folder: the run's; held by this process.
        checkpoint: to go on from; None: the run begins at its first step.
        main: whether this process writes the run's files.
        processes: how many train together.
        device: this process trains on it.
        began: time at the start, in seconds of `time.perf_counter`.
        data: filled in by the function that reads the data.
        arguments: filled in by the one that plans the steps.
        earlier: what the checkpoint holds of the Trainer's callbacks, by class; empty without one.
        model: with adapters attached.
        adapters: those of the model.
        collator: makes a batch of rows.
    """

    verb: ClassVar[str]  # of the command line
    writes: ClassVar[tuple[str, ...]]  # folders, beside the checkpoints

    options: O
    recipe: Recipe | None
    own_recipe: bool
    folder: RunFolder
    checkpoint: Path | None
    main: bool
    processes: int
    device: torch.device
    began: float
    data: D = dataclasses.field(init=False)
    arguments: RunArguments = dataclasses.field(init=False)
    earlier: dict[str, Any] = dataclasses.field(init=False)
    model: PreTrainedModel = dataclasses.field(init=False)
    adapters: Adapters = dataclasses.field(init=False)
    collator: Callable[[Any], dict[str, torch.Tensor]] = dataclasses.field(init=False)
