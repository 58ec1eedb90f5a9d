"""Options of pre-training, `lorica pretrain`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from lorica.embedded.source import is_embedded
from lorica.run.options.checks import MOST_TOKENS, check_not_both, check_whole, flag, refuse
from lorica.run.options.kinds import HINT, PATH, PATHS, TEXT, WHOLE, choice
from lorica.run.options.remote_code import RemoteCodeOptions
from lorica.run.options.run import RunOptions

SHAPES = (
    "llama-1m", "llama-4m", "llama-9m", "llama-20m", "llama-60m", "llama-130m", "llama-250m",
    "llama-350m", "llama-1b",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Scratch:
    """First in `--help`."""

    model_config: Annotated[str, TEXT, HINT] = "llama-1m"
    data: Annotated[tuple[str, ...] | None, PATHS, HINT] = None
    eval_data: Annotated[tuple[str, ...] | None, PATHS, HINT] = None
    tokenizer: Annotated[str | None, PATH, HINT] = None
    vocab_size: Annotated[int | None, WHOLE, HINT] = None


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RemoteCodeOptions, RunOptions, _Scratch):
    """Train a causal language model from random weights on plain text.

    Documents are joined by the end-of-text token and cut into sequences of equal length. Attention
    is causal over the whole sequence, across documents, as in the papers. Every parameter trains:
    embeddings, norms, head and biases train in full, next to the method's updates. The result is a
    plain transformers model in `model/`. A YAML file with the same options (underscores in their
    names) can come first; options on the command line override it.

    Args:
        model_config: size of a Llama (llama-1m, -4m, -9m, -20m, -60m, -130m, -250m, -350m,
            -1b), or a config.json of any causal language model in transformers, its folder or
            hub id.
        data: files, folders or hub ids of text, in this order: .txt, or a column `text`.
            Default: the embedded tasks as text.
        eval_data: text to evaluate on, in the same forms.
        tokenizer: folder or hub id of a tokenizer. Default: train a byte-level BPE tokenizer on
            the data and save it with the run.
        vocab_size: vocabulary size of the tokenizer to train; with `tokenizer`, of the model.
            Default: that of `model_config`.
        method: method names joined by `+`, e.g. `lora` or `relora(every=1000)`; `lorica
            methods` lists them. Default: full, which trains every weight.
        r: rank of the trained update. Default: a quarter of the model's width, as in the
            papers.
        learning_rate: peak learning rate. Default: that of the rule or the schedule, otherwise
            1e-3.
        lr_scheduler_type: learning rate schedule, by its name in transformers; `cosine` ends at
            0.
        warmup_ratio: fraction of all steps in which the rate rises from 0. Default: 0.05.
        num_train_epochs: number of epochs. Default: 1, unless `max_steps` or `max_tokens` is
            given.
        max_tokens: number of tokens to train on (rounded up to a whole step), instead of
            epochs.
        eval_split: split of `eval_data`, or of `data` if there is no `eval_data`.
        eval_fraction: hold out this fraction of the sequences, the same ones for every method.
        max_eval_tokens: evaluate on the first sequences with this many tokens. Default: all.
        max_length: tokens per sequence. Default: 256, or the model's limit if that is lower.
        documents: what a document in a .txt file is: `file`, `paragraph` (separated by blank
            lines) or `line`. Default: file.
        streaming: read `data` (one hub id or folder) during the run instead of loading all of
            it first; the tokenizer is trained on its beginning.
        dry_run: print what would train, with counts and bytes, and stop.
    """

    max_tokens: Annotated[int | None, WHOLE, HINT] = None
    eval_split: Annotated[str | None, TEXT, HINT] = None
    max_eval_tokens: Annotated[int | None, WHOLE, HINT] = None
    documents: Annotated[str | None, choice("file", "paragraph", "line"), HINT] = None
    streaming: bool = False
    dry_run: bool = False

    paths: ClassVar[Mapping[str, Collection[str]]] = {
        "model_config": SHAPES, "data": (), "eval_data": (), "tokenizer": (),
    }  # fmt: skip

    def brings_evaluation(self) -> bool:
        """Whether there is text to evaluate on; the embedded data brings its own."""
        sources = (self.eval_data, self.eval_split, self.eval_fraction)
        brings = all(map(is_embedded, self.data or ()))
        return brings or any(source is not None for source in sources)

    def check(self) -> None:
        """What can be told from the options alone.

        Raises:
            UsageError: a value out of range, or options that contradict each other.
        """
        self.check_run()
        for name in ("max_tokens", "max_eval_tokens"):
            check_whole(name, getattr(self, name), most=MOST_TOKENS)
        check_whole("vocab_size", self.vocab_size)
        for name in ("max_steps", "num_train_epochs"):
            check_not_both(
                "max_tokens", self.max_tokens, name, getattr(self, name),
                "the length of a run is given once",
            )  # fmt: skip
        self.check_one_evaluation_source(self.eval_data, self.eval_split)
        self.refuse_late(
            "`--eval-data`, `--eval-split` or `--eval-fraction`",
            max_eval_tokens=self.max_eval_tokens is not None,
        )
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        refuse(
            self.data is None or len(self.data) != 1,
            "`--streaming` reads one source: name one hub id or folder in `--data`",
        )
        refuse(
            self.max_steps is None and self.max_tokens is None,
            "`--streaming` has no end that is known beforehand: give `--max-steps` or"
            " `--max-tokens`",
        )
        refuse(
            bool(self.further.get("dataloader_num_workers")),
            "`--dataloader-num-workers` has no effect with `--streaming`, which one process reads"
            " in order; leave it out",
        )
        own_split = self.eval_split is not None and self.eval_data is None
        refuse(
            own_split and self.max_eval_tokens is None,
            "`--eval-split` of streamed data is read once at the start, and its length is not"
            " known: give `--max-eval-tokens` too",
        )
        instead = "; evaluation text comes from `--eval-data` or `--eval-split`"
        for name, more in (("eval_fraction", instead), ("documents", "")):
            refuse(
                getattr(self, name) is not None,
                f"`{flag(name)}` has no effect with `--streaming`, which never sees all of the"
                f" data; leave it out{more}",
            )
