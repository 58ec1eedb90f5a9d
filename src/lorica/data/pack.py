"""Packing: several examples to a row, and none of them sees another.

What isolates them (measured with transformers 5.23 on sdpa and eager attention): the positions of
a row start at 0 again with each example and the batch has no `attention_mask`; transformers then
makes a block-diagonal mask from the jumps of `position_ids`, per layer, with the layer's own
window. It does so only where there is no cache (`use_cache=False`, which the Trainer sets and a
plain loop doesn't: Llama and GPT-2 leak there by 0.1 in the logits), and only in models that hand
their positions to the mask (OPT and BLOOM don't). `check_isolation` finds out for a given model; a
mask written out by the collator (`block_mask`) serves where positions don't (OPT; not BLOOM).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorica.data.collate import PackedCollator

Span = tuple[int, int, int]
"""(example, first token, end): a part of an example, or all of it."""


@dataclass(frozen=True)
class Packing:
    """A way to lay examples into rows of at most `capacity` tokens."""

    plan: Callable[[Sequence[int], int], list[list[Span]]]  # (lengths, capacity) -> rows
    cuts: bool  # cuts examples wherever a row is full, so only running text can be laid so
    packs: bool  # several examples to a row


def pieces(lengths: Sequence[int], capacity: int) -> list[Span]:
    """Every example in parts of `capacity` tokens, the last one shorter.

    Example:
        >>> pieces([3, 5], capacity=4)
        [(0, 0, 3), (1, 0, 4), (1, 4, 5)]
    """
    return [
        (i, start, min(start + capacity, length))
        for i, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]


def one_a_row(lengths: Sequence[int], capacity: int) -> list[list[Span]]:
    """No packing; a long document is several rows."""
    return [[span] for span in pieces(lengths, capacity)]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[Span]]:
    """Best-fit decreasing: the longest first, each into the row that it leaves the least room in.

    Rows are ordered by their first example, so that rows of one length don't stand together.

    Example:
        >>> best_fit([2, 3, 5, 4], capacity=7)
        [[(0, 0, 2), (2, 0, 5)], [(1, 0, 3), (3, 0, 4)]]
    """
    rows: list[list[Span]] = []
    rooms: list[int] = []  # the distinct amounts of room left, ascending
    rows_with: dict[int, list[int]] = {}  # room -> the rows that have it

    def put(row: int, room: int) -> None:
        if room and room not in rows_with:
            insort(rooms, room)
        if room:
            rows_with.setdefault(room, []).append(row)

    for span in sorted(pieces(lengths, capacity), key=lambda s: (s[1] - s[2], s)):
        length = span[2] - span[1]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            rows.append([span])
            put(len(rows) - 1, capacity - length)
            continue
        room = rooms[at]
        row = rows_with[room].pop()
        if not rows_with[room]:
            del rows_with[room], rooms[at]
        rows[row].append(span)
        put(row, room - length)
    return sorted(sorted(row) for row in rows)


def wrapped(lengths: Sequence[int], capacity: int) -> list[list[Span]]:
    """Documents in their order, each row filled to the last token.

    Example:
        >>> wrapped([3, 5], capacity=4)
        [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)]]
    """
    rows: list[list[Span]] = []
    room = 0
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                rows.append([])
                room = capacity
            end = min(length, start + room)
            rows[-1].append((i, start, end))
            room -= end - start
            start = end
    return rows


PACKINGS = {
    "none": Packing(one_a_row, cuts=False, packs=False),
    "best_fit": Packing(best_fit, cuts=False, packs=True),
    "wrapped": Packing(wrapped, cuts=True, packs=True),
}


def check_isolation(model: PreTrainedModel, collator: PackedCollator | None = None) -> None:
    """Raises unless this model keeps the examples of a packed row apart.

    Two small batches, equal but for the first example of each row, go through the model as it is
    configured now (in evaluation mode, which is put back): the logits of the second example must be
    the same.

    Args:
        model: a causal language model of transformers, on any device.
        collator: the one that the training uses. Default: one that marks examples by positions.

    Raises:
        ValueError: if an example sees its neighbour, with what to do about it.
    """
    import torch

    from lorica.data.collate import PackedCollator
    from lorica.tensors.modules import evaluating

    collator = PackedCollator() if collator is None else collator
    device = next(model.parameters()).device
    words = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore[reportIndexIssue]
    logits = []
    with evaluating(model), torch.no_grad():
        for shift in (0, 1):
            first = [(3 * i + shift) % words for i in range(4)]
            ids = [*first, *((5 * i + 2) % words for i in range(4))]
            row = {"input_ids": ids, "labels": ids, "position_ids": [0, 1, 2, 3] * 2}
            batch = {key: value.to(device) for key, value in collator([row, row]).items()}
            logits.append(model(**batch).logits[:, 4:].float())
    difference = float((logits[0] - logits[1]).abs().max())
    if difference > 1e-4 * max(1.0, float(logits[0].abs().max())):
        raise ValueError(
            f"Packing doesn't isolate examples in {type(model).__name__}: changing one example "
            f"changed its neighbour's logits by {difference:.2g}, and they must not see each "
            "other. Set `model.config.use_cache = False` (transformers ignores packing while "
            "there is a cache); if it is off, give the collator `block_mask=torch.float32` (the "
            'model\'s dtype), or prepare the data with `packing="none"`.'
        )


def check_causal(model: PreTrainedModel, columns: Collection[str] = ()) -> None:
    """Raises unless a position's logits are independent of the tokens after it.

    Two small batches, equal but for the last token of each row, go through the model as it is
    configured now (in evaluation mode, which is put back). An encoder sees every token, so as a
    causal language model it would see its labels, and a loss near zero would mean nothing.

    Args:
        model: a causal language model of transformers, on any device.
        columns: the data's column names, to say which of them look like a classification.

    Raises:
        ValueError: if a position sees a later one, with what to do about it.
    """
    import torch

    device = next(model.parameters()).device
    words = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore[reportIndexIssue]
    training = model.training
    model.eval()
    logits = []
    try:
        for shift in (0, 1):
            ids = [*((7 * i + 3) % words for i in range(5)), (3 + shift * (words // 2)) % words]
            row = torch.tensor([ids, ids[::-1][1:] + ids[-1:]], device=device)
            with torch.no_grad():
                logits.append(model(input_ids=row, use_cache=False).logits[:, :-1].float())
    finally:
        model.train(training)
    difference = float((logits[0] - logits[1]).abs().max())
    # Products in int8 may round a batch's activations together.
    rounded = any(p.dtype is torch.int8 for p in model.parameters())
    if difference <= (0.02 if rounded else 1e-4) * float(logits[0].abs().max()):
        return
    telling = [name for name in columns if name.strip().casefold() in _CLASSES]
    raise ValueError(
        f"{type(model).__name__} is no causal language model: changing the last token changed the "
        f"logits before it by {difference:.2g}, so in training every label would be visible. "
        + (
            f"The column `{telling[0]}` looks like a classification: type "
            '`task="sequence-classification"`'
            if telling
            else "An encoder learns `task='sequence-classification'` and `token-classification`"
        )
        + ", or take a decoder (GPT, Llama, Qwen)."
    )


_CLASSES = frozenset({
    "label", "labels", "score", "target", "class", "category", "sentiment", "rating", "stars",
    "tags", "ner_tags",
})  # fmt: skip
