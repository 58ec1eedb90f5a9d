"""Rows of a data set that is read as the run goes on, and a place in it to come back to.

Documents are taken a block at a time, about a million characters: a block's ids are laid into full
rows, what is left goes before the next block, and the rows of a block are shuffled among
themselves. So the order depends on the seed alone, and a place is a few numbers: where the source
stood before the block, the ids carried into it, and its number. When the source ends it begins
again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lorica.data.loaded import examples, load
from lorica.data.samples import AbstractCausalSample, Row, cut
from lorica.data.shapes import detect
from lorica.data.stream import BATCH, TASK, Ids, running_ids
from lorica.data.words import listing, strings
from lorica.tensors.dtensor_ops import seeded
from lorica.text import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START: dict[str, Any] = {"rows": 0, "block": 0, "epoch": 0, "carry": [], "source": None}


class Streamed(IterableDataset):
    """Rows (length,) of int32 ids, without end.

    Args:
        source: a folder that `datasets.load_dataset` reads, or a hub id (`org/name:config`).
        split: default: train.
        columns: as of `lorica.data.read`.

    Raises:
        ValueError: nothing can be loaded, or its columns are of no shape that a causal model
            learns.
    """

    def __init__(
        self, source: str, *, split: str | None = None, columns: Mapping[str, str] | None = None
    ) -> None:
        self.source, self.split = source, split or "train"
        self.data = load(source, self.split, streaming=True)
        self.live: list[Any] = []  # an iterator, after where it stands: epoch, source
        weakref.finalize(self, self.live.clear)  # closed before the modules go that it closes with
        first = next(examples(source, self.split, self.data), None)
        if first is None:
            raise ValueError(f"`{source}` (split {self.split}) holds no rows: name another")
        self.columns = {name: target for target, name in (columns or {}).items()}
        if lost := [name for name in self.columns if name not in first]:
            raise ValueError(
                f"`columns` names `{lost[0]}`, which {source} lacks: it has {listing(first)}."
                + nearest(lost[0], first)
            )
        self.shape = detect(self._renamed(first), task=TASK)

    def lay(self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        """How its documents become rows; to be called before it is iterated."""
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.start, self.consumed = START, 0
        self.places: list[dict[str, Any]] = []

    def resume(self, place: Mapping[str, Any], consumed: int) -> None:
        """Go on as if `consumed` rows had been taken; `place` is what `place` returned then."""
        self.start, self.consumed = dict(place), consumed

    def place(self, consumed: int) -> dict[str, Any]:
        """Where to come back to when so many rows have been used; earlier places are forgotten.

        The loader reads ahead, so what was used is told and not counted here.
        """
        while len(self.places) > 1 and self.places[1]["rows"] <= consumed:
            self.places.pop(0)
        return self.places[0] if self.places else self.start

    def texts(self, characters: int) -> Iterator[str]:
        """The beginning of the data, in parts, for a tokenizer to be trained on."""
        for example in self._source(START):
            for row in self._rows([example]):
                for text in strings(row.values):
                    yield from cut(text)
                    characters -= len(text)
            if characters <= 0:
                return

    def head(self, count: int) -> Ids:
        """The first rows (at most `count`, length) in the data's order."""
        place, found = START, [np.zeros((0, self.length), dtype=np.int32)]
        while place["rows"] < count and not place["epoch"]:
            rows, place = self._block(place)
            found.append(rows)
        return np.concatenate(found)[:count]

    def __iter__(self) -> Iterator[Ids]:
        place, used = self.start, self.consumed - self.start["rows"]
        while True:
            self.places.append(place)
            rows, place = self._block(place)
            order = torch.randperm(
                len(rows), generator=seeded(f"{self.seed}/{self.places[-1]['block']}")
            )
            yield from rows[order.numpy()[used:]]
            used = 0

    def _block(self, place: dict[str, Any]) -> tuple[Ids, dict[str, Any]]:
        """The rows of one block, in order, and the place after it."""
        source = self._source(place)
        block: list[dict[str, Any]] = []
        size, ended = 0, True
        for example in source:
            block.append(example)
            size += sum(map(len, strings(example)))
            if size >= BATCH:
                ended = False
                break
        carry = np.array(place["carry"], dtype=np.int32)
        ids = np.concatenate([carry, *running_ids(self._samples(block), self.tokenizer)])
        count = len(ids) // self.length
        if ended and not count and not place["source"]:
            raise ValueError(
                f"the text of {self.source} is too short: {len(ids):,} tokens, and one row has"
                f" {self.length}. Give more text, or a smaller `--max-length`"
            )
        stands = None if ended else self.data.state_dict()
        # `datasets` words the place of an iterator otherwise where it was never loaded; so the one
        # that begins a pass is not kept, and places do not tell how often a run was cut.
        if stands is not None and place["source"] is not None:
            self.live[:] = place["epoch"], stands, source
        after = {
            "rows": place["rows"] + count,
            "block": place["block"] + 1,
            "epoch": place["epoch"] + ended,
            "carry": ids[count * self.length :].tolist(),
            "source": stands,
        }
        return ids[: count * self.length].reshape(count, self.length), after

    def _source(self, place: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The data from this place on.

        The iterator that stands there goes on: a new one would read its shard from the beginning.
        """
        live = self.live[:]
        self.live.clear()  # what is broken off stands nowhere
        if live[:2] == [place["epoch"], place["source"]]:
            return live[2]
        self.data.set_epoch(place["epoch"])
        self.data.load_state_dict(place["source"])  # None: the start of the pass
        return examples(self.source, self.split, self.data)

    def _samples(
        self, examples: list[dict[str, Any]]
    ) -> Iterator[tuple[Row, AbstractCausalSample]]:
        return ((row, self.shape.readers[TASK](row)) for row in self._rows(examples))

    def _rows(self, examples: list[dict[str, Any]]) -> list[Row]:
        if not examples:
            return []
        made = [self._renamed(example) for example in examples]
        return self.shape.rows({name: [each.get(name) for each in made] for name in made[0]})

    def _renamed(self, example: Mapping[str, Any]) -> dict[str, Any]:
        targets = set(self.columns.values())
        kept = {k: v for k, v in example.items() if k not in targets or k in self.columns}
        return {self.columns.get(name, name): value for name, value in kept.items()}
