"""Options of fine-tuning, `lorica train`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, ClassVar

from lorica.embedded.source import is_embedded
from lorica.run.options.checks import UsageError, check_whole, flag, refuse
from lorica.run.options.kinds import (
    DTYPE,
    HINT,
    NAMES,
    NUMBER,
    PATH,
    TASKS,
    TEXT,
    TOKENS,
    WHOLE,
    choice,
)  # fmt: skip
from lorica.run.options.quantization import QuantizationOptions
from lorica.run.options.remote_code import RemoteCodeOptions
from lorica.run.options.run import RunOptions


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """First in `--help`."""

    model: Annotated[str | None, PATH, HINT] = None
    data: Annotated[str | None, PATH, HINT] = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(QuantizationOptions, RemoteCodeOptions, RunOptions, _Tuned):
    """Fine-tune a model on a data set, with any method of `lorica methods`.

    A YAML file with the same options (underscores in their names) can come first; options on the
    command line override it. Almost every other field of transformers' TrainingArguments is an
    option too, under its own name, e.g. `--weight-decay 0.01` or `--save-steps 50`.

    Args:
        model: folder or hub id of a transformers model. Default: the base that the adapter
            names, otherwise the embedded model.
        data: file, folder or hub id; the column names decide what the examples are. The
            embedded tasks are `lorica:new`, `lorica:old` and `lorica:new+old`. Default:
            `lorica:new`.
        method: method names joined by `+`, e.g. `dora+olora` or `pissa(niter=16)`; `full`
            trains every weight. `lorica methods` lists them. Default: lora.
        adapt_towers: let `all-linear` adapt vision and audio towers too, and what connects them to
            the language model. Default: only the language model.
        modules_to_save: modules that train in full and are saved with the adapter. The head of a
            classifier, and what the checkpoint has no weights for, always are.
        add_tokens: new tokens, as a list or as a file with one token per line. They are added to
            the tokenizer, and their rows of the embedding and of the output head train.
        bias: `none`, `lora_only` (biases of adapted layers train) or `all`.
        adapter: start from this adapter (Lorica's or PEFT's), with its method.
        ignore_base_hash: with `adapter`, use a base other than the one that the adapter was
            trained on.
        num_train_epochs: number of epochs. Default: 3, unless `max_steps` is given.
        per_device_train_batch_size: examples per device and forward pass.
        dtype: dtype of the frozen weights. `auto` keeps the checkpoint's dtype, except that
            float16 becomes float32 on a CPU, where float16 is slow and inaccurate (the values
            don't change).
        eval_data: file, folder or hub id to evaluate on.
        eval_split: split of `eval_data`, or of `data` if there is no `eval_data`.
        eval_fraction: hold out this fraction of `data` for evaluation.
        max_samples: train on at most this many examples.
        max_length: maximum tokens per sequence. Default: 1024, or the model's limit if that is
            lower.
        header: column names for a table without a header line; `_` drops a column.
        shape: what the columns are, where they leave a choice: the name of a shape, e.g.
            `messages`. Default: decided by the columns.
        documents: what an example of a .txt file is: `paragraph`, `line` or `file`. Default:
            paragraph.
        max_lost_text: the share of the text's characters, 0 to 1, that the tokenizer may lose.
            Default: 0.02.
        task: causal-lm, sequence-classification, token-classification or seq2seq-lm. Default:
            decided by the columns of the data.
        packing: `none`, `best_fit` (several whole examples per sequence) or `wrapped` (plain
            text cut so that every sequence is full). Tokens never attend to another example.
        chat_template: `plain`, `chatml`, a file, Jinja text, or `none`. Default: the
            tokenizer's template.
        now: the time for chat templates that print one, e.g. `2025-01-31T12:00`. Default: when the
            run starts; a resumed run uses the time of the first start.
        train_on: `completion` (answers), `all`, or roles, e.g. `assistant`.
        early_stopping_patience: stop after this many evaluations without an improvement.
    """

    adapt_towers: bool = False
    modules_to_save: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    add_tokens: Annotated[tuple[str, ...] | None, TOKENS, HINT] = None
    bias: Annotated[str | None, choice("none", "lora_only", "all"), HINT] = None
    adapter: Annotated[str | None, PATH, HINT] = None
    ignore_base_hash: bool = False
    dtype: Annotated[str, DTYPE, HINT] = "auto"
    eval_data: Annotated[str | None, PATH, HINT] = None
    eval_split: Annotated[str | None, TEXT, HINT] = None
    max_samples: Annotated[int | None, WHOLE, HINT] = None
    header: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    shape: Annotated[str | None, TEXT, HINT] = None
    documents: Annotated[str | None, choice("paragraph", "line", "file"), HINT] = None
    max_lost_text: Annotated[float | None, NUMBER, HINT] = None
    task: Annotated[str | None, choice(*TASKS), HINT] = None
    packing: Annotated[str, choice("none", "best_fit", "wrapped"), HINT] = "none"
    chat_template: Annotated[str | None, TEXT, HINT] = None
    now: Annotated[str | None, TEXT, HINT] = None
    train_on: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    early_stopping_patience: Annotated[int | None, WHOLE, HINT] = None

    paths: ClassVar[Mapping[str, Collection[str]]] = dict.fromkeys(
        ("model", "data", "eval_data", "adapter"), ()
    )
    recipe_names: ClassVar[tuple[str, ...]] = (
        *RunOptions.recipe_names, "adapt_towers", "modules_to_save", "bias",
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
        if self.now is not None:
            try:
                datetime.fromisoformat(self.now)
            except ValueError as error:
                raise UsageError(
                    f"`--now {self.now}` is no time; type one like `2025-01-31T12:00`"
                ) from error
        check_whole("early_stopping_patience", self.early_stopping_patience)
        self.check_one_evaluation_source(self.eval_data, self.eval_split)
        refuse(
            self.add_tokens is not None and self.adapter is not None and self.resume is None,
            f"`--add-tokens` was given with `--adapter {self.adapter}`, whose own file says which"
            " rows it trains; leave it out, or train a new adapter",
        )
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
