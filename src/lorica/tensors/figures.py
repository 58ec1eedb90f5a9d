"""Norms of gradients, and figures that are read from a device without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorica.tensors import foreach
from lorica.tensors.dtensor_ops import shard_of
from lorica.tensors.linalg import floats


def _gradient(p: Tensor) -> Tensor | None:
    return p.grad


def local_norms(
    parameters: Sequence[Tensor],
    device: torch.device,
    of: Callable[[Tensor], Tensor | None] = _gradient,
) -> Tensor:
    """(n,): the 2-norm of each gradient, of a sharded one that of this process's part, and 0 where
    there is none; on `device`, in float32, or in float64 where a parameter is.

    Args:
        of: what of each parameter is measured. Default: its gradient.

    Call it without gradients being recorded.
    """
    wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in parameters]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    held: dict[int, Tensor] = {}
    for i, p in enumerate(parameters):
        value = of(p)
        if value is not None and (local := shard_of(value)[0]).numel():
            held[i] = local
            alike.setdefault((local.device, local.dtype), []).append(i)
    dtype = torch.float64 if torch.float64 in wide else torch.float32
    norms: dict[int, Tensor] = {}
    for (_, kind), where in alike.items():
        # A norm in half precision would overflow long before its elements do. float32 is left to
        # torch, whose loop without a named type is the fast one.
        some = [held[i] for i in where]
        named = None if kind in (torch.float32, torch.float64) else torch.float32
        norms.update(zip(where, foreach.norm(some, 2, dtype=named), strict=True))
    if not norms:
        return torch.zeros(len(parameters), dtype=dtype, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.stack(
        [
            norms[i].to(device, dtype, non_blocking=True) if i in norms else zero
            for i in range(len(parameters))
        ]
    )


def lags(device: torch.device) -> bool:
    """Whether reading a figure would wait for this device."""
    return device.type == "cuda"


def later(figures: Tensor) -> Callable[[], list[float]]:
    """Copies a vector (n,) aside now, and reads it when called: on a GPU without a wait, if the
    device is past it by then."""
    if not figures.is_cuda:
        values = floats(figures)
        return lambda: values
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return floats(host)

    return read
