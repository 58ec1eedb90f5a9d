"""The edits that change weights during training: merge an update and restart, swap vectors.

They are made of the verbs of `lorica.tensors.dtensor_ops`: schedules and rules never index, fill or
sum a parameter, gradient or state tensor themselves. Both edits keep the model's function and
repair the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.methods.inits.base import AbstractInit, fill_
from lorica.model.layer import AdaptedLinear
from lorica.tensors.dtensor_ops import outer_add_, read_full, reset_state, write_rows, zero_rows


@torch.no_grad()
def merge_(
    layer: AdaptedLinear, optimizer: torch.optim.Optimizer | None, *,
    link: int, init: AbstractInit | None, generator: torch.Generator, accumulate: str = "base",
) -> None:  # fmt: skip
    """Merge the layer's update and start a fresh one; the function is kept.

    The combine's parameters stay. `init` fills the fresh pair for the weight as it then stands; a
    start that is not zero is taken out again. The optimizer forgets the delta's parameters.

    Args:
        link: how many restarts this layer has had, this one included.
        accumulate: where the update goes: `base`, which then is no longer the published one, or
            `factors`, frozen beside it, whose rank grows by the delta's at each restart.

    Raises:
        ValueError: `factors` of a delta that has none, or of a model that is sharded already.
    """
    update, store = layer.update, layer.store
    into_base, delta = accumulate == "base", update.delta
    if into_base:
        update.fold_frozen_(store)
    update.accumulate_(store, accumulate)
    delta.restart(link, generator)
    pair = delta.pair()
    if pair is not None and init is not None:
        weight = _shape_of(layer)
        if init.reads_weight:
            weight = read_full(store.weight()).to(weight.dtype)
            weight = weight if into_base else weight + update.weight(store)
        fill_(pair, init, weight, generator)
        if into_base:
            right, scale = pair.right(), -pair.scale
            outer_add_(store.parameter, pair.B, right, scale, transposed=store.transposed)
        elif "zero_start" not in init.gives:
            update.add_frozen_(pair.right(), -pair.B)
    reset_state(
        optimizer, *(p for _, p, role in layer.trained() if role in ("A", "B", "diagonal", "core"))
    )


def _shape_of(layer: AdaptedLinear) -> Tensor:
    dtype = torch.promote_types(layer.store.dtype, torch.float32)
    return torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")


@torch.no_grad()
def swap_(
    layer: AdaptedLinear, optimizer: torch.optim.Optimizer | None, side: str, index: Sequence[int],
    rows: Tensor,
) -> None:  # fmt: skip
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
    assert pair is not None  # what every caller needs of a delta
    where = torch.tensor(list(index), device=pair.A.device)
    A, B = read_full(pair.A)[where], read_full(pair.B)[:, where]  # (k, in), (out, k)
    rows = rows.to(A)
    left, right = (B, A - rows) if side == "A" else (B - rows.T, A)
    right = right if (middle := pair.middle()) is None else middle[where] * right
    outer_add_(store.parameter, left, right, pair.scale, transposed=store.transposed)
    if side == "A":
        write_rows(pair.A, index, rows, axis=0)
    else:
        write_rows(pair.B, index, rows.T, axis=1)
    if optimizer is not None:
        counterpart, axis = (pair.B, 1) if side == "A" else (pair.A, 0)
        zero_rows(counterpart, index, axis, optimizer)
