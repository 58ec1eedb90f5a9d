"""The ring of positions: which take their turn, which slots of the pools come, and what is frozen.

Position i of a layer's A holds slot `slots[0, i]` of its pool, of B `slots[1, i]`. A's turn is at
position p_A = S mod r, S the exchanges so far, B's at p_B = (S + ⌊r/2⌋) mod r. The counterparts of
the last `freeze` steps' exchanges are frozen: they lie right behind the other side's pointer.

State, on the CPU, for L layers: `swaps` (L,), S; `recent` (L, freeze), exchanges of the last steps,
that of step t at t mod freeze; `slots` (2, L, largest r), −1 beyond a layer's rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.interfaces import LayerLike
from lorica.methods.schedules.base import State
from lorica.tensors.linalg import ints

SIDES = "AB"
STATE = ("swaps", "recent", "slots")


def pool_size(method: str, layer: LayerLike) -> int:
    """Vectors of either kind that a layer has, in use and spare.

    Raises:
        ValueError: a rank at which nothing can be exchanged.
    """
    size = capacity(layer)
    if not 1 < layer.site.r < size:
        raise ValueError(
            f"`{method}` on {layer.site.name!r} ({layer.out_features} x {layer.in_features}) at"
            f" r={layer.site.r}: at ranks from 2 to {size - 1} there are spare vectors, and A and B"
            f" can take turns; type a smaller `r`, `rank_pattern={{{layer.site.name!r}: ...}}`, or"
            " leave this layer out with `exclude_modules`"
        )
    return size


def capacity(layer: LayerLike) -> int:
    return min(layer.in_features, layer.out_features)


def start(layers: Sequence[LayerLike], freeze: int) -> dict[str, Tensor]:
    """The last r slots of each pool are in use; B's ring is turned by half a lap."""
    ranks = [layer.site.r for layer in layers]
    slots = torch.full((2, len(layers), max(ranks)), -1)
    for i, (r, layer) in enumerate(zip(ranks, layers, strict=True)):
        place = torch.arange(r)
        slots[0, i, :r] = capacity(layer) - r + place
        slots[1, i, :r] = capacity(layer) - r + (place - r // 2) % r
    return {
        "swaps": torch.zeros(len(layers), dtype=torch.int64),
        "recent": torch.zeros(len(layers), freeze, dtype=torch.int64),
        "slots": slots,
    }


def counts(
    state: State, layers: Sequence[LayerLike], frequency: float, step: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """How many vectors each layer exchanges, (L,), the same for A and B."""
    r = torch.tensor([layer.site.r for layer in layers])
    spare = torch.tensor([capacity(layer) for layer in layers]) - r
    uniform = torch.rand(len(layers), generator=generator, dtype=torch.float64)
    k = (r * frequency + uniform).floor().long()
    recent = state["recent"]
    frozen = recent.sum(1)
    if freeze := recent.shape[1]:
        frozen -= recent[:, step % freeze]  # free again
    # From either pointer on to what is frozen behind the other; both point to S + a constant.
    half = r // 2
    ways = torch.stack([(-half - frozen) % r, (half - frozen) % r, spare])
    return torch.minimum(k, ways.amin(0))


def turn(
    state: State, layer: LayerLike, i: int, side: str, count: int,
    random: torch.Generator | None,
) -> tuple[list[int], Tensor]:  # fmt: skip
    """Positions whose turn it is, and the slots that come: the next in the ring, or drawn among
    those that no position holds."""
    r, size = layer.site.r, capacity(layer)
    first = int(state["swaps"][i]) + (r // 2 if side == "B" else 0)
    at = [(first + j) % r for j in range(count)]
    held = state["slots"][SIDES.index(side), i, :r]
    if random is None:
        return at, (held[(first - 1) % r] + 1 + torch.arange(count)) % size
    free = torch.ones(size, dtype=torch.bool)
    free[held] = False
    order = torch.randperm(size - r, generator=random)[:count]
    return at, free.nonzero().flatten()[order]


def occupy(state: State, i: int, side: str, at: list[int], slots: Tensor) -> Tensor:
    """Let these positions hold these slots; returns the slots they leave."""
    held = state["slots"][SIDES.index(side), i]
    where = torch.tensor(at)
    left = held[where]
    held[where] = slots
    return left


def advance(state: State, k: Tensor, step: int) -> list[int]:
    """Count the exchanges of this step; returns the layers with anything frozen."""
    state["swaps"] += k
    if freeze := state["recent"].shape[1]:
        state["recent"][:, step % freeze] = k
    return ints(state["recent"].sum(1).nonzero().flatten())


def frozen(state: State, layer: LayerLike, i: int) -> dict[str, list[int]]:
    """Frozen rows of A and columns of B: behind B's pointer, and behind A's."""
    r, last, count = layer.site.r, int(state["swaps"][i]), int(state["recent"][i].sum())
    ends = {"A": last + r // 2, "B": last}
    return {side: [(end - j) % r for j in range(count, 0, -1)] for side, end in ends.items()}
