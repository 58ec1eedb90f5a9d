"""Options of pre-training, `lorica pretrain`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from lorica.embedded.source import is_embedded
from lorica.run.options.checks import MOST_TOKENS, check_not_both, check_whole, flag, refuse
from lorica.run.options.kinds import HINT, PATH, PATHS, TEXT, WHOLE, choice
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
class PretrainOptions(RunOptions, _Scratch):
    """Train a causal language model from random weights on running text.

    Documents are joined by the end-of-text token and cut into full rows; a row is attended to
    causally as a whole, over the documents' seams, as in the papers. Everything trains: what the
    method has no update for (embeddings, norms, head, biases) in place. The result is an ordinary
    transformers model in `model/`. A YAML file of the same names (underscores) may stand first;
    flags override it.

    Args:
        model_config: a shape (llama-1m, -4m, -9m, -20m, -60m, -130m, -250m, -350m, -1b), or a
            config.json of any causal language model of transformers, its folder or hub id.
        data: files, folders or hub ids of text, in this order: .txt, or a column `text`. Default:
            the embedded tasks as text.
        eval_data: the same, to evaluate on.
        tokenizer: folder or hub id of one. Default: a byte-level BPE trained on the data, saved
            with the run.
        vocab_size: of the tokenizer that is trained, or with `tokenizer` of the model. Default: the
            shape's.
        method: words joined by `+`, e.g. `relora(every=1000)`, `lora`; `lorica methods` lists them.
            Default: full, ordinary training.
        r: rank of what trains. Default: a quarter of the model's width, as in the papers.
        learning_rate: peak rate. Default: the rule's or the schedule's own, else 1e-3.
        lr_scheduler_type: transformers' name of the schedule; cosine goes down to 0.
        warmup_ratio: fraction of the steps in which the rate rises from 0. Default: 0.05.
        num_train_epochs: passes over the data. Default: 1, unless `max_steps` or `max_tokens` is
            given.
        max_tokens: train on so many tokens (rounded up to a whole step), instead of passes.
        eval_split: split of `eval_data` to evaluate on, or without it that of `data`.
        eval_fraction: hold out this fraction of the rows, the same for every method.
        max_eval_tokens: evaluate on so many tokens (whole rows), from the start. Default: all.
        max_length: tokens a row. Default: 256, or less where the model ends before.
        documents: what a document of a .txt file is: `file`, `paragraph` (between blank lines) or
            `line`. Default: file.
        streaming: read `data`, one hub id or folder, as the run goes on, never as a whole; the
            tokenizer is trained on its beginning.
        dry_run: print what would train, the counts and the bytes, and stop.
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
