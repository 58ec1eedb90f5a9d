"""MELoRA: n mini adapters side by side, each between its own share of the inputs and outputs.

    x = [x_1 .. x_n];  Δy = concat_i s·(x_i A_iᵀ) B_iᵀ,  A_i (r, in_i), B_i (out_i, r), s = α/r
    ΔW = s·blockdiag_i(B_i A_i);  rank ΔW ≤ n·r;  r·(in + out) parameters, as LoRA of rank r

The A_i stand side by side in A (r, in), the B_i on top of each other in B (out, r): no entry more
than they have. Each A_i starts as `kaiming_uniform(a=√5)` of its own width, uniform in ±1/√in_i;
B = 0. With n = 1 this is LoRA, bit for bit.

A and B are no pair, though they have the shapes of one: ΔW is the diagonal blocks of s·B·A, not
that product. A start that fits B·A to the weight, a rule that measures A over all inputs at once
(the metric is one of each mini), an exchange of a row of A for another: each would be wrong by the
blocks beside the diagonal.

Where n does not divide a side, the first minis are one feature wider; the authors' code drops the
last inputs there, or fails. It also cannot merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import Factors, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice
from lorica.tensors.dtensor_ops import copy_, draw, read_full, zero_


def _shares(features: int, n: int) -> list[int]:
    """`features` cut into n parts, as equal as whole numbers allow."""
    share, more = divmod(features, n)
    return [share + (i < more) for i in range(n)]


class MeloraDelta(AbstractDelta):
    roles: ClassVar[dict[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site, n: int) -> None:
        super().__init__()
        like = {"dtype": site.dtype, "device": site.device}
        self.A = nn.Parameter(torch.zeros(site.r, site.in_features, **like))
        self.B = nn.Parameter(torch.zeros(site.out_features, site.r, **like))
        self.scale = site.scale
        self.widths, self.heights = _shares(site.in_features, n), _shares(site.out_features, n)
        # Minis of one shape are one batch; at most three shapes follow each other.
        shapes = groupby(zip(self.widths, self.heights, strict=True))
        self.batches = [(len([*minis]), *shape) for shape, minis in shapes]

    def forward(self, x: Tensor, base) -> Tensor:
        rows, y, i, o = x.reshape(-1, x.shape[-1]), [], 0, 0
        A, B = self.A.to(x.dtype), (self.scale * self.B).to(x.dtype)
        for count, width, height in self.batches:
            j, p = i + count * width, o + count * height
            if count == 1:
                y.append(F.linear(F.linear(rows[:, i:j], A[:, i:j]), B[o:p]))
            else:
                part = rows[:, i:j].unflatten(1, (count, width)).transpose(0, 1)
                a = A[:, i:j].unflatten(1, (count, width)).permute(1, 2, 0)  # (count, width, r)
                b = B[o:p].unflatten(0, (count, height)).transpose(1, 2)  # (count, r, height)
                out = torch.bmm(torch.bmm(part, a), b)  # (count, tokens, height)
                y.append(out.transpose(0, 1).flatten(1))
            i, o = j, p
        flat = y[0] if len(y) == 1 else torch.cat(y, 1)
        return flat.view(*x.shape[:-1], flat.shape[-1])

    def weight(self, base) -> Tensor:
        A, B = read_full(self.A), read_full(self.B)
        whole = Factors(A, B, self.scale).weight()  # n times cheaper than over the zeros
        mine = self._owner(self.heights)[:, None] == self._owner(self.widths)
        return whole.masked_fill(~mine, 0)

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
    """A row of mini adapters: n times the rank of LoRA at LoRA's parameters, one block each.

    `r` is the rank of one mini and s = α/r its scale. More rank, but no input reaches an output of
    another block (in attention: other heads), so it wins where the wanted change has a flat
    spectrum, and loses where few directions matter or much has to be memorised. Written for PEFT it
    is a plain LoRA of rank n·r.

    Cost: LoRA's of rank r, for a rank of n·r.
    When: the wanted change has a flat spectrum.

    Args:
        n: minis. Default 2, the authors' GLUE script (r = 8); their Llama-2 runs: n = 8, r = 1.

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
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(
                f"`melora(n={self.n!r})`: how many minis, a whole number of at least 1, e.g."
                " `melora(n=2)`"
            )

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
