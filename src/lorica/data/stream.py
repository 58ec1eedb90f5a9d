"""Running text for pre-training: documents end to end, as ids in full rows.

Every document is opened and closed as the tokenizer does it (BOS where it has one, EOS); the ids
are joined in the order of the data and cut wherever a row is full, so no row is padded, and what
one row leaves of a document goes on in the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from lorica.data.chat import COMPLETION, Format, template_of
from lorica.data.encode import Encoder
from lorica.data.formats import suffix_of
from lorica.data.read import data_files, read
from lorica.data.samples import AbstractCausalSample, Row, cut
from lorica.data.shapes import Shape, detect
from lorica.data.words import strings
from lorica.embedded.source import TEST, TRAIN, is_embedded
from lorica.text import clear_errors, to_path

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"

TASK = "causal-lm"
BATCH = 1_000_000  # characters tokenised at a time: the backend's records take 100 bytes a token
_EMBEDDED = {TRAIN: 20_000, TEST: 1_000}  # rows of the embedded tasks, 400 kB and 20 kB of text


@dataclass(frozen=True)
class Text:
    """Data sets of documents, in order.

    Attributes:
        parts: (data set, its shape); a data set may be one that is streamed.
    """

    parts: tuple[tuple[Any, Shape], ...]

    @classmethod
    def read(
        cls,
        sources: Sequence[str],
        *,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        documents: str | None = None,
    ) -> Text:
        """Read files, folders or hub data sets of any shape that a causal model learns.

        Args:
            sources: as `lorica.data.read` takes them.
            split, columns: as there, for each.
            documents: what a document of a .txt file is: `file` (default), `paragraph` or `line`.

        Raises:
            ValueError: as `lorica.data.read`; `documents` without a .txt file.

        Example:
            >>> import tempfile, pathlib
            >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
            >>> _ = path.write_text("One.\\n\\nStill one.")
            >>> [len(data) for data, _ in Text.read([str(path)]).parts]
            [1]
        """
        plain = [_is_txt(source) for source in sources]
        if documents is not None and not any(plain):
            raise ValueError(
                f"`documents={documents!r}` was given for {', '.join(sources)}: only .txt files"
                " are split into documents. Leave it out"
            )
        parts = []
        for source, txt in zip(sources, plain, strict=True):
            how: dict[str, Any] = {"txt_split": documents or "file"} if txt else {}
            if is_embedded(source):
                how["max_samples"] = _EMBEDDED.get(split or TRAIN)
            data = read(source, split=split, columns=columns, **how)
            parts.append((data, detect(data.column_names, task=TASK)))
        return cls(tuple(parts))

    def rows(self) -> Iterator[tuple[Row, Shape]]:
        """Every row, with the shape it is of."""
        for data, shape in self.parts:
            for row in shape.rows(_table(data, shape)[:]):
                yield row, shape

    def texts(self) -> Iterator[str]:
        """All texts of the shapes' columns, in parts of a size that tokenizers like."""
        for row, _ in self.rows():
            for text in strings(row.values):
                yield from cut(text)

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """The documents as ids, end to end."""
        import numpy as np

        count = 0

        def counted() -> Iterator[tuple[Row, AbstractCausalSample]]:
            nonlocal count
            for row, shape in self.rows():
                count += 1
                yield row, shape.readers[TASK](row)

        parts = list(running_ids(counted(), tokenizer))
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return Encoded(ids, count)


@dataclass(frozen=True)
class Encoded:
    """Ids (tokens,) of so many documents, end to end."""

    ids: Ids
    documents: int

    def rows(self, length: int) -> Ids:
        """Full rows (rows, length), without the tokens that are left at the end."""
        count = len(self.ids) // length
        return self.ids[: count * length].reshape(count, length)


@dataclass(frozen=True)
class Rows:
    """Rows of one length as a data set for torch's loaders; a batch is taken at once.

    Args:
        ids: (rows, length), int32.
    """

    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Ids:
        return self.ids[index]

    def __getitems__(self, indices: list[int]) -> Ids:
        return self.ids[indices]


def collate(rows: Any) -> dict[str, torch.Tensor]:
    """Input ids and labels (rows, length), the same tensor: every token is predicted.

    Without a mask, attention is causal over the whole row.
    """
    import numpy as np
    import torch

    ids = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    return {"input_ids": ids, "labels": ids}


def running_ids(
    samples: Iterable[tuple[Row, AbstractCausalSample]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Ids]:
    """The ids of all samples, end to end, in arrays of any length."""
    encoder = Encoder(tokenizer)
    template = template_of(tokenizer, None, starts=bool(encoder.start))
    form = Format(tokenizer, template, COMPLETION, encoder.start)
    pieces: list[tuple[str, tuple[int, ...], bool]] = []  # text or ids; whether it opens a sample
    size = 0
    for row, sample in samples:
        try:
            made = sample.pieces(form)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        opens = True
        for piece in made:
            pieces.append((piece.text or "", piece.ids, opens))
            size += len(piece.text or "")
            opens = opens and not piece.text
            if size >= BATCH:
                yield _joined(pieces, encoder)
                pieces, size = [], 0
    if pieces:
        yield _joined(pieces, encoder)


def _joined(pieces: list[tuple[str, tuple[int, ...], bool]], encoder: Encoder) -> Ids:
    import numpy as np

    texts = [(text, opens) for text, _, opens in pieces if text]
    made = iter(encoder.encode([text for text, _ in texts], [opens for _, opens in texts]))
    lists = (next(made) if text else ids for text, ids, _ in pieces)
    return np.fromiter(chain.from_iterable(lists), dtype=np.int32)


@clear_errors()
def has_txt(sources: Sequence[str]) -> bool:
    """Whether any of these is, or holds, a .txt file."""
    return any(map(_is_txt, sources))


def _is_txt(source: str) -> bool:
    path = to_path(source)
    files = data_files(path) if path.is_dir() else [path]
    return any(suffix_of(file)[0] == ".txt" for file in files)


def _table(data: Dataset, shape: Shape) -> Any:
    """The columns that the shape reads, and the hidden ones."""
    found = (shape.find(data.column_names) or {}).values()
    hidden = [name for name in data.column_names if name.startswith("__")]
    return data.select_columns([*dict.fromkeys(found), *hidden])
