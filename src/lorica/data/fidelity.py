"""Whether a model can see the data's text at all: what a tokenizer drops, and ids beyond the table.

A tokenizer with a small vocabulary replaces or drops characters that it doesn't know, and nothing
of that shows in a loss. So a sample of the texts is encoded and decoded, and what doesn't come back
is counted. Case, accents and white space aside, as some tokenizers remove those on purpose.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LIMIT = 0.02  # of the characters of a sample; more is an error
_TEXT = 4_000  # characters of a text that are looked at
_ALL = 400_000  # and of all texts together


@dataclass(frozen=True)
class Loss:
    """The characters of a sample of texts that don't come back from a tokenizer.

    Attributes:
        share: of all characters that are no white space, 0 to 1.
        characters: those that are lost most often, at most 10; one that can't be printed is
            written as Python does.
    """

    share: float
    characters: str

    def __str__(self) -> str:
        return f"{self.share:.2%} of the characters of the text (among them {self.characters})"


def text_loss(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Loss:
    """What of these texts a tokenizer loses.

    Args:
        tokenizer: the model's.
        texts: the beginning of each is looked at, until 400,000 characters are read.

    Example:
        >>> class Letters:
        ...     unk_token = None
        ...     def __call__(self, text, **_):
        ...         return {"input_ids": [letter for letter in text if letter.isalnum()]}
        ...     def decode(self, ids, **_):
        ...         return "".join(ids)
        >>> text_loss(Letters(), ["48/2 = 24"])
        Loss(share=0.2857142857142857, characters='/ =')
    """
    lost: Counter[str] = Counter()
    total, left = 0, _ALL
    unknown = tokenizer.unk_token
    for text in texts:
        if left <= 0:
            break
        text = text[: min(_TEXT, left)]
        left -= len(text)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        back = str(
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        if unknown:
            back = back.replace(str(unknown), "")
        before = _plain(text)
        total += len(before)
        lost += Counter(before) - Counter(_plain(back))
    common = " ".join(
        character if character.isprintable() else ascii(character)[1:-1]
        for character, _ in lost.most_common(10)
    )
    return Loss(sum(lost.values()) / max(total, 1), common)


def _plain(text: str) -> str:
    """Without case, accents and white space."""
    apart = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in apart if not unicodedata.combining(c) and not c.isspace())


def check_ids(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Refuses rows with token ids that a model has no embedding for.

    Args:
        dataset: rows as `prepare` makes them.
        tokenizer: the one they were made with.
        embeddings: rows of the model's embedding table.

    Raises:
        ValueError: naming the largest id and its token.
    """
    import pyarrow.compute

    compute: Any = pyarrow.compute
    most = -1
    for name in {"input_ids", "labels"} & set(dataset.column_names):
        column = dataset.data.table.column(name)
        if str(column.type).startswith(("list", "large_list")):
            most = max(most, compute.max(compute.list_flatten(column)).as_py() or 0)
    if most >= embeddings:
        raise ValueError(f"The data: {beyond(most, tokenizer, embeddings)}")


def beyond(most: int, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> str:
    """What to say of a token id that a model has no embedding for."""
    token, size = tokenizer.convert_ids_to_tokens(most), len(tokenizer)
    return (
        f"it has the token id {most} (`{token}`), and the model's table of embeddings ends at"
        f" {embeddings - 1}: the tokenizer has {size} tokens, and the model was not resized for"
        f" them. Add the rows, `model.resize_token_embeddings({size})`, save the model and name"
        " that folder, or take the tokenizer that the model was published with."
    )
