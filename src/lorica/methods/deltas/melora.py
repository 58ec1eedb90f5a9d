"""MELoRA: n mini adapters side by side, each between its own share of the inputs and outputs.

    x = [x_1 .. x_n];  Δy = concat_i s·(x_i A_iᵀ) B_iᵀ,  A_i (r, in_i), B_i (out_i, r), s = α/r
    ΔW = s·blockdiag_i(B_i A_i);  rank ΔW ≤ n·r;  r·(in + out) parameters, as LoRA of rank r

A (r, in) holds the A_i side by side, B (out, r) the B_i on top of each other, without an entry
more. Each A_i starts as `kaiming_uniform(a=√5)` of its own width, uniform in ±1/√in_i;
B = 0. With n = 1 this is LoRA, bit for bit.

A and B are no pair, though they have the shapes of one: ΔW is the diagonal blocks of s·B·A, not
that product. A start that fits B·A to the weight, a rule that measures A over all inputs at once
(each mini has its own metric), or a swap of rows of A would be wrong by the blocks off the
diagonal.

Where n does not divide a side, the first minis are one feature wider; the authors' code drops the
last inputs there, or fails. It also cannot merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice, zeros
from lorica.methods.fields import whole
from lorica.tensors.dtensor_ops import copy_, draw, read_full, zero_


def _shares(features: int, n: int) -> list[int]:
    """`features` cut into n parts, as equal as whole numbers allow."""
    share, more = divmod(features, n)
    return [share + (i < more) for i in range(n)]


class MeloraDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site, n: int) -> None:
        super().__init__()
        self.A = zeros(site, site.r, site.in_features)
        self.B = zeros(site, site.out_features, site.r)
        self.scale = site.scale
        self.widths, self.heights = _shares(site.in_features, n), _shares(site.out_features, n)
        # Consecutive minis of one shape are one batched product; there are at most three shapes.
        shapes = groupby(zip(self.widths, self.heights, strict=True))
        self.batches = [(len([*minis]), *shape) for shape, minis in shapes]

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        rows, i, o = x.reshape(-1, x.shape[-1]), 0, 0
        y: list[Tensor] = []
        A, B = self.A.to(x.dtype), (self.scale * self.B).to(x.dtype)
        for count, width, height in self.batches:
            j, p = i + count * width, o + count * height
            if count == 1:
                y.append(F.linear(F.linear(rows[:, i:j], A[:, i:j]), B[o:p]))
            else:
                part = torch.unflatten(rows[:, i:j], 1, (count, width)).transpose(0, 1)
                a = torch.unflatten(A[:, i:j], 1, (count, width)).permute(1, 2, 0)
                b = torch.unflatten(B[o:p], 0, (count, height)).transpose(1, 2)
                # (count, tokens, width), (count, width, r), (count, r, height)
                out = torch.bmm(torch.bmm(part, a), b)  # (count, tokens, height)
                y.append(out.transpose(0, 1).flatten(1))
            i, o = j, p
        flat = y[0] if len(y) == 1 else torch.cat(y, 1)
        return flat.view(*x.shape[:-1], flat.shape[-1])

    def weight(self, base: BaseLike) -> Tensor:
        A, B = read_full(self.A), read_full(self.B)
        every = Factors(A, B, self.scale).weight()  # n times cheaper than of `factors()`
        mine = self._owner(self.heights)[:, None] == self._owner(self.widths)
        return every.masked_fill(~mine, 0)

    def factors(self) -> Factors:
        """A (n·r, in) and B (out, n·r), block-diagonal: a LoRA of rank n·r with zeros in it."""
        minis = torch.arange(len(self.widths), device=self.A.device)[:, None]
        A = read_full(self.A) * (self._owner(self.widths) == minis)[:, None]  # (n, r, in)
        B = read_full(self.B) * (self._owner(self.heights) == minis)[:, :, None]  # (n, out, r)
        return Factors(A.flatten(0, 1), B.transpose(0, 1).flatten(1), self.scale)

    def restart(self, link: int, generator: torch.Generator) -> None:
        bound = torch.tensor([w**-0.5 for w in self.widths for _ in range(w)])
        copy_(self.A, (draw(self.A.shape, generator, bound=1.0) * bound).to(self.A.device))
        zero_(self.B)

    def _owner(self, shares: list[int]) -> Tensor:
        """Which mini each feature belongs to."""
        device = self.A.device
        return torch.cat([torch.full((k,), i, device=device) for i, k in enumerate(shares)])


@dataclass(frozen=True, kw_only=True)
class Melora(DeltaChoice):
    """Mini adapters side by side: n times LoRA's rank with LoRA's number of parameters.

    `r` is the rank of one mini and s = α/r its scale. The rank is higher, but no input reaches an
    output of another block (in attention: other heads), so it wins where the wanted change has a
    flat spectrum, and loses where few directions matter or much has to be memorised. For PEFT it is
    written as a plain LoRA of rank n·r.

    Cost: LoRA's of rank r, for a rank of n·r.
    When: the wanted change has a flat spectrum.

    Args:
        n: minis per layer. Default 2, the authors' GLUE script (r = 8); their Llama-2 runs: n = 8,
            r = 1.

    Raises:
        ValueError: a mini whose share of a layer is smaller than its rank.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> layer = lorica.attach(model, "melora(n=4)", r=2, verbose=False).layers["0"]
        >>> layer.update.factors().A.shape
        torch.Size([8, 8])

    Reference:
        @inproceedings{ren2024melora,
          title = {MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning},
          author = {Ren, Pengjie and Shi, Chengshun and Wu, Shiguang and Zhang, Mengqi and Ren,
                    Zhaochun and de Rijke, Maarten and Chen, Zhumin and Pei, Jiahuan},
          booktitle = {ACL}, year = {2024}, eprint = {2402.17263}
        }
    """

    n: int = 2

    gives: ClassVar[frozenset[str]] = frozenset(
        {"sides", "factors", "weight", "sharded", "wrapped"}
    )

    def __post_init__(self) -> None:
        whole(self, "n", say="minis per layer, a whole number of at least 1, e.g. `melora(n=2)`")

    def build(self, site: Site) -> MeloraDelta:
        least = min(site.in_features, site.out_features)
        if least // self.n < site.r:
            raise ValueError(
                f"`melora(n={self.n})` leaves a mini of {site.name!r} ({site.out_features} x"
                f" {site.in_features}) {least // self.n} features, below its rank `r={site.r}`;"
                f" there at most `melora(n={max(least // site.r, 1)})` fits. Give fewer minis, a"
                " smaller `r` (for this layer alone through `rank_pattern`), or leave the layer out"
                " with `exclude_modules`"
            )
        return MeloraDelta(site, self.n)
