"""What a shape makes of a row: the few neutral forms that tokenising knows.

A causal model trains on *pieces*: stretches of text, each with the role it belongs to. Whoever adds
a data shape turns its columns into one of these forms and touches nothing else.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from lorica.data.chat import Format

DOCUMENT = "document"
USER = "user"
ASSISTANT = "assistant"


Ranges = tuple[tuple[int, int], ...]
"""Stretches of a text, each from a character to the one behind its last, counted from 0."""

Flag = bool | Ranges | None
"""What a turn says of itself: trained or not, trained in these stretches alone, or nothing."""


@dataclass(frozen=True)
class Piece:
    """A stretch of an example: `text` still to be tokenised, or `ids` that stand as they are."""

    trained: bool
    text: str | None = None
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] | None = None  # per id, where a piece is trained in part
    ranges: Ranges | None = None  # of its text, where a piece is trained in part


class AbstractCausalSample(ABC):
    """One example of a causal language model."""

    divisible: ClassVar[bool]  # may be cut into several rows (a document), or only cut short
    templated: ClassVar[bool]  # a chat template has a part in it

    @abstractmethod
    def pieces(self, form: Format) -> list[Piece]:
        """The example from left to right; raises ValueError where `form` can't render it."""

    def examples(self, form: Format) -> list[list[Piece]]:
        """The examples to train on, each from left to right: one, but for conversations whose
        template writes earlier turns anew; none, where nothing of it is trained."""
        return [self.pieces(form)]

    @abstractmethod
    def roles(self) -> set[str]:
        """The roles that occur in it, of which the user chooses those to train on."""

    def answers(self) -> list[str]:
        """What the assistant says in it."""
        return []


@dataclass(frozen=True)
class Document(AbstractCausalSample):
    """Running text: every token is trained, and a long one becomes several rows."""

    text: str
    divisible: ClassVar[bool] = True
    templated: ClassVar[bool] = False

    def pieces(self, form: Format) -> list[Piece]:
        if not self.text.strip():
            return []
        text = form.bare(self.text)
        texts = [Piece(True, text=part) for part in cut(text)]
        return [form.begin(text), *texts, form.end(True, text)]

    def roles(self) -> set[str]:
        return {DOCUMENT}


@dataclass(frozen=True)
class Exchange(AbstractCausalSample):
    """Plain texts in turn, `(role, text)`, taken as they are; each answer ends with EOS.

    `worded` turns hold texts of the data behind words of a plain format, such as `Question: `.
    """

    turns: tuple[tuple[str, str], ...]
    worded: bool = False
    divisible: ClassVar[bool] = False
    templated: ClassVar[bool] = False

    def pieces(self, form: Format) -> list[Piece]:
        (opener, first), *rest = self.turns
        first = form.bare(first, end=False)
        made = [form.begin(first)]
        if self.worded:
            first, rest = form.within(first), [(role, form.within(text)) for role, text in rest]
        for role, text in ((opener, first), *rest):
            text = form.bare(text, start=False) if role == ASSISTANT else text
            made.append(Piece(form.trains(role), text=text))
            if role == ASSISTANT:
                made.append(form.end(form.trains(role), text))
        return made

    def roles(self) -> set[str]:
        return {role for role, _ in self.turns}

    def answers(self) -> list[str]:
        return [text for role, text in self.turns if role == ASSISTANT]


@dataclass(frozen=True)
class Chat(AbstractCausalSample):
    """Messages for a chat template, with plain turns for models that have none.

    `trained_from` is the first message that may be trained: those before it are a prompt. `flags`
    holds what each message says of itself.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    plain: Exchange | None = None
    trained_from: int = 0
    flags: tuple[Flag, ...] = ()
    divisible: ClassVar[bool] = False
    templated: ClassVar[bool] = True

    def pieces(self, form: Format) -> list[Piece]:
        if form.template is None and self.plain is not None:
            return self.plain.pieces(form)
        return form.whole(self.messages, self.tools)

    def examples(self, form: Format) -> list[list[Piece]]:
        if form.template is None and self.plain is not None:
            return self.plain.examples(form)
        return form.render(self.messages, self.tools, self.trained_from, self.flags)

    def roles(self) -> set[str]:
        return {message["role"] for message in self.messages}

    def answers(self) -> list[str]:
        calls = (m for m in self.messages[self.trained_from :] if not m.get("tool_calls"))
        return [m["content"] for m in calls if m["role"] == ASSISTANT]


@dataclass(frozen=True)
class Encoded(AbstractCausalSample):
    """Token ids that somebody else made; `labels=None` trains on all of them."""

    input_ids: list[int]
    labels: list[int] | None
    divisible: ClassVar[bool] = False
    templated: ClassVar[bool] = False

    def pieces(self, form: Format) -> list[Piece]:
        if form.roles is None and self.labels is not None:
            raise ValueError(
                '`train_on="all"` was given for data that has its own `labels`: those decide. '
                "Leave it out, or drop the column."
            )
        known = len(form.tokenizer)
        if (wrong := next((i for i in self.input_ids if not 0 <= i < known), None)) is not None:
            raise ValueError(
                f"`input_ids` holds {wrong}, and the ids of this tokenizer are 0 to {known - 1}: "
                "the data was made with another one. Name that model, or make the ids anew."
            )
        labels = self.input_ids if self.labels is None else self.labels
        mask = tuple(label != -100 for label in labels)
        return [Piece(True, ids=tuple(self.input_ids), mask=mask)]

    def roles(self) -> set[str]:
        return {DOCUMENT}


@dataclass(frozen=True)
class SourceTarget:
    """An encoder's text and what the decoder shall say."""

    source: str
    target: str


@dataclass(frozen=True)
class Labelled:
    """A text, or two, with one label (a class name, a class number, or a figure)."""

    text: str
    pair: str | None
    label: Any


@dataclass(frozen=True)
class Tagged:
    """Words and one tag for each."""

    words: list[str]
    tags: list[Any]


@dataclass(frozen=True)
class Row:
    """A row of the data under the shape's own column names, which knows where it came from."""

    values: dict[str, Any]
    place: str
    actual: dict[str, str] = field(default_factory=dict)  # the shape's column -> the data's

    def error(self, column: str, allowed: str) -> ValueError:
        """The complaint about this row's `column`, to be raised."""
        from lorica.data.words import excerpt, kind_of

        value = self.values.get(column)
        shown = "" if value is None else f" ({excerpt(value)})"
        return ValueError(
            f"{self.place}: `{self.actual.get(column, column)}` is {kind_of(value)}{shown}: "
            f"{allowed}. Mend or remove that row."
        )

    def text(self, column: str, *, numbers: bool = False) -> str:
        """The text of a column; with `numbers`, a number counts as its text."""
        value = self.values.get(column)
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.error(column, "it must be a text")
        return value

    def optional(self, column: str) -> str:
        """The text (or number as text) of a column that may be absent or null, else ""."""
        return "" if self.values.get(column) is None else self.text(column, numbers=True)

    def items(self, column: str, check: Callable[[Any], bool], allowed: str) -> list[Any]:
        """A list whose every element passes `check`."""
        value = self.values.get(column)
        if not isinstance(value, list) or not value or not all(map(check, value)):
            raise self.error(column, f"it must be a list of {allowed}")
        return value


# Between two words, where every tokenizer has a seam; failing that between a word and the white
# space behind it; failing that anywhere.
_SEAMS = (re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])"), re.compile(r"(?<=\S)(?=\s)"))


def cut(text: str, size: int = 65_536) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut between words.

    Tokenizers that don't split at words (SentencePiece's) take more than linear time on a whole
    book. The ids are those of the whole text, but for vocabularies with tokens across words: there
    a cut costs a token or two.

    Example:
        >>> list(cut("once upon a time", size=9))
        ['once upon', ' a time']
    """
    start = 0
    while len(text) - start > size + size // 2:
        window = start + size, min(len(text), start + size + size // 4)
        found = (seam.search(text, *window) for seam in _SEAMS)
        at = next((match.start() for match in found if match), window[0])
        yield text[start:at]
        start = at
    yield text[start:]
