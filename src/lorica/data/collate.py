"""Rows to batches: one collator a task. `labels` is in every batch, -100 where nothing is learnt.

For causal models the first label of every example is -100 already (`prepare` sees to it: nothing
predicts it), so counting the labels that aren't -100 counts the predictions, whether or not the
first column is left out, as transformers' Trainer does for `num_items_in_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100
Rows = Sequence[dict[str, Any]]


def padded(
    rows: Sequence[Sequence[int]], fill: int, pad_to_multiple_of: int | None = None
) -> torch.Tensor:
    """Sequences as one tensor (rows, longest), padded on the right with `fill`; int64.

    Example:
        >>> padded([[1, 2, 3], [4]], fill=0, pad_to_multiple_of=2).tolist()
        [[1, 2, 3, 0], [4, 0, 0, 0]]
    """
    import torch

    width = max(len(row) for row in rows)
    if pad_to_multiple_of is not None:
        width += -width % pad_to_multiple_of
    return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows], dtype=torch.int64)


def _ones(rows: Rows) -> list[list[int]]:
    return [[1] * len(row["input_ids"]) for row in rows]


@dataclass(frozen=True)
class CausalCollator:
    """input_ids, attention_mask, labels, each (batch, tokens).

    Args:
        pad_token_id: fills `input_ids`; any id will do, as nothing attends to it.
        pad_to_multiple_of: width of the batch, in tokens. Default: the longest row's.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        multiple = self.pad_to_multiple_of
        return {
            "input_ids": padded([r["input_ids"] for r in rows], self.pad_token_id, multiple),
            "attention_mask": padded(_ones(rows), 0, multiple),
            "labels": padded([r["labels"] for r in rows], IGNORED, multiple),
        }


@dataclass(frozen=True)
class PackedCollator:
    """input_ids, position_ids, labels, each (batch, tokens), without an `attention_mask`.

    Padding is one more example at the end of a row, whose positions start at 0.

    Args:
        pad_token_id, pad_to_multiple_of: as `CausalCollator`.
        block_mask: write the mask out too, in this dtype (the model's): (batch, 1, tokens, tokens),
            0 where a token may look and the dtype's lowest number elsewhere. For models that make
            no mask from positions (see `lorica.data.pack`); a layer's sliding window is lost.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    block_mask: torch.dtype | None = None

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        multiple = self.pad_to_multiple_of
        ids = padded([r["input_ids"] for r in rows], self.pad_token_id, multiple)
        width = ids.shape[1]
        places = [[*r["position_ids"], *range(width - len(r["position_ids"]))] for r in rows]
        batch = {
            "input_ids": ids,
            "position_ids": padded(places, 0),
            "labels": padded([r["labels"] for r in rows], IGNORED, multiple),
        }
        if self.block_mask is not None:
            batch["attention_mask"] = blocks(batch["position_ids"], self.block_mask)
        return batch


def blocks(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive causal mask (batch, 1, tokens, tokens) of rows whose examples start at 0.

    Example:
        >>> import torch
        >>> (blocks(torch.tensor([[0, 1, 0]]), torch.float32)[0, 0] == 0).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    import torch

    example = (position_ids == 0).cumsum(-1)  # (batch, tokens)
    same = example[:, :, None] == example[:, None, :]
    # Additive, not boolean: eager attention adds the mask, and would add True as 1.
    mask = torch.zeros(same.shape, dtype=dtype)
    return mask.masked_fill_(~same.tril(), torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class ClassificationCollator:
    """input_ids, attention_mask, token_type_ids where there are any; labels (batch,).

    Class numbers are int64, the figures of a regression float32.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        import torch

        labels = [row["labels"] for row in rows]
        dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
        return {**_encoder(self, rows), "labels": torch.tensor(labels, dtype=dtype)}


@dataclass(frozen=True)
class TokenClassificationCollator:
    """As `ClassificationCollator`, with labels (batch, tokens)."""

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        labels = padded([r["labels"] for r in rows], IGNORED, self.pad_to_multiple_of)
        return {**_encoder(self, rows), "labels": labels}


@dataclass(frozen=True)
class Seq2SeqCollator:
    """input_ids, attention_mask (batch, source tokens); labels (batch, target tokens).

    The model makes its decoder's inputs from the labels, shifted by one.

    Args:
        pad_token_id, pad_to_multiple_of: as `CausalCollator`.
        shift: makes `decoder_input_ids` of the labels here already (the model's
            `prepare_decoder_input_ids_from_labels`), for a loss that keeps the labels from it.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    shift: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        labels = padded([r["labels"] for r in rows], IGNORED, self.pad_to_multiple_of)
        batch = {**_encoder(self, rows), "labels": labels}
        if self.shift is not None:
            batch["decoder_input_ids"] = self.shift(labels)
        return batch


def _encoder(
    collator: ClassificationCollator | TokenClassificationCollator | Seq2SeqCollator, rows: Rows
) -> dict[str, torch.Tensor]:
    multiple = collator.pad_to_multiple_of
    batch = {
        "input_ids": padded([r["input_ids"] for r in rows], collator.pad_token_id, multiple),
        "attention_mask": padded(_ones(rows), 0, multiple),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded([r["token_type_ids"] for r in rows], 0, multiple)
    return batch
