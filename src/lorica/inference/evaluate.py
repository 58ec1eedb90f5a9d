"""What a model's numbers are on a data set: exact sums over label tokens, not means of batch means.

    ready = prepare(read("held.jsonl"), tokenizer, max_length=1024)
    evaluate(model, ready, tokenizer)          # {"loss": ..., "perplexity": ..., ...}
    exact_match(model, tokenizer, Prompter(tokenizer, "causal-lm").rows(read("held.jsonl"))).rate

The model may be plain, adapted or merged. Figures of classifications and regressions are those of
`lorica.inference.metrics`, as in training.
"""

from __future__ import annotations

import contextlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.data.collate import IGNORED, PackedCollator
from lorica.data.pack import check_isolation
from lorica.inference.generate import Decoding, Prompt, generate, room
from lorica.inference.metrics import Degenerate, Scores, f1, mark_spans
from lorica.patterns import find, flaw
from lorica.tensors.modules import evaluating, refuse_meta
from lorica.text import shorten
from lorica.training.checks import attached, loaded_for_use, no_effect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorica.data import Labels, Prepared

logger = logging.getLogger("lorica")

_POSITIONS = 4096  # label tokens whose float32 logits are held at once


# -- figures ---------------------------------------------------------------------------------------


def figures(task: str, labels: Labels | None) -> tuple[str, ...]:
    """The names of the figures that `evaluate` gives for a task.

    Example:
        >>> figures("causal-lm", None)
        ('loss', 'perplexity', 'bits_per_byte', 'bits_per_character')
    """
    return _TASKS[task].names(labels)


def evaluate(
    model: PreTrainedModel,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
    on_degenerate: Callable[[Degenerate], None] | None = None,
) -> dict[str, float]:
    """A task's figures on prepared data, in evaluation mode and without gradients.

    `loss` is the mean over every label token (or label), in nats; it doesn't depend on the batches.
    `perplexity` is its exponential. `bits_per_byte` (UTF-8) and `bits_per_character` divide all of
    the label tokens' bits, EOS's too, by the text that these tokens stand for.

    Args:
        model: for the task that the data was prepared for, on any device.
        prepared: what `lorica.data.prepare` returned.
        tokenizer: the one it was prepared with.
        batch_size: rows a batch; rows of like length go together.
        on_batch: called with (rows done, rows) after each batch.
        on_degenerate: called where a classifier gives every row the same class and the labels have
            others. Default: a warning in the log.

    Raises:
        ValueError: a model without a head for these labels, or that lets packed examples see each
            other; a loss that is no number; no row has a label; an adapter loaded for use
            (`trainable=False`) that changes no logit.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}: it must be at least 1")
    refuse_meta(model, "evaluate")
    work = _TASKS[prepared.report.task](prepared, tokenizer)
    work.check(model)
    rows, collate = prepared.dataset, prepared.collator()
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    with _evaluating(model):
        if isinstance(collate, PackedCollator):
            check_isolation(model, collate)
        effect = _Effect(model)
        for at in range(0, len(order), batch_size):
            chosen = [rows[i] for i in order[at : at + batch_size]]
            batch = {k: v.to(model.device) for k, v in collate(chosen).items()}
            labels = batch["labels"]
            given = work.inputs(batch)
            logits = model(**given).logits
            effect.look(given, logits)
            work.add(logits, labels)
            if on_batch is not None:
                on_batch(min(at + batch_size, len(order)), len(order))
    effect.check()
    found = work.result()
    if work.degenerate is not None:
        if on_degenerate is None:
            logger.warning(str(work.degenerate))
        else:
            on_degenerate(work.degenerate)
    return found


class _Effect:
    """Whether an adapter that was loaded for use changes any logit: batches are run without it,
    too, until one differs, which is the first where the adapter does anything."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.adapters = attached(model)
        self.missing = self.adapters is not None and loaded_for_use(self.adapters)

    def look(self, given: dict[str, Tensor], logits: Tensor) -> None:
        if self.missing and self.adapters is not None:
            with self.adapters.disabled():
                base = self.adapters.model(**given).logits
            self.missing = torch.equal(base, logits)

    def check(self) -> None:
        if self.missing and self.adapters is not None:
            raise ValueError(no_effect(self.adapters, "the evaluation"))


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    caches = vars(model.config).get("use_cache")
    try:
        if caches is not None:
            model.config.use_cache = False  # it costs memory, and undoes packing in transformers
        with evaluating(model), torch.no_grad():
            yield
    finally:
        if caches is not None:
            model.config.use_cache = caches


class _AbstractTask(ABC):
    """Sums of one task over batches."""

    def __init__(self, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prepared = prepared
        self.tokenizer = tokenizer
        self.total: float = 0.0  # nats, or squares: a Python float, so double
        self.count: int = 0
        self.degenerate: Degenerate | None = None  # known with the result

    @staticmethod
    @abstractmethod
    def names(labels: Labels | None) -> tuple[str, ...]:
        """What `result` will hold."""

    @abstractmethod
    def add(self, logits: Tensor, labels: Tensor) -> None: ...

    @abstractmethod
    def more(self) -> dict[str, float]:
        """The figures beside the loss."""

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model takes: not the labels, its own loss isn't wanted."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def check(self, model: PreTrainedModel) -> None:
        """That the model's head has an output for every class."""
        labels = self.prepared.labels
        if labels is not None and model.config.num_labels != labels.num_labels:
            raise ValueError(
                f"the model's head has {model.config.num_labels} outputs, and the data"
                f" {labels.num_labels} classes ({', '.join(labels.names) or 'a regression'});"
                " prepare it with the model's own `labels`"
            )

    def result(self) -> dict[str, float]:
        if self.count == 0:
            raise ValueError(
                "no label counts in these rows, all of them are -100 (masked), so there is nothing"
                " to measure; look at how they are masked and cut"
            )
        loss = self.total / self.count
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss}: the model gives values that are no numbers. Its weights have"
                " diverged, or its dtype is too narrow: try float32"
            )
        return {"loss": loss, **self.more()}


class _Tokens(_AbstractTask):
    """Next tokens of a causal model."""

    shift: ClassVar[bool] = True  # the logits of a place are for the next one's label

    @staticmethod
    def names(labels: Labels | None) -> tuple[str, ...]:
        return ("loss", "perplexity", "bits_per_byte", "bits_per_character")

    def add(self, logits: Tensor, labels: Tensor) -> None:
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        wanted = labels != IGNORED
        total, count = _nats(logits, labels, wanted)
        self.total += total
        self.count += count

    def more(self) -> dict[str, float]:
        rows: Any = self.prepared.dataset
        parts = [part for row in rows for part in self.text(row)]
        octets = sum(len(part.encode()) for part in parts)
        letters = sum(len(part) for part in parts)
        bits = self.total / math.log(2)
        return {
            "perplexity": math.exp(min(self.total / self.count, 700.0)),
            "bits_per_byte": bits / octets if octets else math.nan,
            "bits_per_character": bits / letters if letters else math.nan,
        }

    def text(self, row: dict[str, Any]) -> list[str]:
        """The text of each run of label tokens: what decoding gains by them."""
        ids, parts, at = row["input_ids"], [], 0
        for trained, run in groupby(row["labels"], key=lambda label: label != IGNORED):
            end = at + len(list(run))
            if trained:
                before, both = self.decoded(ids[:at]), self.decoded(ids[:end])
                # Decoded alone, a run would lose the space before its first word.
                gained = both[len(before) :] if both.startswith(before) else None
                parts.append(self.decoded(ids[at:end]) if gained is None else gained)
            at = end
        return parts

    def decoded(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class _Targets(_Tokens):
    """An encoder-decoder's targets."""

    shift = False

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch  # the decoder's inputs are made from the labels

    def text(self, row: dict[str, Any]) -> list[str]:
        return [self.decoded([label for label in row["labels"] if label != IGNORED])]


class _Classes(_AbstractTask):
    """One class, or one figure, for a row."""

    def __init__(self, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(prepared, tokenizer)
        assert prepared.labels is not None
        self.labels = prepared.labels
        self.scores = Scores(prepared.report.task, self.labels.names)
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    @staticmethod
    def names(labels: Labels | None) -> tuple[str, ...]:
        assert labels is not None
        if labels.regression:
            return ("loss", "pearson", "spearman", "mse")
        return ("loss", "accuracy", "f1", "matthews", "f1_macro")

    def add(self, logits: Tensor, labels: Tensor) -> None:
        if self.labels.regression:
            gap = logits.reshape(labels.shape).double() - labels.double()
            self.total += float((gap * gap).sum())
            self.count += len(labels)
        else:
            total, count = _nats(logits, labels, labels != IGNORED)
            self.total += total
            self.count += count
        kept = self.scores.reduce(logits, labels)
        pair = [t.cpu().reshape(labels.shape) for t in (kept, labels)]
        self.seen.append((pair[0].float().numpy(), pair[1].numpy()))

    def more(self) -> dict[str, float]:
        assert self.scores.measure is not None
        predicted, labels = (_joined(part) for part in zip(*self.seen, strict=True))
        if not self.labels.regression:
            predicted, labels = predicted.astype(np.int64), labels.astype(np.int64)
        self.degenerate = self.scores.degenerate(predicted, labels)
        made = self.scores.measure(predicted, labels)
        return {**made, **self.beside(predicted, labels)}

    def beside(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What training doesn't follow: F1's mean over classes, where F1 is of one class."""
        return {} if self.labels.regression else {"f1_macro": f1(predicted, labels, 0)}


class _Tags(_Classes):
    """A class for each word."""

    @staticmethod
    def names(labels: Labels | None) -> tuple[str, ...]:
        if labels is not None and mark_spans(labels.names):
            return ("loss", "accuracy", "precision", "recall", "f1")
        return ("loss", "accuracy", "f1")

    def beside(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {}


_TASKS: dict[str, type[_AbstractTask]] = {
    "causal-lm": _Tokens,
    "seq2seq-lm": _Targets,
    "sequence-classification": _Classes,
    "token-classification": _Tags,
}


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Batches as one; of words (rows, length), the shorter ones end in what counts for nothing."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    length = max(part.shape[1] for part in parts)
    return np.concatenate(
        [np.pad(p, ((0, 0), (0, length - p.shape[1])), constant_values=IGNORED) for p in parts]
    )


def _nats(logits: Tensor, labels: Tensor, wanted: Tensor) -> tuple[float, int]:
    """Sum of -log p over the wanted labels, and how many they are; the softmax in float32."""
    places = wanted.nonzero(as_tuple=True)
    total = 0.0
    for part in zip(*(place.split(_POSITIONS) for place in places), strict=True):
        total += float(
            F.cross_entropy(logits[part].float(), labels[part], reduction="none").double().sum()
        )
    return total, len(places[0])


# -- exact match -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactMatch:
    """How many greedy answers are the reference.

    Attributes:
        matched, examples: counts.
        unfinished: answers cut off before the model ended them.
        too_long: prompts that left no room for an answer, and count as not matched.
    """

    matched: int
    examples: int
    unfinished: int
    too_long: int

    @property
    def rate(self) -> float:
        return self.matched / self.examples

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    answer_pattern: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Answers every prompt greedily and compares with its reference, both stripped.

    Args:
        prompts: with references.
        answer_pattern: compare only its last match in each text (its first group, if it has one):
            `#### (.+)` for GSM8K. An answer without a match is wrong.
        max_new_tokens: of an answer. Default: as `Decoding`.
        batch_size, on_batch: as `generate`.

    Raises:
        ValueError: no regular expression; a prompt without a reference, or one that the pattern
            doesn't match.
    """
    wanted = check_references(prompts, answer_pattern)
    decoding = Decoding(max_new_tokens=max_new_tokens)
    fits = [i for i, p in enumerate(prompts) if room(model, tokenizer, p, decoding) > 0]
    asked = [prompts[i] for i in fits]
    made = generate(model, tokenizer, asked, decoding, batch_size=batch_size, on_batch=on_batch)
    answers = [answer for [answer] in made]
    said = _extract([answer.text for answer in answers], answer_pattern)
    return ExactMatch(
        matched=sum(text == wanted[i] for i, text in zip(fits, said, strict=True)),
        examples=len(prompts),
        unfinished=sum(not answer.finished for answer in answers),
        too_long=len(prompts) - len(fits),
    )


def check_pattern(pattern: str | None) -> None:
    """Whether it is a regular expression.

    Raises:
        ValueError: it is none.
    """
    if pattern is not None and (why := flaw(pattern)) is not None:
        raise ValueError(
            f"`answer_pattern={shorten(pattern)}` is no regular expression: {why}. Characters such"
            r" as `(` and `.` are written `\(` and `\.`"
        )


def check_references(prompts: Sequence[Prompt], answer_pattern: str | None) -> list[str]:
    """What each answer is compared with.

    Raises:
        ValueError: see `exact_match`.
    """
    check_pattern(answer_pattern)
    references: list[str] = []
    for prompt in prompts:
        if prompt.reference is None:
            raise ValueError(
                f"{prompt.place}: there is no answer to compare with; exact match needs data of"
                " prompts and answers"
            )
        references.append(prompt.reference)
    wanted: list[str] = []
    for prompt, text, found in zip(
        prompts, references, _extract(references, answer_pattern), strict=True
    ):
        if found is None:
            raise ValueError(
                f"{prompt.place}: `answer_pattern={answer_pattern!r}` doesn't match the data's own"
                f" answer, which ends with {text[-60:]!r}; correct the pattern"
            )
        wanted.append(found)
    return wanted


def _extract(texts: Sequence[str], pattern: str | None) -> list[str | None]:
    """What is compared of each text; None: the pattern doesn't match it.

    Example:
        >>> _extract(["so 4, no: #### 5 ", "4"], r"#### (.+)")
        ['5', None]
    """
    if pattern is None:
        return [text.strip() for text in texts]
    found = find([pattern], texts, how="last")[pattern]
    groups = [found.get(text) for text in texts]
    return [None if g is None else (g[min(1, len(g) - 1)] or "").strip() for g in groups]
