"""A square matrix on each block of the inputs, rotated by block: the rotations, and the delta.

u^(b) = M·R_b·x^(b);   R_b rotates the pair (q, q + r̂/2) by b·θ_q, θ_q = 10000^(−2q/r̂)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Site
from lorica.methods.deltas.mora.square import Square, cycled, last_block
from lorica.tensors.dtensor_ops import read_wide


def turning(width: int, blocks: int, like: Tensor) -> Tensor:
    """(2, blocks, width/2): cosines and sines of b·θ_q, θ_q = 10000^(−2q/width)."""
    at, wide = like.device, torch.float64
    theta = 10000 ** (torch.arange(0, width, 2, dtype=wide, device=at) / -width)
    angle = torch.arange(blocks, dtype=wide, device=at)[:, None] * theta
    return torch.stack([angle.cos(), angle.sin()]).to(like.dtype)


def turn_inputs(x: Tensor, turns: Tensor) -> Tensor:
    """(blocks, ..., width): R_b x of each block b; pairs are (q, q + width/2)."""
    cos, sin = turns[:, :, None]
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def turn(M: Tensor, turns: Tensor) -> Tensor:
    """(blocks, width, width): M R_b of each block b."""
    cos, sin = turns[:, :, None]
    one, two = M.chunk(2, -1)
    return torch.cat([one * cos + two * sin, two * cos - one * sin], -1)


class RotatedDelta(Square):
    """Type 6; the pattern is the block of inputs that comes first."""

    def __init__(self, site: Site, width: int) -> None:
        blocks = -(-site.in_features // width)
        super().__init__(site, width, tuple(range(blocks)))
        self.blocks = blocks
        self.used = min(blocks, -(-site.out_features // width))  # those that reach an output
        self._turns: Tensor | None = None

    def turns(self, like: Tensor) -> Tensor:
        """(2, blocks, r̂/2), kept between calls, because computing it takes longer than using it."""
        if torch.compiler.is_compiling():
            return turning(self.width, self.blocks, like)
        kept = self._turns
        if kept is None or kept.device != like.device or kept.dtype != like.dtype:
            with torch.inference_mode(False):
                kept = self._turns = turning(self.width, self.blocks, like)
        return kept

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        rows, first = x.reshape(-1, x.shape[-1]), self.number()
        over = max(first + self.used - self.blocks, 0)
        parts = self._products(rows, first, first + self.used - over)
        parts += self._products(rows, 0, over)
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # (used, tokens, r̂)
        y = cycled(y.transpose(0, 1).flatten(1), self.site.out_features)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _products(self, rows: Tensor, start: int, stop: int) -> list[Tensor]:
        """(blocks, tokens, r̂): the full blocks as a view, the last one alone."""
        full, width = rows.shape[1] // self.width, self.width
        edge = min(stop, full)
        out: list[Tensor] = []
        if start < edge:
            part = rows[:, start * width : edge * width]
            part = torch.unflatten(part, 1, (edge - start, width))
            out.append(self._turned(part.transpose(0, 1), start, edge))
        if edge < stop and stop == self.blocks:
            out.append(self._turned(last_block(rows, width)[None], stop - 1, stop))
        return out

    def _turned(self, x: Tensor, start: int, stop: int) -> Tensor:
        """M R_b x, rotating the smaller of x and M."""
        turns = self.turns(self.M)[:, start:stop]
        if x.shape[1] < self.width:
            return F.linear(turn_inputs(x, turns.to(x.dtype)), self.M.to(x.dtype))
        return torch.bmm(x, turn(self.M, turns).to(x.dtype).transpose(1, 2))

    def weight(self, base: BaseLike) -> Tensor:
        n, features, M = self.blocks, self.site.in_features, read_wide(self.M)
        first = self.number()
        blocks = turn(M, self.turns(M)).roll(-first, 0)[: self.used]  # (used, r̂, r̂)
        order = torch.eye(n, dtype=M.dtype, device=M.device).roll(-first, 0)[: self.used]
        rows = (blocks[:, :, None] * order[:, None, :, None]).flatten(2).flatten(0, 1)
        rows = F.pad(rows, (0, -n * self.width % features))
        rows = torch.unflatten(rows, 1, (-1, features)).sum(1)
        return cycled(rows.T, self.site.out_features).T
