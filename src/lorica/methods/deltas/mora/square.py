"""What deltas share that train one square matrix between two maps without parameters.

    ΔW = D·M·C,   C (r̂, in) compresses, D (out, r̂) decompresses, M (r̂, r̂) is all that trains

The *pattern* says which C and D a layer has at present. It is a frozen parameter of one number: a
restart changes it, and it is saved beside M.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorica.interfaces import Site
from lorica.methods.deltas._blocks import tile
from lorica.methods.deltas.base import AbstractDelta, zeros
from lorica.tensors.dtensor_ops import copy_, read_full, zero_
from lorica.tensors.matmul import no_autocast


class Square(AbstractDelta):
    """M and the pattern. Restart `link` has the pattern `cycle[link % len(cycle)]`, so repeating a
    restart changes nothing."""

    roles: ClassVar[dict[str, str]] = {"M": "core"}

    def __init__(self, site: Site, width: int, cycle: tuple[int, ...]) -> None:
        super().__init__()
        self.M = zeros(site, width, width)
        pattern = torch.tensor(cycle[:1], device=site.device)
        self.pattern = nn.Parameter(pattern, requires_grad=False)
        self.site, self.width, self.cycle = site, width, cycle
        self._known: tuple[Tensor, int | None, int]  # pattern, its version, its number
        self._known = (self.pattern, _writes(self.pattern), cycle[0])

    def number(self) -> int:
        """The pattern as a number.

        Read from the device only after a write: each read waits for the GPU, and a forward would
        wait once per layer. A gathered copy of a sharded parameter is read each time, because its
        version doesn't tell when the shard was written to. A compiled forward uses the known number
        and is recompiled when that changes: at a restart, or by `loaded`.
        """
        own, writes, number = self._known
        if torch.compiler.is_compiling():
            return number
        now = _writes(self.pattern) if self.pattern is own else None
        if now is None or now != writes:
            number = int(read_full(self.pattern))
            self._known = (own, now, number)
        return number

    def restart(self, link: int, generator: torch.Generator) -> None:
        number = self.cycle[link % len(self.cycle)]
        copy_(self.pattern, torch.tensor([number], device=self.pattern.device))
        zero_(self.M)
        self._known = (self.pattern, _writes(self.pattern), number)

    def loaded(self) -> None:
        if not self.pattern.is_meta:
            number = int(read_full(self.pattern))
            self._known = (self.pattern, _writes(self.pattern), number)


def _writes(p: Tensor) -> int | None:
    """How often `p` was written to, by autograd's count; None where there is no count."""
    return None if p.is_inference() or isinstance(p, DTensor) else p._version


# -- compressions and decompressions ---------------------------------------------------------------


def cycled(t: Tensor, length: int) -> Tensor:
    """(..., n) -> (..., length): the entries repeated, t_{i mod n}."""
    return t[..., :length] if length <= t.shape[-1] else tile(t, length)


def strided_sum(x: Tensor, width: int) -> Tensor:
    """(..., in) -> (..., width): z_p = Σ x̃_j over j ≡ p (mod width), where x̃ is x and then, up to a
    multiple of `width`, x from its beginning."""
    full, left = divmod(x.shape[-1], width)
    with no_autocast(x.device.type):  # which would make a float32 copy to sum
        z = torch.unflatten(x[..., : full * width], -1, (full, width)).sum(-2)
        return z + last_block(x, width) if left else z


def last_block(x: Tensor, width: int) -> Tensor:
    """(..., width): what the full blocks leave of x, filled up from its beginning."""
    left = x[..., x.shape[-1] // width * width :]
    return torch.cat([left, cycled(x, width - left.shape[-1])], -1)


def grouped_sum(x: Tensor, width: int) -> Tensor:
    """(..., in) -> (..., width): sums of consecutive entries, in groups as equal as possible, the
    longer ones first; a group beyond the last entry is 0."""
    size, longer = divmod(x.shape[-1], width)
    edge = longer * (size + 1)
    with no_autocast(x.device.type):
        first = torch.unflatten(x[..., :edge], -1, (longer, size + 1)).sum(-1)
        rest = torch.unflatten(x[..., edge:], -1, (width - longer, size)).sum(-1)
    return torch.cat([first, rest], -1)
