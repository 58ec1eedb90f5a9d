"""Frozen tensors that all layers of a model read, held beside the module tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class SharedTensors:
    """Frozen tensors of a whole model, by name.

    They are neither parameters nor buffers of any module: FSDP2 refuses a parameter that several of
    its units hold, and DDP sends buffers around at every forward. Every process has them whole.
    The layers hold this object, so a copy of the model has one copy of it, too.

    Example:
        >>> import torch
        >>> shared = SharedTensors({"A": torch.ones(2, 3)})
        >>> shared.read("A", like=torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._own = {name: t.detach() for name, t in tensors.items()}
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._own.items())

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor in the dtype and on the device of another; copied there once. Read only."""
        own = self._own[name]
        if own.device == like.device and own.dtype == like.dtype:
            return own
        key = (name, like.device, like.dtype)
        if key not in self._copies:
            with torch.inference_mode(False):  # a copy that an evaluation made serves training, too
                self._copies[key] = own.to(like.device, like.dtype)
        return self._copies[key]

    def write(self, name: str, value: Tensor) -> None:
        """Replace the values of a tensor, for every reader."""
        for t in (self._own[name], *(t for key, t in self._copies.items() if key[0] == name)):
            t.copy_(value)
