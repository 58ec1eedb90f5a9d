"""What a forward keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of all that a forward keeps for backward, weights left out, each storage once.

    Args:
        forward: what it returns is held until all is counted.
        weights: tensors that are there without the forward.
    """
    own = {t.untyped_storage().data_ptr() for t in weights}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made = forward()
    total = sum(held.values())
    del made
    return total
