"""Options of fine-tuning, `lorica train`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from lorica.embedded.source import is_embedded
from lorica.run.options.checks import UsageError, check_whole, flag, refuse
from lorica.run.options.kinds import DTYPE, HINT, NAMES, PATH, TASKS, TEXT, WHOLE, choice
from lorica.run.options.run import RunOptions


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """First in `--help`."""

    model: Annotated[str | None, PATH, HINT] = None
    data: Annotated[str | None, PATH, HINT] = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions, _Tuned):
    """Fine-tune a model on a data set through an update of the method's form.

    A YAML file of the same names (underscores) may stand first; flags override it. Every further
    field of transformers' TrainingArguments is an option under its own name, e.g. `--weight-decay
    0.01`, `--save-steps 50`, `--optim adamw_torch`.

    Args:
        model: folder or hub id of a transformers model. Default: the one that the adapter names,
            else the embedded one.
        data: file, folder or hub id; its columns decide what it is. Embedded tasks are
            `lorica:new`, `lorica:old` and `lorica:new+old`. Default: `lorica:new`.
        method: words joined by `+`, e.g. `dora+olora`, `pissa(niter=16)`; `full` trains every
            weight. `lorica methods` lists them. Default: lora.
        modules_to_save: modules that train in full and are saved with the adapter. A fresh head is
            added by itself.
        bias: `none`, `lora_only` (biases of adapted layers train) or `all`.
        adapter: start from this adapter (Lorica's or PEFT's) and its method.
        ignore_base_hash: with `adapter`, take another base than it was trained on.
        num_train_epochs: passes over the data. Default: 3, unless `max_steps` is given.
        per_device_train_batch_size: examples a device and forward pass.
        dtype: of the frozen weights. `auto` keeps the checkpoint's, but float16 becomes float32 on
            a CPU, which computes it badly (the values stay exactly what they were).
        eval_data: file, folder or hub id to evaluate on.
        eval_split: its split, or without `eval_data` that of `data`.
        eval_fraction: hold out this fraction of the rows of `data`.
        max_samples: train on at most so many rows.
        max_length: tokens a row. Default: 1024, or less where the model ends before.
        header: names of the columns of a csv or tsv file without a header line; `_` drops one.
        task: what is learnt: causal-lm, sequence-classification, token-classification or
            seq2seq-lm. Default: from the data's columns.
        packing: `none`, `best_fit` (several whole examples a row) or `wrapped` (running text cut so
            that rows are full). Examples of a row never see each other.
        chat_template: `plain`, `chatml`, a file, Jinja text, or `none`. Default: the tokenizer's.
        train_on: `completion` (answers), `all`, or roles, e.g. `assistant`.
        early_stopping_patience: stop after so many evaluations without a better one.
    """

    modules_to_save: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    bias: Annotated[str | None, choice("none", "lora_only", "all"), HINT] = None
    adapter: Annotated[str | None, PATH, HINT] = None
    ignore_base_hash: bool = False
    dtype: Annotated[str, DTYPE, HINT] = "auto"
    eval_data: Annotated[str | None, PATH, HINT] = None
    eval_split: Annotated[str | None, TEXT, HINT] = None
    max_samples: Annotated[int | None, WHOLE, HINT] = None
    header: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    task: Annotated[str | None, choice(*TASKS), HINT] = None
    packing: Annotated[str, choice("none", "best_fit", "wrapped"), HINT] = "none"
    chat_template: Annotated[str | None, TEXT, HINT] = None
    train_on: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    early_stopping_patience: Annotated[int | None, WHOLE, HINT] = None

    paths: ClassVar[Mapping[str, Collection[str]]] = dict.fromkeys(
        ("model", "data", "eval_data", "adapter"), ()
    )
    recipe_names: ClassVar[tuple[str, ...]] = (
        *RunOptions.recipe_names, "modules_to_save", "bias",
    )  # fmt: skip

    def brings_evaluation(self) -> bool:
        """Whether there are evaluation rows; the embedded data brings its own."""
        sources = (self.eval_data, self.eval_split, self.eval_fraction)
        brings = self.data is None or is_embedded(self.data)
        return brings or any(source is not None for source in sources)

    def check(self) -> None:
        """What can be told from the options alone.

        Raises:
            UsageError: a value out of range, or options that contradict each other.
        """
        self.check_run()
        check_whole("max_samples", self.max_samples)
        check_whole("early_stopping_patience", self.early_stopping_patience)
        self.check_one_evaluation_source(self.eval_data, self.eval_split)
        fresh = self.resume is None  # else the run's own config.yaml tells what was changed
        if fresh and self.adapter is not None and (self.method is not None or self.recipe_fields()):
            given = (["method"] if self.method is not None else []) + list(self.recipe_fields())
            raise UsageError(
                f"`{flag(given[0])}` was given with `--adapter {self.adapter}`, whose own file"
                " says how it was made; leave it out"
            )
        refuse(
            self.ignore_base_hash and self.adapter is None,
            "`--ignore-base-hash` has no effect without `--adapter`; leave it out",
        )
        self.refuse_late(
            "`--eval-data`, `--eval-split` or `--eval-fraction`",
            early_stopping_patience=self.early_stopping_patience is not None,
        )
