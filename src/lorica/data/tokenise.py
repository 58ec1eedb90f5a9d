"""Rows of any shape become token ids and labels, all in memory and the same every time.

Texts are tokenised in the parts a model meets them in: a prompt alone, then its completion, as when
generating. So no token straddles the two, and what is trained is what will be asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from lorica.data.chat import Format, check_roles, check_spoken, roles_of, template_of
from lorica.data.collate import (
    IGNORED,
    CausalCollator,
    ClassificationCollator,
    PackedCollator,
    Seq2SeqCollator,
    TokenClassificationCollator,
)
from lorica.data.encode import Added, Encoder, Example, assembled, laid_out, spans_with_labels
from lorica.data.fidelity import LIMIT, check_ids, text_loss
from lorica.data.labels import Labels
from lorica.data.pack import PACKINGS
from lorica.data.samples import AbstractCausalSample, Labelled, Piece, Row, SourceTarget, Tagged
from lorica.data.shapes import Shape, detect
from lorica.data.words import INDEX, listing, revive, strings, visible
from lorica.text import clear_errors, nearest

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_UNTRAINED = "no turn of theirs is trained"
_BATCH = 1_000_000  # characters tokenised at a time: the backend's records take 100 bytes a token


@dataclass(frozen=True)
class Report:
    """What became of the data, in numbers.

    Attributes:
        shape, task: what the columns were taken for, and what for.
        examples: rows read.
        rows: rows to train on (more for long documents, fewer when packed).
        tokens: input tokens in them, without padding.
        label_tokens: those with a label, which is what the loss averages over (labels, for
            sequence classification).
        truncated: examples cut at `max_length`; `dropped_tokens` is how much was cut off.
        skipped: examples left out, by reason.
        fill: tokens as a fraction of rows x `max_length`.
        unused_columns: columns that were there and had no part.
        template: the chat template used, or "" for none.
        eos: whether texts end with EOS (the tokenizer may lack one).
        labels: for the two classification tasks, the classes, or that it is a regression.
        empty_answers: examples of which an answer is empty, so that only its end is trained.
        lost_text: share of the characters of a sample that the tokenizer loses, 0 to 1.
        notes: whatever else a person should know of the data, a sentence each.
    """

    shape: str
    task: str
    max_length: int
    packing: str = "none"
    examples: int = 0
    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    fill: float = 0.0
    unused_columns: tuple[str, ...] = ()
    template: str = ""
    eos: bool = True
    labels: str = ""
    empty_answers: int = 0
    lost_text: float = 0.0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        lists = {"unused_columns": list(self.unused_columns), "notes": list(self.notes)}
        return {**asdict(self), **lists}

    def __str__(self) -> str:
        lines = [
            f"{self.examples:,} examples ({self.shape}) -> {self.rows:,} rows of at most "
            f"{self.max_length:,} tokens for {self.task}",
            f"{self.tokens:,} tokens, {self.label_tokens:,} with a label; rows {self.fill:.0%} full"
            + ("" if self.packing == "none" else f" (packing: {self.packing})"),
        ]
        if self.truncated:
            lines.append(
                f"{self.truncated:,} examples cut at {self.max_length:,}: "
                f"{self.dropped_tokens:,} tokens dropped"
            )
        lines += [f"{count:,} examples left out: {why}" for why, count in self.skipped.items()]
        if self.labels:
            lines.append(f"labels: {self.labels}")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        if self.template:
            lines.append(f"chat template: {self.template}")
        if not self.eos:
            lines.append("the tokenizer has no EOS token: texts end without one")
        lines += self.notes
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """Data ready for a Trainer.

    Attributes:
        dataset: `input_ids` and `labels`; `position_ids` where packed; `token_type_ids` where the
            tokenizer makes them.
        report: the numbers.
        labels: the classes, for the two classification tasks.
        chat_template: the Jinja text used, if it isn't the tokenizer's own: keep it with the model
            (`tokenizer.chat_template = ...`), as generating needs it.
        now: the time that the chat template printed, if it prints one: give it again to make the
            same rows another day.
    """

    dataset: Dataset
    report: Report
    labels: Labels | None
    chat_template: str | None
    pad_token_id: int
    now: datetime | None = None

    def collator(
        self, *, pad_to_multiple_of: int | None = None, block_mask: torch.dtype | None = None
    ) -> Any:
        """The collator that makes batches of these rows (see `lorica.data.collate`)."""
        if PACKINGS[self.report.packing].packs:
            return PackedCollator(self.pad_token_id, pad_to_multiple_of, block_mask)
        if block_mask is not None:
            raise ValueError(
                "`block_mask` was given, and the data isn't packed: there is nothing to keep apart "
                'in a row. Leave it out, or prepare the data with `packing="best_fit"`.'
            )
        return TASKS[self.report.task].collator(self.pad_token_id, pad_to_multiple_of)


@clear_errors()
def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    task: str | None = None,
    shape: str | None = None,
    chat_template: str | None = None,
    train_on: str | Collection[str] = "completion",
    packing: str = "none",
    labels: Labels | None = None,
    max_target_length: int | None = None,
    now: datetime | None = None,
    embeddings: int | None = None,
    max_lost_text: float = LIMIT,
) -> Prepared:
    """Tokenises a data set of any known shape for a task.

    Args:
        dataset: as `read` returns it, or any other; its columns decide its shape.
        tokenizer: the model's.
        max_length: of a row, in tokens. Longer documents become several rows; anything else is cut
            at the end.
        task: `causal-lm`, `sequence-classification`, `token-classification` or `seq2seq-lm`.
            Default: the shape's own.
        shape: the shape's name, where the columns leave a choice.
        chat_template: `plain`, `chatml`, a file, Jinja text, or `"none"` for the plain formats.
            Default: the tokenizer's own, else the plain formats.
        train_on: `"completion"` (completions and assistants' turns), `"all"`, or a set of roles.
        packing: `"none"`, `"best_fit"` (several whole examples a row), or `"wrapped"` (documents
            cut so that rows are full). Examples of a row never see each other.
        labels: the classes to hold the data to (the training set's, the model's); `Labels()` asks
            for a regression. Default: found in the data.
        max_target_length: of an encoder-decoder's target. Default: `max_length`.
        now: the time for chat templates that print one. Default: the clock's.
        embeddings: rows of the model's embedding table, to hold token ids to. Default: unchecked.
        max_lost_text: the share of the text's characters, 0 to 1, that the tokenizer may lose.

    Returns:
        the rows, their report and the classes. The first label of every example is -100, as no
        token predicts it.

    Raises:
        ValueError: for columns of no shape, values of a wrong type (with file and line), messages
            without a template, labels outside the classes, data of which no label is left, text
            that the tokenizer loses, token ids beyond `embeddings`, and options that the task has
            no use for.
    """
    chosen = detect(dataset.column_names, task=task, shape=shape, sample=sample_of(dataset))
    work = TASKS[task if task is not None else chosen.default_task]
    if max_length < 2:
        raise ValueError(
            f"`max_length` is {max_length}: a row needs 2 tokens at least, one to predict the "
            "other. Common values are 512 to 4096."
        )
    if max_target_length is not None and max_target_length < 1:
        raise ValueError(f"`max_target_length` is {max_target_length}: it must be at least 1.")
    if packing not in PACKINGS:
        raise ValueError(
            f"`packing={packing!r}` is none of {listing(PACKINGS)}.{nearest(packing, PACKINGS)}"
        )
    given = {
        "chat_template": chat_template is not None,
        "train_on": train_on != "completion",
        "packing": packing != "none",
        "labels": labels is not None,
        "max_target_length": max_target_length is not None,
    }
    useless = [name for name, is_given in given.items() if is_given and name not in work.options]
    if useless:
        raise ValueError(
            f"{listing(useless)} was given for the task `{work.name}`, which has no use for it: "
            f"that task takes {listing(sorted(work.options))}. Leave it out."
        )
    request = _Request(
        dataset, tokenizer, chosen, work.name, max_length, chat_template, train_on, packing,
        labels, max_target_length, datetime.now() if now is None else now,
    )  # fmt: skip
    if not 0 <= max_lost_text <= 1:
        raise ValueError(f"`max_lost_text` is {max_lost_text}: it is a share, from 0 to 1.")
    loss = text_loss(tokenizer, request.texts())
    if loss.share > max_lost_text:
        raise ValueError(
            f"The tokenizer loses {loss}: the model would not see them. At most "
            f"{max_lost_text:.0%} may be lost. Take a model whose tokenizer knows these "
            f"characters, or allow it with `max_lost_text={math.ceil(loss.share * 100) / 100}`."
        )
    made = work().prepare(request)
    notes = [*made.report.notes]
    if loss.share:
        notes.append(f"the tokenizer loses {loss}")
    if INDEX in dataset.column_names:
        notes.append("dropped: a column without a name, which is the index of a table")
    pad = made.pad_token_id
    if embeddings is not None:
        check_ids(made.dataset, tokenizer, embeddings)
        pad = pad if pad < embeddings else 0  # nothing looks at padding
    report = replace(made.report, lost_text=loss.share, notes=tuple(notes))
    return replace(made, report=report, pad_token_id=pad)


def _unnamed(value: Any) -> Any:
    """A conversation without the names of its roles, which the template spells its own way."""
    if isinstance(value, list):
        return [_unnamed(part) for part in value]
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if key not in ("role", "from")}
    return value


def sample_of(dataset: Dataset, rows: int = 100) -> dict[str, list[Any]]:
    """Some values of each of the user's columns, from rows all over the data."""
    places = range(0, len(dataset), max(1, len(dataset) // rows))
    table = dataset.select(places).select_columns(visible(dataset.column_names))[:]
    return {name: [revive(value) for value in values] for name, values in table.items()}


@dataclass(frozen=True)
class _Request:
    """The arguments of `prepare`, checked."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    shape: Shape
    task: str
    max_length: int
    chat_template: str | None
    train_on: str | Collection[str]
    packing: str
    labels: Labels | None
    max_target_length: int | None
    now: datetime

    def texts(self) -> Iterator[str]:
        """The texts of rows from all over the data, labels aside."""
        found = self.shape.find(self.dataset.column_names) or {}
        names = [name for column, name in found.items() if column != self.shape.label]
        places = range(0, len(self.dataset), max(1, len(self.dataset) // 200))
        table = self.dataset.select(places).select_columns(names)[:]
        for cells in zip(*table.values(), strict=True):
            yield from strings([_unnamed(revive(cell)) for cell in cells])

    def samples(self) -> Iterator[tuple[Row, Any]]:
        """Every row with what its shape makes of it, a few at a time."""
        found = self.shape.find(self.dataset.column_names) or {}
        hidden = [name for name in self.dataset.column_names if name.startswith("__")]
        table = self.dataset.select_columns([*dict.fromkeys(found.values()), *hidden])
        reader = self.shape.readers[self.task]
        for row in self.shape.rows(table[:]):
            yield row, reader(row)

    def report(self, **numbers: Any) -> Report:
        if not numbers["rows"]:
            if set(numbers["skipped"]) == {_UNTRAINED}:
                raise ValueError(
                    f"No turn of the {numbers['examples']:,} examples ({self.shape.name}) is "
                    "trained: the flags in the data, such as `weight` 0 or `train` false, leave "
                    "out all of them. Set those to be trained to 1, or remove the flags."
                )
            reasons = "; ".join(f"{why}: {n:,}" for why, n in numbers["skipped"].items())
            raise ValueError(
                f"None of the {numbers['examples']:,} examples ({self.shape.name}) has a label "
                f"left at `max_length={self.max_length}`: {reasons}. Give a larger `max_length`, "
                "or look at the data."
            )
        unused = self.shape.unused(self.dataset.column_names)
        return Report(
            shape=self.shape.name,
            task=self.task,
            max_length=self.max_length,
            packing=self.packing,
            fill=numbers["tokens"] / (numbers["rows"] * self.max_length),
            unused_columns=unused,
            **numbers,
        )

    def pad(self) -> int:
        return pad_of(self.tokenizer)

    def added(self) -> Added:
        return Added.by(self.tokenizer)

    def classes(
        self, values: Sequence[Any], places: Sequence[str]
    ) -> tuple[Labels, list[int | float]]:
        """The classes asked for, those the data set declares, or those its values imply; and every
        value's number among them."""
        own, labels = self._own_names(), self.labels
        if labels is None:
            labels = Labels.of(values, places) if own is None else Labels(own)
        elif own is not None:
            cells = zip(values, places, strict=True)
            values = [labels.renumbered(value, own, place) for value, place in cells]
        return labels, [labels.number(v, place) for v, place in zip(values, places, strict=True)]

    def _own_names(self) -> tuple[str, ...] | None:
        """The names that the data set declares for its class numbers."""
        import datasets

        assert self.shape.label is not None
        column = (self.shape.find(self.dataset.column_names) or {})[self.shape.label]
        feature = self.dataset.features[column]
        feature = vars(feature).get("feature", feature)  # of a list, that of its elements
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


class AbstractTask(ABC):
    """What a model is trained to do, which decides what a row of ids and labels is."""

    name: ClassVar[str]
    options: ClassVar[frozenset[str]]  # those arguments of `prepare` that it heeds
    collator: ClassVar[Any]  # (pad_token_id, pad_to_multiple_of) -> collator

    @abstractmethod
    def prepare(self, request: _Request) -> Prepared: ...


class CausalLM(AbstractTask):
    """Predict each next token: documents, exchanges, conversations."""

    name = "causal-lm"
    options = frozenset({"chat_template", "train_on", "packing"})
    collator = CausalCollator

    def prepare(self, request: _Request) -> Prepared:
        encoder = Encoder(request.tokenizer)
        template = template_of(request.tokenizer, request.chat_template, starts=bool(encoder.start))
        roles = roles_of(request.train_on)
        form = Format(request.tokenizer, template, roles, encoder.start, request.now)
        packing = PACKINGS[request.packing]
        kept = _Kept(request.max_length)
        for row, sample, example in _encoded(request, form, encoder):
            if packing.cuts and not sample.divisible:
                raise ValueError(
                    f"`packing={request.packing!r}` cuts examples wherever a row is full, and the "
                    f"shape `{request.shape.name}` ({row.place}) has examples that must stay "
                    'whole. Type `packing="best_fit"`.'
                )
            kept.add(row, sample, example)
        if request.chat_template is not None and not kept.templated:
            raise ValueError(
                f"`chat_template` was given, and the shape `{request.shape.name}` has no messages "
                "to put into one: its texts are taken as they are. Leave it out."
            )
        if kept.examples or not kept.templated:
            check_roles(roles, kept.roles, f"the shape `{request.shape.name}`")
        else:
            check_spoken(roles, kept.roles, f"the shape `{request.shape.name}`")
        used = template if kept.templated else None
        rows = packing.plan([len(ids) for ids, _ in kept.examples], request.max_length)
        columns = laid_out(
            spans_with_labels(rows, kept.examples), kept.examples, positions=packing.packs
        )
        report = request.report(
            examples=kept.seen,
            rows=len(columns["input_ids"]),
            tokens=sum(map(len, columns["input_ids"])),
            label_tokens=sum(int((part != IGNORED).sum()) for part in columns["labels"]),
            truncated=kept.truncated,
            dropped_tokens=kept.dropped,
            skipped=dict(kept.skipped),
            template=used.name if used is not None else "",
            eos=isinstance(request.tokenizer.eos_token_id, int),
            empty_answers=kept.empty,
            notes=_empty_answers(request, kept.empty),
        )
        text = used.text if used is not None else None
        now = request.now if used is not None and form.dated else None
        return Prepared(_dataset(columns), report, None, text, request.pad(), now)


@dataclass
class _Kept:
    """The examples that have something to learn, and a count of the others."""

    max_length: int
    examples: list[Example] = field(default_factory=list)
    seen: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    roles: set[str] = field(default_factory=set)
    templated: bool = False
    empty: int = 0  # rows with an empty answer
    last: Row | None = None

    def add(self, row: Row, sample: AbstractCausalSample, example: Example | None) -> None:
        if row is not self.last:  # a conversation may be several examples
            self.last = row
            self.seen += 1
            self.roles |= sample.roles()
            self.templated |= sample.templated
            self.empty += not all(answer.strip() for answer in sample.answers())
        if example is None:
            turns = sample.templated and sample.roles()
            self.skipped[_UNTRAINED if turns else "they are empty"] += 1
            return
        ids, labels = example
        if len(ids) > self.max_length and not sample.divisible:
            self.truncated += 1
            self.dropped += len(ids) - self.max_length
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if (labels != IGNORED).any():
            self.examples.append((ids, labels))
        else:
            self.skipped["no token with a label is left within `max_length`"] += 1


class SequenceClassification(AbstractTask):
    """A class, or a figure, for a text or a pair of texts."""

    name = "sequence-classification"
    options = frozenset({"labels"})
    collator = ClassificationCollator

    def prepare(self, request: _Request) -> Prepared:
        pairs: list[tuple[Row, Labelled]] = list(request.samples())
        places = [row.place for row, _ in pairs]
        values = [sample.label for _, sample in pairs]
        labels, numbers = request.classes(values, places)
        columns: dict[str, list[Any]] = {}
        truncated = dropped = 0
        for start in range(0, len(pairs), 1000):
            samples = [sample for _, sample in pairs[start : start + 1000]]
            texts = [sample.text for sample in samples]
            seconds = [sample.pair for sample in samples if sample.pair is not None] or None
            made, lengths = _cut_to_fit(request, texts, seconds)
            for name, cells in made.items():
                columns.setdefault(name, []).extend(cells)
            over = [n - request.max_length for n in lengths if n > request.max_length]
            truncated, dropped = truncated + len(over), dropped + sum(over)
        report = request.report(
            examples=len(pairs),
            rows=len(pairs),
            tokens=sum(map(len, columns["input_ids"])),
            label_tokens=len(numbers),
            truncated=truncated,
            dropped_tokens=dropped,
            skipped={},
            labels=str(labels),
            notes=_alike(labels),
        )
        return Prepared(_dataset(columns, scalars=numbers), report, labels, None, request.pad())


class TokenClassification(AbstractTask):
    """A class for each word, learnt on the word's first token."""

    name = "token-classification"
    options = frozenset({"labels"})
    collator = TokenClassificationCollator

    def prepare(self, request: _Request) -> Prepared:
        if not request.tokenizer.is_fast:
            raise ValueError(
                f"{type(request.tokenizer).__name__} can't say which word a token is of, which "
                "tags need. Load the model's fast tokenizer (the one with a tokenizer.json)."
            )
        pairs: list[tuple[Row, Tagged]] = list(request.samples())
        flat = [(tag, row.place) for row, sample in pairs for tag in sample.tags]
        labels, each = request.classes([tag for tag, _ in flat], [place for _, place in flat])
        if labels.regression:
            raise ValueError(
                f"{flat[0][1]}: the tags are figures, and tags are classes: names or integers. "
                "Write names."
            )
        rest = iter(each)
        spaced = any(token.startswith("Ġ") for token in request.tokenizer.tokenize("a b"))
        columns: dict[str, list[Any]] = {"labels": []}
        skipped: Counter[str] = Counter()
        truncated = dropped = 0
        for _, sample in pairs:
            numbers = list(islice(rest, len(sample.tags)))
            made = _words(request, _apart(sample.words) if spaced else sample.words)
            words = made.word_ids(0)
            first = [w is not None and w != p for w, p in zip(words, [None, *words], strict=False)]
            cells = [
                numbers[w] if new and w is not None else IGNORED
                for w, new in zip(words, first, strict=True)
            ]
            lost = len(numbers) - sum(first)
            truncated, dropped = truncated + bool(lost), dropped + lost
            if not any(first):
                skipped["no word is left within `max_length`"] += 1
                continue
            columns["labels"].append(cells)
            for name in made:
                if name != "attention_mask":
                    columns.setdefault(name, []).append(made[name])
        report = request.report(
            examples=len(pairs),
            rows=len(columns["labels"]),
            tokens=sum(map(len, columns.get("input_ids", []))),
            label_tokens=sum(c != IGNORED for cells in columns["labels"] for c in cells),
            truncated=truncated,
            dropped_tokens=dropped,
            skipped=dict(skipped),
            labels=str(labels),
            notes=_alike(labels),
        )
        return Prepared(_dataset(columns), report, labels, None, request.pad())


class Seq2SeqLM(AbstractTask):
    """A target text for a source text, by an encoder and a decoder."""

    name = "seq2seq-lm"
    options = frozenset({"max_target_length"})
    collator = Seq2SeqCollator

    def prepare(self, request: _Request) -> Prepared:
        limit = request.max_target_length
        limit = request.max_length if limit is None else limit
        pairs: list[tuple[Row, SourceTarget]] = list(request.samples())
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        truncated = dropped = 0
        empty = sum(not sample.target.strip() for _, sample in pairs)
        for start in range(0, len(pairs), 1000):
            samples = [sample for _, sample in pairs[start : start + 1000]]
            source, long = _cut_to_fit(request, [sample.source for sample in samples], None)
            target, far = _cut_to_fit(
                request, [sample.target for sample in samples], None, limit=limit, target=True
            )
            columns["input_ids"] += source["input_ids"]
            columns["labels"] += target["input_ids"]
            for here, there in zip(long, far, strict=True):
                over = max(0, here - request.max_length) + max(0, there - limit)
                truncated, dropped = truncated + bool(over), dropped + over
        report = request.report(
            examples=len(pairs),
            rows=len(pairs),
            tokens=sum(map(len, columns["input_ids"])),
            label_tokens=sum(map(len, columns["labels"])),
            truncated=truncated,
            dropped_tokens=dropped,
            skipped={},
            empty_answers=empty,
            notes=_empty_answers(request, empty),
        )
        return Prepared(_dataset(columns), report, None, None, request.pad())


TASKS: dict[str, type[AbstractTask]] = {
    task.name: task for task in (CausalLM, SequenceClassification, TokenClassification, Seq2SeqLM)
}


def _encoded(
    request: _Request, form: Format, encoder: Encoder
) -> Iterator[tuple[Row, AbstractCausalSample, Example | None]]:
    """Rows with their ids and labels, tokenised in batches; None for an empty one."""
    held: list[tuple[Row, AbstractCausalSample, list[Piece]]] = []
    size = 0
    for row, sample in request.samples():
        try:
            examples = sample.examples(form)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        held += [(row, sample, pieces) for pieces in examples or [[]]]
        size += sum(len(piece.text or "") for pieces in examples for piece in pieces)
        if size >= _BATCH:
            yield from assembled(held, encoder)
            held, size = [], 0
    yield from assembled(held, encoder)


def _cut_to_fit(
    request: _Request,
    texts: list[str],
    seconds: list[str] | None,
    *,
    limit: int | None = None,
    target: bool = False,
) -> tuple[dict[str, list[Any]], list[int]]:
    """Token ids (and types) of texts cut at `limit`, with the lengths before the cut."""
    limit = request.max_length if limit is None else limit
    added = request.added()
    texts = [added.bare(text) for text in texts]
    seconds = None if seconds is None else [added.bare(text) for text in seconds]

    def tokens(first: list[str], second: list[str] | None, **how: Any) -> dict[str, Any]:
        texts = {"text_target": first} if target else {"text": first, "text_pair": second}
        made = request.tokenizer(**texts, return_attention_mask=False, verbose=False, **how)
        return dict(made)

    made = tokens(texts, seconds)
    lengths = [len(ids) for ids in made["input_ids"]]
    over = [i for i, length in enumerate(lengths) if length > limit]
    if over:
        long = [seconds[i] for i in over] if seconds is not None else None
        short = tokens([texts[i] for i in over], long, truncation=True, max_length=limit)
        for name, cells in short.items():
            for i, cell in zip(over, cells, strict=True):
                made[name][i] = cell
    return made, lengths


def _empty_answers(request: _Request, count: int) -> tuple[str, ...]:
    """The note on examples with an empty answer."""
    if not count:
        return ()
    columns = request.shape.find(request.dataset.column_names) or {}
    name = columns[list(request.shape.columns)[-1]]
    return (f"{count:,} examples with an empty answer (`{name}`): only its end is trained",)


def _alike(labels: Labels) -> tuple[str, ...]:
    """The notes on classes that may be one."""
    groups = [" and ".join(f"`{name}`" for name in group) for group in labels.alike()]
    return tuple(f"nearly the same class: {group}, trained as different ones" for group in groups)


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding's id. Where there is none any will do, as nothing looks at padding."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _apart(words: list[str]) -> list[str]:
    """Words with the space before them, which byte-level tokens hold: one by one they lack it."""
    return words[:1] + [f" {word}" if word[:1].strip() else word for word in words[1:]]


def _words(request: _Request, words: list[str]) -> Any:
    try:
        return request.tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=request.max_length,
            verbose=False,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"{type(request.tokenizer).__name__} can't take words one by one: {error}. Byte-level "
            "tokenizers must be loaded with `add_prefix_space=True` for tags."
        ) from error


def _dataset(columns: Mapping[str, Iterable[Any]], scalars: list[Any] | None = None) -> Dataset:
    """A data set in memory of int32 lists, and of one number a row as `labels`."""
    import datasets
    import numpy as np
    import pyarrow as pa

    arrays: dict[str, Any] = {}
    for name, cells in columns.items():
        rows = [np.asarray(cell, dtype=np.int32) for cell in cells]
        ends = np.cumsum([0, *map(len, rows)], dtype=np.int64).astype(np.int32)
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        arrays[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(flat))
    if scalars is not None:
        arrays["labels"] = pa.array(scalars)
    return datasets.Dataset(pa.table(arrays))
