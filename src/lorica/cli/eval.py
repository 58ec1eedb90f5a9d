"""Measure a model on data: loss, perplexity, accuracy, exact match."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from lorica.cli._model import ModelOptions, Source
from lorica.cli._outcome import Outcome
from lorica.run.options import (
    HINT,
    NAMES,
    PAIRS,
    PATH,
    TASKS,
    TEXT,
    WHOLE,
    UsageError,
    choice,
    masking,
)
from lorica.text import nearest

if TYPE_CHECKING:
    from lorica.data import Prepared
    from lorica.inference.generate import Prompt
    from lorica.inference.metrics import Degenerate

logger = logging.getLogger("lorica")


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Measure a model on data, with or without an adapter.

    The loss is the mean over all label tokens and doesn't depend on the batch size. The other
    metrics depend on the task: perplexity, bits per byte and per character; accuracy, f1 (of class
    1 if there are two classes, otherwise the mean over classes), f1_macro, matthews; precision,
    recall and f1 of whole entities for B-/I- tags; pearson, spearman, mse.

    Args:
        data: file, folder or hub id; the column names decide what the examples are. The
            embedded tasks are `lorica:new`, `lorica:old` and `lorica:new+old`. Default:
            `lorica:new`.
        split: split of the data. Default for the embedded tasks: `test`.
        columns: rename columns of the data, e.g. `text=sentence` if the text is in the column
            `sentence`.
        header: column names for a csv or tsv file without a header line; `_` drops a column.
        max_samples: measure on at most this many examples, the first ones.
        task: causal-lm, sequence-classification, token-classification or seq2seq-lm. Default:
            decided by the columns of the data; seq2seq-lm if the model is an encoder-decoder.
        max_length: maximum tokens per sequence. Default: 1024, or the model's limit if that is
            lower.
        chat_template: `plain`, `chatml`, a file, Jinja text, or `none`. Default: the
            tokenizer's template.
        train_on: what the loss covers: `completion` (answers), `all`, or roles, e.g.
            `assistant`.
        per_device_eval_batch_size: sequences per batch.
        metrics: compute only these metrics of the task.
        exact_match: generate a greedy answer to every prompt and compare it with the answer in
            the data.
        answer_pattern: compare only the last match of this regular expression (its first group,
            if it has one), e.g. `#### (.+)`.
        max_new_tokens: maximum tokens of a generated answer. Default: 256, or what the model
            has room for.
        compare_base: also measure the base without the adapter.
    """

    data: Annotated[str | None, PATH, HINT] = None
    split: Annotated[str | None, TEXT, HINT] = None
    columns: Annotated[dict[str, str] | None, PAIRS, HINT] = None
    header: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    max_samples: Annotated[int | None, WHOLE, HINT] = None
    task: Annotated[str | None, choice(*TASKS), HINT] = None
    max_length: Annotated[int | None, WHOLE, HINT] = None
    chat_template: Annotated[str | None, TEXT, HINT] = None
    train_on: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    per_device_eval_batch_size: Annotated[int, WHOLE, HINT] = 8
    metrics: Annotated[tuple[str, ...] | None, NAMES, HINT] = None
    exact_match: bool = False
    answer_pattern: Annotated[str | None, TEXT, HINT] = None
    max_new_tokens: Annotated[int | None, WHOLE, HINT] = None
    compare_base: bool = False

    smaller: ClassVar[str] = "type a smaller `--per-device-eval-batch-size` or `--max-length`"

    def check(self) -> None:
        """What can be told from the options alone.

        Raises:
            UsageError: a value out of range, or an option without effect.
        """
        for name in ("per_device_eval_batch_size", "max_samples", "max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{_flag(name)} {value}`: it is a whole number of at least 1")
        for name in ("answer_pattern", "max_new_tokens"):
            if getattr(self, name) is not None and not self.exact_match:
                raise UsageError(
                    f"`{_flag(name)}` has no effect without `--exact-match`; leave it out"
                )
        for name in ("compare_base", "ignore_base_hash"):
            if getattr(self, name) and self.adapter is None:
                raise UsageError(f"`{_flag(name)}` has no effect without `--adapter`; leave it out")


def run(options: Options) -> Outcome:
    options.check()
    from lorica.cli._model import chosen_data
    from lorica.inference.evaluate import check_pattern

    try:
        check_pattern(options.answer_pattern)
    except ValueError as error:
        raise UsageError(str(error)) from None
    data, split = chosen_data(options.data, options.split)
    source = options.source()
    quantization = options.quantization_config()
    return _Work(options, source, data, split, quantization).outcome()


@dataclass(frozen=True)
class _Work:
    options: Options
    source: Source
    data: str
    split: str | None
    quantization: Any

    def outcome(self) -> Outcome:
        from lorica.inference.evaluate import figures

        prepared, options = self.prepared, self.options
        names = figures(self.task, prepared.labels)
        for name in options.metrics or ():
            if name not in names:
                raise UsageError(
                    f"`--metrics {name}`: the task `{self.task}` has no such figure; it has"
                    f" {', '.join(names)}.{nearest(name, names)}"
                )
        prompts = self.prompts() if options.exact_match else None
        loaded = self.source.load(
            self.task,
            labels=prepared.labels,
            dtype=options.dtype,
            check_base=not options.ignore_base_hash,
            columns=self.dataset.column_names,
            quantization=self.quantization,
        )
        if options.compare_base:
            self._check_comparable(loaded.brought)
        model, adapters = loaded.model, loaded.adapters
        began = time.perf_counter()
        measured = self.measure(model, prompts, "rows")
        data: dict[str, Any] = {
            "model": self.source.model,
            "adapter": None if self.source.adapter is None else str(self.source.adapter),
            "method": None if adapters is None else adapters.recipe.text(),
            "data": {"name": self.data, **prepared.report.as_dict()},
            "task": self.task,
            **measured,
        }
        if options.compare_base:
            assert adapters is not None
            with adapters.disabled():
                data["base"] = self.measure(model, prompts, "rows without the adapter")
        data["seconds"] = round(time.perf_counter() - began, 3)
        return Outcome(data, (self._head(), _table(data), *_notes(data)))

    # -- data --------------------------------------------------------------------------------------

    @cached_property
    def dataset(self) -> Any:
        from lorica.data import read

        options = self.options
        return read(
            self.data,
            split=self.split,
            header=options.header,
            columns=options.columns,
            max_samples=options.max_samples,
        )

    @cached_property
    def task(self) -> str:
        from lorica.data import detect
        from lorica.data.tokenise import sample_of
        from lorica.inference.generate import language_task

        asked = self.options.task
        if asked is not None:
            return asked
        shape = detect(self.dataset.column_names, sample=sample_of(self.dataset))
        speaks = language_task(self.source.config)
        # Data that serves both is measured as the model speaks.
        return speaks if {speaks, "causal-lm"} <= set(shape.readers) else shape.default_task

    @cached_property
    def prepared(self) -> Prepared:
        from lorica.data import prepare
        from lorica.data.lengths import longest
        from lorica.run.finetune import MAX_LENGTH

        options, source = self.options, self.source
        limit = longest(source.config, source.tokenizer)
        if options.max_length is not None and limit is not None and options.max_length > limit:
            raise UsageError(
                f"`--max-length {options.max_length}`: `{source.model}` ends at {limit} tokens;"
                " give at most that"
            )
        how: dict[str, Any] = masking(options.chat_template, options.train_on)
        labels = source.labels(self.task)
        if labels is not None:
            how["labels"] = labels
        return prepare(
            self.dataset,
            source.tokenizer,
            max_length=options.max_length or min(MAX_LENGTH, limit or MAX_LENGTH),
            task=self.task,
            embeddings=source.embeddings,
            max_lost_text=1.0,  # nothing is trained, and the notes say what is lost
            **how,
        )

    def prompts(self) -> list[Prompt]:
        """What exact match asks; all of them have an answer to compare with."""
        from lorica.inference.evaluate import check_references
        from lorica.inference.generate import Prompter

        if self.task not in ("causal-lm", "seq2seq-lm"):
            raise UsageError(
                f"`--exact-match` is for prompts and answers, and the task here is `{self.task}`:"
                " leave it out"
            )
        ask = Prompter(self.source.tokenizer, self.task, self.options.chat_template)
        prompts = ask.rows(self.dataset)
        check_references(prompts, self.options.answer_pattern)
        return prompts

    def _check_comparable(self, brought: tuple[str, ...]) -> None:
        """Something must be left of the base that its numbers can be taken of."""
        if brought:
            raise UsageError(
                f"`--compare-base`: {', '.join(brought)} came with the adapter, and without it"
                f" `{self.source.model}` has no weights there, so its answers would be chance;"
                " leave it out"
            )

    # -- figures -----------------------------------------------------------------------------------

    def measure(self, model: Any, prompts: list[Prompt] | None, what: str) -> dict[str, Any]:
        from lorica.cli._model import progress
        from lorica.inference.evaluate import evaluate, exact_match

        options, tokenizer = self.options, self.source.tokenizer
        size = options.per_device_eval_batch_size
        alike: list[Degenerate] = []
        found = evaluate(
            model,
            self.prepared,
            tokenizer,
            batch_size=size,
            on_batch=progress(what),
            on_degenerate=alike.append,
        )
        wanted = options.metrics or tuple(found)
        made: dict[str, Any] = {"metrics": {name: found[name] for name in found if name in wanted}}
        if alike:
            made["degenerate"] = alike[0].as_dict()
            logger.warning(f"{what}: {alike[0]}")
        if prompts is not None:
            match = exact_match(
                model,
                tokenizer,
                prompts,
                answer_pattern=options.answer_pattern,
                max_new_tokens=options.max_new_tokens,
                batch_size=size,
                on_batch=progress(what.replace("rows", "answers")),
            )
            made["metrics"]["exact_match"] = match.rate
            made["answers"] = match.as_dict()
        return made

    def _head(self) -> str:
        report = self.prepared.report
        on = "" if self.source.adapter is None else f" with {self.source.adapter}"
        return (
            f"{self.source.model}{on}\n{self.data}: {report.examples:,} examples ({report.shape}),"
            f" {report.label_tokens:,} labels, {self.task}"
        )


def _table(data: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    base = data.get("base", {}).get("metrics")
    columns = ("", "value") if base is None else ("", "base", "adapted", "change")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for name, value in data["metrics"].items():
        if base is None:
            table.add_row(name, f"{value:.4f}")
        else:
            table.add_row(name, f"{base[name]:.4f}", f"{value:.4f}", f"{value - base[name]:+.4f}")
    return table


def _notes(data: dict[str, Any]) -> list[str]:
    lines, report = [], data["data"]
    if report["truncated"]:
        lines.append(
            f"{report['truncated']:,} examples were cut at {report['max_length']:,} tokens, for the"
            " loss"
        )
    lines += [f"{count:,} examples left out: {why}" for why, count in report["skipped"].items()]
    lines += report["notes"]
    answers = data.get("answers")
    if answers is not None:
        lines.append(f"exact match: {answers['matched']:,} of {answers['examples']:,}")
        if answers["unfinished"]:
            lines.append(f"{answers['unfinished']:,} answers were cut off before their end")
        if answers["too_long"]:
            lines.append(f"{answers['too_long']:,} prompts left no room for an answer")
    return lines


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
