"""Pieces of text become ids and labels, and parts of examples become rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorica.data.collate import IGNORED
from lorica.data.pack import Span
from lorica.data.samples import AbstractCausalSample, Piece, Ranges, Row

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer that takes texts in parts, as if the parts before them stood there.

    Attributes:
        start: what the tokenizer puts before every text (BOS), or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        bare = self._ids(["a"])[0]
        full = list(tokenizer("a", verbose=False)["input_ids"])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.start = tuple(full[:at])
        # SentencePiece marks the start of every text as the start of a word.
        self._marks_start = self._behind("\n", ["a"])[0] != bare

    def encode(self, texts: Sequence[str], opens: Sequence[bool]) -> list[list[int]]:
        """The ids of each text; one that doesn't open its example goes on from another text."""
        if not self._marks_start:
            return self._ids(texts)
        made: list[list[int]] = [[]] * len(texts)
        first = [i for i, opening in enumerate(opens) if opening]
        later = [i for i, opening in enumerate(opens) if not opening]
        for i, ids in zip(first, self._ids([texts[i] for i in first]), strict=True):
            made[i] = ids
        for i, ids in zip(later, self._behind("\n", [texts[i] for i in later]), strict=True):
            made[i] = ids if ids is not None else self._alone(texts[i])
        return made

    def _behind(self, guard: str, texts: Sequence[str]) -> list[list[int] | None]:
        """The ids that each text adds behind `guard`; None where it merges with it."""
        before = self._ids([guard])[0]
        n = len(before)
        both = self._ids([guard + text for text in texts])
        return [ids[n:] if ids[:n] == before else None for ids in both]

    def _alone(self, text: str) -> list[int]:
        behind = (self._behind(guard, [text])[0] for guard in (".", "a"))
        return next((ids for ids in behind if ids is not None), self._ids([text])[0])

    def trained(self, text: str, opens: bool, ids: Sequence[int], ranges: Ranges) -> list[bool]:
        """Whether each of a text's ids has a character of these stretches of it.

        Args:
            text, opens: as in `encode`, which has made `ids` of them.

        Raises:
            ValueError: the tokenizer gives no character offsets of its tokens.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                "`train_detail` needs a tokenizer that gives the character offsets of its tokens, "
                f"and {type(self.tokenizer).__name__} is none (it has no tokenizer.json). Take a "
                'model with a fast tokenizer, or say `"train": true` or false of whole turns.'
            )
        for guard in ("",) if opens or not self._marks_start else ("\n", ".", "a", ""):
            skipped = len(self._ids([guard])[0]) if guard else 0
            made = self.tokenizer(
                guard + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            if list(made["input_ids"])[skipped:] == list(ids):
                break
        places: Any = made["offset_mapping"][skipped:]
        moved = [(a + len(guard), b + len(guard)) for a, b in ranges]
        return [any(a < last and first < b for a, b in moved) for first, last in places]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        made = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return made["input_ids"]  # type: ignore[return-value]


@dataclass(frozen=True)
class Added:
    """The tokens that a tokenizer puts around every text, as text.

    A text that has them already is handed over without, so that they are there once.
    """

    start: tuple[str, ...]
    end: tuple[str, ...]

    @classmethod
    def by(cls, tokenizer: PreTrainedTokenizerBase) -> Added:
        bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        full = list(tokenizer("a", verbose=False)["input_ids"])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        around = full[:at], full[at + len(bare) :]
        start, end = (tuple(map(str, tokenizer.convert_ids_to_tokens(ids))) for ids in around)
        return cls(start, end)

    def bare(self, text: str) -> str:
        """The text without the tokens that are going to be added, and the space beside them."""
        for token in self.start:
            if text.lstrip().startswith(token):
                text = text.lstrip().removeprefix(token).lstrip()
        for token in reversed(self.end):
            if text.rstrip().endswith(token):
                text = text.rstrip().removesuffix(token).rstrip()
        return text


Example = tuple["np.ndarray", "np.ndarray"]  # ids, labels: int32, of one length


def assembled(
    held: list[tuple[Row, AbstractCausalSample, list[Piece]]], encoder: Encoder
) -> Iterator[tuple[Row, AbstractCausalSample, Example | None]]:
    import numpy as np

    texts: list[str] = []
    opens: list[bool] = []
    for _, _, pieces in held:
        opening = True
        for piece in pieces:
            if piece.text:
                texts.append(piece.text)
                opens.append(opening)
                opening = False
    made = iter(encoder.encode(texts, opens))
    for row, sample, pieces in held:
        ids: list[int] = []
        learn: list[bool] = []
        opening = True
        for piece in pieces:
            part = next(made) if piece.text else piece.ids
            ids += part
            if piece.text and piece.ranges is not None:
                learn += encoder.trained(piece.text, opening, part, piece.ranges)
            else:
                learn += piece.mask if piece.mask is not None else [piece.trained] * len(part)
            opening = opening and not piece.text
        if not ids:
            yield row, sample, None
            continue
        tokens = np.array(ids, dtype=np.int32)
        labels = np.where(learn, tokens, np.int32(IGNORED))
        labels[0] = IGNORED  # no token predicts the first
        yield row, sample, (tokens, labels)


def spans_with_labels(rows: list[list[Span]], examples: list[Example]) -> list[list[Span]]:
    """Without the parts of documents in which nothing is predicted (their first token isn't)."""
    kept = (
        [span for span in row if (examples[span[0]][1][span[1] + 1 : span[2]] != IGNORED).any()]
        for row in rows
    )
    return [row for row in kept if row]


def laid_out(
    rows: list[list[Span]], examples: list[Example], *, positions: bool
) -> dict[str, list[Any]]:
    """The columns of rows that are made of parts of examples."""
    import numpy as np

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    if positions:
        columns["position_ids"] = []
    for row in rows:
        columns["input_ids"].append(np.concatenate([examples[i][0][a:b] for i, a, b in row]))
        labels = np.concatenate([examples[i][1][a:b] for i, a, b in row])
        places = np.concatenate([np.arange(b - a, dtype=np.int32) for _, a, b in row])
        labels[places == 0] = IGNORED  # else a neighbour's last token would predict it
        columns["labels"].append(labels)
        if positions:
            columns["position_ids"].append(places)
    return columns
