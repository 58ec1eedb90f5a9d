"""Verbs on tensors, plain or sharded (DTensor) alike.

They read with `full_tensor()`, draw full-size from a CPU generator, and write into the local shard
at its offset. Written the naive way, `A[i].zero_()`, `A[i] = row` and `normal_(generator=g)` are
silently lost or different on shards.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lorica.tensors.linalg import floats
from lorica.tensors.matmul import no_autocast

P = ParamSpec("P")
T = TypeVar("T")


def on_cpu(call: Callable[P, T]) -> Callable[P, T]:
    """What this makes without naming a device lies on the CPU, whatever the default device."""

    @functools.wraps(call)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device("cpu"):
            return call(*args, **kwargs)

    return there


def shard_of(t: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(the local plain tensor, its offset in the whole); a plain tensor is its own shard at 0."""
    if not isinstance(t, DTensor):
        return t, (0,) * t.ndim
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return t.to_local(), tuple(offset)


def read_full(t: Tensor) -> Tensor:
    """The whole tensor on every process; a collective where `t` is sharded. Never write into the
    result."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def read_wide(t: Tensor) -> Tensor:
    """The whole tensor, as `read_full`, in at least float32."""
    return read_full(t).to(torch.promote_types(t.dtype, torch.float32))


def reshard(model: nn.Module) -> None:
    """After a forward without backward FSDP2's root keeps plain copies of its parameters: what is
    written to those is lost, and an optimizer that holds them moves nothing. No-op elsewhere."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _window(local: Tensor, offset: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))


@torch.no_grad()
def copy_(t: Tensor, full: Tensor) -> None:
    """t ← full, a plain tensor of the whole shape."""
    local, offset = shard_of(t)
    local.copy_(read_full(full)[_window(local, offset)])


@torch.no_grad()
def zero_(t: Tensor) -> None:
    shard_of(t)[0].zero_()


@torch.no_grad()
def scale_(t: Tensor, factor: float) -> None:
    """t ← factor·t."""
    shard_of(t)[0].mul_(factor)


@torch.no_grad()
def write_rows(t: Tensor, index: Sequence[int], rows: Tensor, axis: int = 0) -> None:
    """t[index] ← rows along `axis`; `rows` is plain and full-size, its `axis` as long as
    `index`."""
    if not isinstance(t, DTensor):
        where = torch.tensor(list(index), dtype=torch.long, device=t.device)
        t.index_copy_(axis, where, rows.to(t))
        return
    local, offset = shard_of(t)
    start, count = offset[axis], local.shape[axis]
    here = [(k, i - start) for k, i in enumerate(index) if 0 <= i - start < count]
    if not here:
        return
    window = list(_window(local, offset))
    window[axis] = slice(None)
    part = rows.to(local)[tuple(window)].index_select(
        axis, torch.tensor([k for k, _ in here], device=local.device)
    )
    local.index_copy_(axis, torch.tensor([i for _, i in here], device=local.device), part)


@torch.no_grad()
def zero_rows(
    t: Tensor, index: Sequence[int], axis: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Zero rows of `t`, or, where `optimizer` is given, the same rows of every state tensor of t's
    shape and of step counts kept per row; `t` itself then stays.
    """
    for target in [t] if optimizer is None else row_states(optimizer, t, axis):
        shape = list(target.shape)
        shape[axis] = len(index)
        write_rows(
            target, index, torch.zeros(shape, dtype=target.dtype, device=target.device), axis
        )


def row_states(optimizer: torch.optim.Optimizer, p: Tensor, axis: int) -> list[Tensor]:
    """State tensors of `p` that have an entry for each row along `axis`.

    Raises:
        ValueError: the state is opaque (quantised blocks), so rows of it cannot be named.
    """
    per_row = [1] * p.ndim
    per_row[axis] = p.shape[axis]
    out: list[Tensor] = []
    for name, value in optimizer.state.get(p, {}).items():
        if not isinstance(value, Tensor) or (value.numel() <= 1 and value.ndim != p.ndim):
            continue  # one number for all rows, not one row
        if value.shape != p.shape and list(value.shape) != per_row:
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} keeps {name!r} of shape"
                f" {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}: rows cannot be"
                " reset in it. Use an optimizer with plain state, e.g. `optim=adamw_torch`"
            )
        out.append(value)
    return out


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer | None, *parameters: Tensor) -> None:
    """A fresh start of the optimizer for these parameters: moments and step count zero.

    In place: a checkpoint's structure must not change, and a state that is absent stays absent.
    """
    if optimizer is None:
        return
    for p in parameters:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor):
                zero_(value)


def forget_state(optimizer: torch.optim.Optimizer, *parameters: Tensor) -> None:
    """Drop the optimizer's state of these parameters, and free its memory."""
    for p in parameters:
        optimizer.state.pop(p, None)


@torch.no_grad()
def add_(t: Tensor, full: Tensor) -> None:
    """t ← t + full, a plain tensor of the whole shape; rounded once."""
    local, offset = shard_of(t)
    wide = torch.promote_types(torch.promote_types(local.dtype, full.dtype), torch.float32)
    local.copy_(local.to(wide) + read_full(full)[_window(local, offset)].to(wide))


@torch.no_grad()
def outer_add_(
    w: Tensor, B: Tensor, A: Tensor, alpha: float = 1.0, *, transposed: bool = False
) -> None:
    """w ← w + alpha·B@A, rounded once; `transposed`: w is stored as (in, out). W itself is never
    gathered.

    Args:
        w: (out, in); plain or sharded.
        B: (out, k), A: (k, in); plain or sharded, gathered if sharded.
    """
    left, right = read_full(B), read_full(A)
    if transposed:
        left, right = right.T, left.T
    local, offset = shard_of(w)
    rows, columns = _window(local, offset)
    wide = torch.promote_types(torch.promote_types(local.dtype, left.dtype), torch.float32)
    with no_autocast(local.device.type):
        total = torch.addmm(
            local.to(wide), left[rows].to(wide), right[:, columns].to(wide), alpha=alpha
        )
    local.copy_(total)


def all_reduce_(
    t: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
) -> None:
    """t ← its sum (or `op`) over the processes of `group`; torch's, which is untyped."""
    dist.all_reduce(t, op=op, group=group)  # pyright: ignore[reportUnknownMemberType]


def reduce_scalar(values: Sequence[Tensor]) -> list[float]:
    """Sum of squares of each tensor over its whole, the same floats on every process."""
    if not values:
        return []
    sums = [shard_of(v)[0].detach().float().square().sum() for v in values]
    total = torch.stack([s.to(sums[0].device) for s in sums])  # a model may lie on several devices
    sum_over_shards_(total, values)
    return floats(total)


def sum_over_shards_(parts: Tensor, of: Sequence[Tensor | None]) -> None:
    """parts[i] ← its sum over the processes that hold the shards of `of[i]`; what belongs to a
    plain tensor, or to None, stays. A collective where something is sharded."""
    layouts: dict[tuple[DeviceMesh, tuple[Placement, ...]], list[int]] = {}
    for i, v in enumerate(of):
        if isinstance(v, DTensor):
            layouts.setdefault((v.device_mesh, tuple(v.placements)), []).append(i)
    for (mesh, placements), where in layouts.items():
        local = shard_of(of[where[0]])[0]  # pyright: ignore[reportArgumentType]
        summed = parts[where].to(local.device)
        # Replicas of a shard (HSDP) hold the same part: only over the sharded axes is summed.
        for dim, placement in enumerate(placements):
            if not isinstance(placement, Replicate):
                all_reduce_(summed, group=mesh.get_group(dim))
        parts[where] = summed.to(parts.device)


def sum_over_processes(values: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each plain tensor over all processes, equal on every one; of one process: as it
    is. A collective: every process brings the same shapes."""
    if not values or not dist.is_initialized() or dist.get_world_size() == 1:
        return [*values]
    total = torch.cat([v.to(values[0].device).reshape(-1) for v in values])
    all_reduce_(total)
    parts: list[Tensor] = [*torch.split(total, [v.numel() for v in values])]
    return [part.view(v.shape).to(v.device) for part, v in zip(parts, values, strict=True)]


def gather_processes(value: Tensor) -> Tensor:
    """A plain tensor of every process, stacked: (processes, ...), equal on every one. A collective:
    every process brings the same shape."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value[None]
    parts = value.new_zeros(dist.get_world_size(), *value.shape)
    parts[dist.get_rank()] = value
    return sum_over_processes([parts])[0]


def draw(shape: Sequence[int], generator: torch.Generator, *, bound: float | None = None) -> Tensor:
    """Full-size float32 draw on the CPU, whatever the default device: N(0, 1), or uniform in
    ±bound; the same on every process."""
    size, wide = tuple(shape), torch.float32
    if bound is None:
        return torch.randn(size, generator=generator, dtype=wide, device="cpu")
    drawn = torch.rand(size, generator=generator, dtype=wide, device="cpu")
    return (2 * drawn - 1) * bound


@torch.no_grad()
def draw_(t: Tensor, generator: torch.Generator, *, bound: float | None = None) -> None:
    """t ← a draw; see `draw`."""
    copy_(t, draw(t.shape, generator, bound=bound).to(t.device))


def seeded(key: str) -> torch.Generator:
    """A CPU generator that depends on `key` alone, not on the order of layers or the number of
    processes."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
