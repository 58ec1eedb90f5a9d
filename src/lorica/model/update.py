"""Update: the trained delta and the frozen factors beside it.

The frozen factors are a stack under the layer's own scale. A start ΔW₀ that is not zero enters with
a minus, a finished link of a restarting schedule with a plus, so an init never changes the base.
Combines, norms, kernels and export take the update as a whole, of rank r + k.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, DeltaLike, Factors, Site
from lorica.methods.deltas.base import AbstractDelta
from lorica.tensors import dropout
from lorica.tensors.dtensor_ops import add_, outer_add_, zero_
from lorica.tensors.linalg import vector_norm
from lorica.tensors.matmul import added, no_autocast
from lorica.tensors.modules import call_before_loading

ROWS = (2**19, 2**25)  # elements of a sum that is formed for its norms alone: on a CPU, elsewhere


class Products(abc.ABC):
    """The product of an update, split by what dropout falls on."""

    delta: DeltaLike
    lookup: bool
    dropout: float
    drop_frozen: bool
    padding: int | None

    @property
    @abc.abstractmethod
    def dropping(self) -> bool:
        """Whether this call drops inputs, so that the update is no one matrix."""

    @property
    @abc.abstractmethod
    def frozen_factors(self) -> Factors | None:
        """What is beside the delta, or None."""

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.delta.parameters()).dtype

    def factors(self) -> Factors | None:
        """Low-rank view of the whole update, rank r + k, or None where the delta has none."""
        own, frozen = self._own_factors(), self.frozen_factors
        if own is None or frozen is None:
            return own
        if own.scale != frozen.scale:
            own = Factors(own.A, own.B * (own.scale / frozen.scale), frozen.scale)
        A, B = torch.cat([own.A, frozen.A], dim=-2), torch.cat([own.B, frozen.B], dim=-1)
        return Factors(A, B, own.scale)

    def _own_factors(self) -> Factors | None:
        """The delta's, without the padding's column."""
        factors = self.delta.factors()
        if factors is None or self.padding is None:
            return factors
        return Factors(self._unpadded(factors.A), factors.B, factors.scale)

    def _unpadded(self, A: Tensor) -> Tensor:
        """A (k, in) with zeros in the padding's column."""
        ids = torch.arange(A.shape[1], device=A.device)
        return A * (ids != self.padding).to(A.dtype)

    def drop(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input after dropout; for token ids a mask (..., 1) instead, since a dropped one-hot
        is a zero, and so is the padding's."""
        if not self.lookup:
            return (dropout.drop(x, self.dropout) if self.dropping else x), None
        mask = self._live(x)
        if self.dropping:
            ones = torch.ones((*x.shape, 1), device=x.device, dtype=self._dtype)
            dropped = F.dropout(ones, self.dropout)
            mask = dropped if mask is None else mask * dropped
        return x, mask

    def _live(self, x: Tensor) -> Tensor | None:
        """1 for each token id, 0 for the padding's (..., 1); None: there is no such id."""
        return None if self.padding is None else (x != self.padding).unsqueeze(-1).to(self._dtype)

    def dropped_part(self, x: Tensor, base: BaseLike, keep: Tensor | None = None) -> Tensor:
        """The part that dropout falls on, of an input already dropped."""
        factors = self.factors() if self.drop_frozen else self.delta.factors()
        if factors is not None and self.delta.pair() is not None:
            return self._product(x, factors, keep)
        y = self.delta(x, base)  # a delta whose factors are a mere view knows a cheaper order
        y = y if keep is None else y * keep
        frozen = self.frozen_factors if self.drop_frozen else None
        return y if frozen is None else y + self._product(x, frozen, keep)

    def undropped_part(self, x: Tensor) -> Tensor | None:
        """The part that dropout leaves alone, or None where that is nothing."""
        frozen = None if self.drop_frozen else self.frozen_factors
        return None if frozen is None else self._product(x, frozen)

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        """x ΔWᵀ: (..., in) -> (..., out), in x's dtype (token ids: in the base's)."""
        dropped, keep = self.drop(x)
        y = self.dropped_part(dropped, base, keep)
        if (still := self.undropped_part(x)) is not None:
            y = y + still
        return y.to(base.dtype) if self.lookup else y

    def _product(self, x: Tensor, factors: Factors, keep: Tensor | None = None) -> Tensor:
        if self.lookup:
            h = F.embedding(x, factors.A.T)  # (..., k)
            return F.linear(h if keep is None else h * keep, factors.B * factors.scale)
        # The small factors go to x's dtype, never x to theirs: no wide copy of an activation.
        B = factors.B if factors.scale == 1 else factors.B * factors.scale
        return F.linear(F.linear(x, factors.A.to(x.dtype)), B.to(x.dtype))


class Update(Products, nn.Module):
    """Delta and frozen factors of one layer, with the dropout that falls on it: what combines,
    kernels and export take."""

    delta: AbstractDelta
    frozen_A: nn.Parameter | None  # (k, in), frozen
    frozen_B: nn.Parameter | None  # (out, k), frozen; sign folded in, scale that of the delta

    def __init__(
        self, delta: AbstractDelta, site: Site, *, dropout: float, drop_frozen: bool,
        padding: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.padding = padding  # a token id whose update is zero and stays so
        self.delta = delta  # pyright: ignore[reportIncompatibleVariableOverride]
        self.lookup = site.lookup
        self.dropout = dropout
        self.drop_frozen = drop_frozen
        # Parameters, not buffers: DDP would broadcast buffers at every forward, FSDP2 fails to load
        # them.
        self.register_parameter("frozen_A", None)
        self.register_parameter("frozen_B", None)
        call_before_loading(self, _fit)

    @torch.no_grad()
    def add_frozen_(self, A: Tensor, B: Tensor) -> None:
        """Stack A (k, in), B (out, k) onto what is frozen.

        Raises:
            ValueError: the model is sharded, and its parameters cannot grow.
        """
        if isinstance(A, DTensor):
            raise ValueError(
                "finished updates cannot be kept as frozen factors in a model that is sharded,"
                " since its parameters cannot grow; put them into the base instead, with"
                " `accumulate='base'`"
            )
        device, dtype = A.device, self._dtype
        right, left = A.to(device, dtype), B.to(device, dtype)
        right = right if self.padding is None else self._unpadded(right)
        if self.frozen_A is not None and self.frozen_B is not None:
            right = torch.cat([self.frozen_A, right], dim=-2)
            left = torch.cat([self.frozen_B, left], dim=-1)
        self.frozen_A = nn.Parameter(right.clone(), requires_grad=False)
        self.frozen_B = nn.Parameter(left.clone(), requires_grad=False)

    @torch.no_grad()
    def fit_frozen_(self, A: Tensor | None, B: Tensor | None) -> None:
        """Make room for what was frozen elsewhere, A (k, in) and B (out, k), before it is written;
        None: nothing was. It grows and shrinks with training."""
        rank = -1 if A is None or B is None else A.shape[-2]
        if rank == (-1 if self.frozen_A is None else self.frozen_A.shape[-2]):
            return
        self.clear_frozen_()
        if A is not None and B is not None:
            device = next(self.delta.parameters()).device
            self.add_frozen_(torch.zeros_like(A, device=device), torch.zeros_like(B, device=device))

    @torch.no_grad()
    def fold_frozen_(self, base: BaseLike) -> None:
        """Add the frozen factors to the base; they are zero from then on."""
        if (frozen := self.frozen_factors) is None:
            return
        if not base.parameter.is_meta:
            outer_add_(base.parameter, frozen.B, frozen.A, frozen.scale, transposed=base.transposed)
        zero_(frozen.A)
        zero_(frozen.B)

    @torch.no_grad()
    def accumulate_(self, base: BaseLike, accumulate: str, share: float = 1.0) -> None:
        """Add `share` of what the delta has learnt to the base or to what is frozen.

        Args:
            accumulate: `base` or `factors`.

        Raises:
            ValueError: `factors` of a delta that has none, or of a model that is sharded already.
        """
        factors = self._own_factors()
        if accumulate == "factors":
            if factors is None:
                raise ValueError(
                    "an update without factors cannot be kept as frozen factors; put finished"
                    " updates into the base instead, with `accumulate='base'`"
                )
            self.add_frozen_(factors.A, factors.B * (share * factors.scale / self.delta.scale))
        elif factors is not None:
            outer_add_(
                base.parameter, factors.B, factors.A, share * factors.scale,
                transposed=base.transposed,
            )  # fmt: skip
        else:
            weight = self._own_weight(base)
            assert weight is not None  # `weight` is what every caller needs of a delta
            add_(base.parameter, share * (weight.T if base.transposed else weight))

    def clear_frozen_(self) -> None:
        """Drop the frozen factors; before sharding."""
        self.frozen_A = self.frozen_B = None

    @property
    def frozen_factors(self) -> Factors | None:
        if self.frozen_A is None or self.frozen_B is None:
            return None
        return Factors(self.frozen_A, self.frozen_B, self.delta.scale)

    @property
    def dropping(self) -> bool:
        """Whether this call drops inputs, so that the update is no one matrix."""
        return self.training and self.dropout > 0

    def _own_weight(self, base: BaseLike) -> Tensor | None:
        weight = self.delta.weight(base)
        return weight if weight is None or self.padding is None else self._unpadded(weight)

    def weight(self, base: BaseLike) -> Tensor:
        """ΔW (out, in) of the whole update, in at least float32."""
        if (factors := self.factors()) is not None:
            return factors.weight()
        with no_autocast(base.device.type):
            own, frozen = self._own_weight(base), self.frozen_factors
        assert own is not None, "the combine needs a weight and the recipe's check let this pass"
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        return own if frozen is None else own + frozen.weight()

    @torch.no_grad()
    def formed_norms(self, base: BaseLike, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Row norms of V = W + ΔW (out,), and V (out, in) itself, new, where it is to be kept; of a
        stack of experts the norms (E, out) alone.

        In at least float32, without gradients. A V that nobody keeps is formed some rows at a time.
        """
        with no_autocast(base.device.type):
            w = base.weight()
            if (factors := self.factors()) is None:
                delta = self.weight(base)
                v = w.to(delta.dtype) + delta
                return vector_norm(v, dim=-1), v if keep else None
            wide = torch.promote_types(factors.A.dtype, torch.float32)
            A, B = factors.A.to(wide), factors.B.to(wide)
            if w.ndim == 3:  # one expert at a time
                norms = [
                    vector_norm(added(one.to(wide), b, a, factors.scale), dim=1)
                    for one, a, b in zip(w, A, B, strict=True)
                ]
                return torch.stack(norms), None

            def form(w: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
                v = added(w.to(wide), B, A, factors.scale)
                return vector_norm(v, dim=1), v

            rows = max(1, ROWS[w.device.type != "cpu"] // w.shape[1])
            if keep or rows >= w.shape[0] or torch.compiler.is_compiling():
                norms, v = form(w, B)
                return norms, v if keep else None
            parts = zip(torch.split(w, rows), torch.split(B, rows), strict=True)
            return torch.cat([form(*part)[0] for part in parts]), None

    def row_norms(self, base: BaseLike) -> Tensor:
        """Row norms of W + ΔW (out,), in at least float32, without forming ΔW where factors exist:

        c² = rowsum(W²) + 2 rowsum((W Aᵀ) ∘ B) + rowsum((B A Aᵀ) ∘ B), the scale folded into B.
        What autograd keeps of this is small.
        """
        with no_autocast(base.device.type):
            if (factors := self.factors()) is None:
                delta = self.weight(base)
                return vector_norm(base.weight().to(delta.dtype) + delta, dim=-1)
            wide = torch.promote_types(factors.A.dtype, torch.float32)
            w, A = base.weight().to(wide), factors.A.to(wide)
            B = factors.B.to(wide) * factors.scale
            cross = w @ A.mT  # (out, k)
            own = vector_norm(w, dim=-1).square()  # without a copy of W
            square = own + ((2 * cross + B @ (A @ A.mT)) * B).sum(-1)
            # Not 0, where the root's slope is infinite: a row of zeros would poison all gradients.
            return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _fit(update: Update, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Before `model.load_state_dict`; a state without this layer changes nothing."""
    first = next(name for name, _ in update.delta.named_parameters())
    if f"{prefix}delta.{first}" in state:
        update.fit_frozen_(*(state.get(f"{prefix}frozen_{side}") for side in "AB"))
