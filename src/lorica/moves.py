"""Moves: the only code that edits weights or optimizer state during training.

They are made of the verbs of `lorica.shards`, handed on here: schedules and rules never index, fill
or sum a parameter, gradient or state tensor themselves. `merge_` and `swap_` keep the model's
function; both repair the optimizer's state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.shards import (  # noqa: F401
    copy_,
    draw,
    draw_,
    outer_add_,
    read_full,
    reduce_scalar,
    reset_state,
    reshard,
    row_states,
    seeded,
    shard_of,
    write_rows,
    zero_,
    zero_rows,
)


@torch.no_grad()
def merge_(
    layer, optimizer: torch.optim.Optimizer | None, *, link: int, init, generator: torch.Generator
) -> None:
    """Put the layer's update into its base and start a fresh one; the function is kept.

    The combine's parameters stay. `init` fills the fresh pair for the weight as it then stands; a
    start that is not zero is taken out of the base again. The optimizer forgets the delta's
    parameters.

    Args:
        layer: an `AdaptedLinear` whose delta has factors and whose base is writable.
        link: how many restarts this layer has had, this one included.
    """
    update, store = layer.update, layer.store
    factors = update.delta.factors()
    if factors is None:
        raise ValueError(
            f"{layer.site.name!r}: only a delta with factors can be merged step by step"
        )
    outer_add_(store.parameter, factors.B, factors.A, factors.scale, transposed=store.transposed)
    if update.carried is not None:
        carried = update.carried
        outer_add_(
            store.parameter, carried.B, carried.A, carried.scale, transposed=store.transposed
        )
        zero_(carried.A)
        zero_(carried.B)
    update.delta.restart(link, generator)
    pair = update.delta.pair()
    if pair is not None and init is not None:
        weight = read_full(store.parameter) if init.reads_weight else _shape_of(store.parameter)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        fill_(pair, init, weight.T if store.transposed else weight, generator)
        outer_add_(store.parameter, pair.B, pair.A, -pair.scale, transposed=store.transposed)
    reset_state(
        optimizer, *(p for _, p, role in layer.trained() if role in ("A", "B", "diagonal", "core"))
    )


def _shape_of(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


@torch.no_grad()
def fill_(pair, init, weight: Tensor, generator: torch.Generator) -> None:
    """Apply an init to a pair, plain or sharded: filled full-size, then cut."""
    full = dataclasses.replace(pair, A=_like(pair.A), B=_like(pair.B))
    init.fill(weight, full, generator)
    copy_(pair.A, full.A)
    copy_(pair.B, full.B)


def _like(t: Tensor) -> Tensor:
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device)


@torch.no_grad()
def swap_(
    layer, optimizer: torch.optim.Optimizer | None, side: str, index: Sequence[int], rows: Tensor
) -> None:
    """Exchange vectors of a pair for `rows` and correct the base, so that the function is kept.

    The counterparts' optimizer state is zeroed (their gradient depends on what was exchanged); the
    exchanged positions keep theirs.

    Args:
        side: "A" (rows of A) or "B" (columns of B).
        index: positions in 0..r-1, distinct.
        rows: the incoming vectors, (len(index), in) for A, (len(index), out) for B; plain,
        full-size.
    """
    pair, store = layer.update.delta.pair(), layer.store
    where = torch.tensor(list(index), device=pair.A.device)
    A, B = read_full(pair.A)[where], read_full(pair.B)[:, where]  # (k, in), (out, k)
    rows = rows.to(A)
    left, right = (B, A - rows) if side == "A" else (B - rows.T, A)
    outer_add_(store.parameter, left, right, pair.scale, transposed=store.transposed)
    if side == "A":
        write_rows(pair.A, index, rows, axis=0)
    else:
        write_rows(pair.B, index, rows.T, axis=1)
    if optimizer is not None:
        counterpart, axis = (pair.B, 1) if side == "A" else (pair.A, 0)
        zero_rows(counterpart, index, axis, optimizer)
