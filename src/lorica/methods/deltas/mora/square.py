"""A square matrix between two maps without parameters: what such deltas share.

    ΔW = D·M·C,   C (r̂, in) compresses, D (out, r̂) decompresses, M (r̂, r̂) is all that trains

Which C and D a layer has at the moment is its *pattern*, a frozen parameter of one number: a
restart moves it, and it is saved beside M.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorica.interfaces import Site
from lorica.methods.deltas._blocks import tile
from lorica.methods.deltas.base import AbstractDelta
from lorica.tensors.dtensor_ops import copy_, read_full, zero_
from lorica.tensors.matmul import no_autocast


class Square(AbstractDelta):
    """M and the pattern. Restart `link` has the pattern `cycle[link % len(cycle)]`, so that a
    restart made twice is the same one."""

    roles: ClassVar[dict[str, str]] = {"M": "core"}

    def __init__(self, site: Site, width: int, cycle: tuple[int, ...]) -> None:
        super().__init__()
        at = site.device
        self.M = nn.Parameter(torch.zeros(width, width, dtype=site.dtype, device=at))
        self.pattern = nn.Parameter(torch.tensor(cycle[:1], device=at), requires_grad=False)
        self.site, self.width, self.cycle = site, width, cycle
        self._known = (self.pattern, _writes(self.pattern), cycle[0])

    def number(self) -> int:
        """The pattern as a number.

        Read off the device only after somebody wrote to it: a read makes a GPU wait, and in a
        forward it would do so for every layer. A copy that stands in for the parameter (a gathered
        shard) is read each time, for nothing tells when it is written to; a compiled forward takes
        what is known, and is compiled anew when that changes: at a restart, or by `loaded`.
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
    """How often `p` was written to, as autograd counts; None where nobody counts."""
    return None if p.is_inference() or isinstance(p, DTensor) else p._version


# -- compressions and decompressions ---------------------------------------------------------------


def cycled(t: Tensor, length: int) -> Tensor:
    """(..., n) -> (..., length): the entries over and over, t_{i mod n}."""
    return t[..., :length] if length <= t.shape[-1] else tile(t, length)


def strided_sum(x: Tensor, width: int) -> Tensor:
    """(..., in) -> (..., width): z_p = Σ x̃_j over j ≡ p (mod width), where x̃ is x and then, up to a
    multiple of `width`, x from its beginning."""
    full, left = divmod(x.shape[-1], width)
    with no_autocast(x.device.type):  # else the sum is of a wide copy
        z = x[..., : full * width].unflatten(-1, (full, width)).sum(-2)
        return z + last_block(x, width) if left else z


def last_block(x: Tensor, width: int) -> Tensor:
    """(..., width): what the full blocks leave of x, filled up from its beginning."""
    left = x[..., x.shape[-1] // width * width :]
    return torch.cat([left, cycled(x, width - left.shape[-1])], -1)


def grouped_sum(x: Tensor, width: int) -> Tensor:
    """(..., in) -> (..., width): sums of consecutive entries, groups as equal as can be, the longer
    ones first; a group beyond the last entry is 0."""
    size, longer = divmod(x.shape[-1], width)
    edge = longer * (size + 1)
    with no_autocast(x.device.type):
        first = x[..., :edge].unflatten(-1, (longer, size + 1)).sum(-1)
        rest = x[..., edge:].unflatten(-1, (width - longer, size)).sum(-1)
    return torch.cat([first, rest], -1)
