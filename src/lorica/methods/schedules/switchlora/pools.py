"""Pools of spare vectors: how they are drawn, and how their rows are copied to the layers and back.

Pools in host memory feed layers on a GPU: rows go through pinned buffers on a stream of their own,
fetched one step ahead, so that nothing waits for them. Everywhere else the same calls copy at once.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lorica.interfaces import InitLike, LayerLike
from lorica.methods.schedules.base import State, pair_of
from lorica.tensors.dtensor_ops import draw, reduce_scalar


@torch.no_grad()
def draw_pools(
    layer: LayerLike, init: InitLike, generator: torch.Generator, slots: int
) -> tuple[Tensor, Tensor]:
    """Pools (slots, in) for rows of A and (slots, out) for columns of B, in the pair's dtype on the
    CPU; the last r slots stay zero, for they belong to the vectors in use.

    The spare ones are drawn r at a time as the init draws its vectors. An init that reads the
    weight has one start only: its spare vectors are uniform, with the mean square of those in use.
    """
    pair, r = pair_of(layer), layer.site.r
    pools = {
        "A": torch.zeros(slots, layer.in_features, dtype=pair.A.dtype),
        "B": torch.zeros(slots, layer.out_features, dtype=pair.B.dtype),
    }
    spare = slots - r
    if init.reads_weight:
        for (side, pool), total in zip(pools.items(), reduce_scalar([pair.A, pair.B]), strict=True):
            bound = math.sqrt(3 * total / getattr(pair, side).numel())
            pool[:spare] = draw((spare, pool.shape[1]), generator, bound=bound).to(pool)
        return pools["A"], pools["B"]
    weight = torch.empty(layer.out_features, layer.in_features, device="meta")
    for first in range(0, spare, r):
        A, B = (
            pools["A"].new_empty(r, layer.in_features),
            pools["B"].new_empty(layer.out_features, r),
        )
        init.fill(weight, dataclasses.replace(pair, A=A, B=B), generator)
        last = min(first + r, spare)
        pools["A"][first:last] = A[: last - first]
        pools["B"][first:last] = B.T[: last - first]
    return pools["A"], pools["B"]


def index_on(device: torch.device, index: Sequence[int] | Tensor) -> Tensor:
    """The index there; without waiting for a GPU."""
    index = torch.as_tensor(index)
    if device.type != "cuda":
        return index.to(device)
    return index.pin_memory().to(device, non_blocking=True)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event at the present end of the stream."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


@dataclass
class AsyncRows:
    """Rows that are on their way to `rows.device`, or there already."""

    rows: Tensor
    sent: torch.cuda.Event | None = None  # the event that ends the copy, on a GPU

    def open(self) -> Tensor:
        if self.sent is not None:
            here = torch.cuda.current_stream(self.rows.device)
            here.wait_event(self.sent)
            self.rows.record_stream(here)
        return self.rows


class Exchange(NamedTuple):
    """Vectors of one side of a layer that are exchanged in a step."""

    layer: int  # its index in model order
    side: str
    at: list[int]  # positions
    slots: Tensor  # of the pool, whose rows come
    rows: AsyncRows


class Order(NamedTuple):
    """The exchanges of a step."""

    counts: Tensor  # of each layer (L,), on either side
    exchanges: list[Exchange]


_Of = weakref.WeakKeyDictionary[torch.optim.Optimizer, "PoolTransfer"]


class PoolTransfer:
    """Rows on their way between pools and layers. Not state: it is made anew after a load."""

    _all: ClassVar[_Of] = weakref.WeakKeyDictionary()

    def __init__(self, state: State) -> None:
        self.state = state
        self.ahead: tuple[int, Order] | None = None  # (step, what was ordered for it)
        self.back: list[tuple[Tensor, Tensor, AsyncRows]] = []  # pool, its slots, rows
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, state: State) -> PoolTransfer:
        """The one of this optimizer, as long as it has not loaded another state."""
        own = cls._all.get(optimizer)
        if own is None or own.state is not state:
            own = cls._all[optimizer] = cls(state)
        return own

    def take(self, step: int) -> Order | None:
        """What was ordered ahead for this step."""
        ahead, self.ahead = self.ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else None

    def fetch(self, pool: Tensor, slots: Tensor, device: torch.device) -> AsyncRows:
        """Copies of these rows of the pool, on their way to the device."""
        if pool.device == device or device.type != "cuda":
            return AsyncRows(pool.index_select(0, index_on(pool.device, slots)))
        host = torch.empty(len(slots), pool.shape[1], dtype=pool.dtype, pin_memory=True)
        torch.index_select(pool, 0, slots, out=host)
        stream = self._stream(device)
        with torch.cuda.stream(stream):
            rows = host.to(device, non_blocking=True)
        return AsyncRows(rows, _recorded(stream))

    def send_back(self, pool: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Copy these rows to the pool; they are there after `flush`."""
        if rows.device == pool.device or rows.device.type != "cuda":
            self.back.append((pool, slots, AsyncRows(rows.to(pool.device))))
            return
        rows, stream = rows.contiguous(), self._stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(rows, non_blocking=True)
        rows.record_stream(stream)
        self.back.append((pool, slots, AsyncRows(host, _recorded(stream))))

    @torch.no_grad()
    def flush(self) -> None:
        """Write into the pools what was sent back."""
        for pool, slots, sent in self.back:
            if sent.sent is not None:
                sent.sent.synchronize()
            pool.index_copy_(0, index_on(pool.device, slots), sent.rows)
        self.back.clear()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]
