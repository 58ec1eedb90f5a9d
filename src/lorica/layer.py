"""AdaptedLinear: a frozen base, an update, and a combine. Knows no method by name.

    y = combine(x; W, update),    update = delta + carried

*Carried* is a frozen stack of factors under the layer's own scale: the start ΔW₀ of an anchored
init enters with a minus, a finished link of a restarting schedule with a plus. So the base is never
mutated by a start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.bases import AbstractBase
from lorica.combine import AbstractCombine
from lorica.deltas import AbstractDelta, Factors, Site
from lorica.kernels import AbstractKernel


class Update(nn.Module):
    """delta + carried of one layer, with the dropout that falls on it. Combines, kernels and export
    take this."""

    carried_A: nn.Parameter | None  # (k, in), frozen
    carried_B: nn.Parameter | None  # (out, k), frozen; sign folded in, scale that of the delta

    def __init__(self, delta: AbstractDelta, site: Site, *, dropout: float, drop_carried: bool):
        super().__init__()
        self.delta = delta
        self.lookup = site.lookup
        self.dropout = dropout
        self.drop_carried = drop_carried
        # Parameters, not buffers: DDP would broadcast buffers at every forward, FSDP2 fails to load
        # them.
        self.register_parameter("carried_A", None)
        self.register_parameter("carried_B", None)

    @torch.no_grad()
    def carry_(self, A: Tensor, B: Tensor) -> None:
        """Stack A (k, in), B (out, k) onto what is carried; needs plain tensors, so before
        sharding."""
        like = {"dtype": self._dtype, "device": A.device}
        A, B = A.to(**like), B.to(**like)
        if self.carried_A is not None and self.carried_B is not None:
            A, B = torch.cat([self.carried_A, A]), torch.cat([self.carried_B, B], dim=1)
        self.carried_A = nn.Parameter(A.clone(), requires_grad=False)
        self.carried_B = nn.Parameter(B.clone(), requires_grad=False)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.delta.parameters()).dtype

    @property
    def carried(self) -> Factors | None:
        if self.carried_A is None or self.carried_B is None:
            return None
        return Factors(self.carried_A, self.carried_B, self.delta.scale)

    @property
    def dropping(self) -> bool:
        """Whether this call drops inputs, so that no one matrix stands for the update."""
        return self.training and self.dropout > 0

    def factors(self) -> Factors | None:
        """Low-rank view of the whole update, rank r + k, or None where the delta has none."""
        own, carried = self.delta.factors(), self.carried
        if own is None or carried is None:
            return own
        if own.scale != carried.scale:
            own = Factors(own.A, own.B * (own.scale / carried.scale), carried.scale)
        return Factors(torch.cat([own.A, carried.A]), torch.cat([own.B, carried.B], 1), own.scale)

    def weight(self, base: AbstractBase) -> Tensor:
        """ΔW (out, in) of the whole update, in at least float32."""
        if (factors := self.factors()) is not None:
            return factors.weight()
        own, carried = self.delta.weight(base), self.carried
        assert own is not None, "the combine needs a weight and the recipe's check let this pass"
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        return own if carried is None else own + carried.weight()

    def row_norms(self, base: AbstractBase) -> Tensor:
        """Row norms of W + ΔW (out,), in at least float32, without forming ΔW where factors exist:

        c² = rowsum(W²) + 2 rowsum((W Aᵀ) ∘ B) + rowsum((B A Aᵀ) ∘ B), the scale folded into B.
        """
        with torch.autocast(base.parameter.device.type, enabled=False):
            if (factors := self.factors()) is None:
                delta = self.weight(base)
                return torch.linalg.vector_norm(base.weight().to(delta.dtype) + delta, dim=1)
            wide = torch.promote_types(factors.A.dtype, torch.float32)
            w, A = base.weight().to(wide), factors.A.to(wide)
            B = factors.B.to(wide) * factors.scale
            cross = F.linear(w, A)  # (out, k)
            square = w.square().sum(1) + ((2 * cross + B @ (A @ A.T)) * B).sum(1)
            return square.clamp_min(0).sqrt()

    # -- the product, split by what dropout falls on

    def drop(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input after dropout; for token ids a mask (..., 1) instead, since a dropped one-hot
        is a zero."""
        if not self.dropping:
            return x, None
        if self.lookup:
            mask = torch.ones((*x.shape, 1), device=x.device, dtype=self._dtype)
            return x, F.dropout(mask, self.dropout)
        return F.dropout(x, self.dropout), None

    def moving(self, x: Tensor, base: AbstractBase, keep: Tensor | None = None) -> Tensor:
        """The part that dropout falls on, of an input already dropped."""
        factors = self.factors() if self.drop_carried else self.delta.factors()
        if factors is not None:
            return self._product(x, factors, keep)
        y = self.delta(x, base)
        carried = self.carried if self.drop_carried else None
        return y if carried is None else y + self._product(x, carried, keep)

    def still(self, x: Tensor) -> Tensor | None:
        """The part that dropout leaves alone, or None where that is nothing."""
        carried = None if self.drop_carried else self.carried
        return None if carried is None else self._product(x, carried)

    def forward(self, x: Tensor, base: AbstractBase) -> Tensor:
        """x ΔWᵀ: (..., in) -> (..., out), in x's dtype (token ids: in the base's)."""
        dropped, keep = self.drop(x)
        y = self.moving(dropped, base, keep)
        if (still := self.still(x)) is not None:
            y = y + still
        return y.to(base.parameter.dtype) if self.lookup else y

    def _product(self, x: Tensor, factors: Factors, keep: Tensor | None = None) -> Tensor:
        if self.lookup:
            h = F.embedding(x, factors.A.T)  # (..., k)
            return F.linear(h if keep is None else h * keep, factors.B * factors.scale)
        # The small factors go to x's dtype, never x to theirs: no wide copy of an activation.
        B = factors.B if factors.scale == 1 else factors.B * factors.scale
        return F.linear(F.linear(x, factors.A.to(x.dtype)), B.to(x.dtype))


class AdaptedLinear(nn.Module):
    """Stands in the model where `base` stood.

    `base` is the untouched module; `store` presents its weight as (out, in). Attributes that models
    read of a linear layer (`weight`, `bias`, `in_features`, `out_features`) are the base's.
    """

    def __init__(
        self, store: AbstractBase, update: Update, combine: AbstractCombine,
        kernel: AbstractKernel, site: Site, *, train_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base = store.module
        self.update = update
        self.combine = combine
        self.own = nn.Module()  # a bias that trains beside the frozen one
        if train_bias and (bias := store.bias()) is not None:
            self.own.bias = nn.Parameter(bias.detach().to(site.dtype, copy=True))
            store.trained_bias = self.own
        self.store = store
        self.kernel = kernel
        self.site = site
        self.disabled = False

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.base(x)
        y = self.combine(x, self.store, self.update, self.kernel)
        if self.store.lookup or torch.is_autocast_enabled(x.device.type):
            return y
        return y.to(x.dtype)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) that this layer computes with, in at least float32."""
        return self.combine.effective(self.store, self.update)

    def trained(self) -> list[tuple[str, nn.Parameter, str]]:
        """(name within the layer, parameter, role) of everything an optimizer could train here."""
        owners = (
            ("update.delta", self.update.delta, self.update.delta.roles),
            ("combine", self.combine, self.combine.roles),
            ("own", self.own, {"bias": "bias"}),
        )
        return [
            (f"{path}.{name}", p, roles[name])
            for path, owner, roles in owners
            for name, p in owner.named_parameters()
            if name in roles
        ]

    def frozen(self) -> list[tuple[str, nn.Parameter]]:
        """What the forward reads beside base and trained parameters: carried factors, masks,
        shares."""
        trained = {name for name, _, _ in self.trained()}
        return [
            (name, p)
            for name, p in self.named_parameters()
            if name not in trained and not name.startswith("base.")
        ]

    @property
    def weight(self) -> nn.Parameter:
        return self.store.parameter

    @property
    def bias(self) -> Tensor | None:
        return self.store.bias()

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, r={self.site.r},"
            f" s={self.site.scale:g}"
        )


class TrainedModule(nn.Module):
    """A module that trains in full (a fresh head, `modules_to_save`) beside its frozen original.

    Args:
        base: the original; stays as it is.
        only: names of the base's own parameters that train; None means all. The others are shared,
        not copied.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype, only: frozenset[str] | None = None):
        super().__init__()
        import copy

        shared = {
            id(p): p for n, p in base.named_parameters() if only is not None and n not in only
        }
        self.base = base
        self.copy = copy.deepcopy(base, dict(shared))
        for name, p in self.copy.named_parameters():
            if only is None or name in only:
                p.data = p.data.to(dtype)
        self.only = only
        self.dtype = dtype
        self.disabled = False

    def forward(self, *args, **kwargs):
        if self.disabled:
            return self.base(*args, **kwargs)
        own = next(self.base.parameters()).dtype
        if own == self.dtype:
            return self.copy(*args, **kwargs)
        if self.only is not None:  # the rest is shared with the base, so the few go to its dtype
            cast = {n: p.to(own) for n, p in self.copy.named_parameters() if n in self.only}
            return torch.func.functional_call(self.copy, cast, args, kwargs)
        y = self.copy(*(_cast(a, self.dtype) for a in args), **kwargs)
        return _cast(y, own)

    def trained(self) -> list[tuple[str, nn.Parameter, str]]:
        return [
            (f"copy.{name}", p, "bias" if name.rsplit(".", 1)[-1] == "bias" else "module")
            for name, p in self.copy.named_parameters()
            if self.only is None or name in self.only
        ]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base if self.disabled else self.copy, name)


def _cast(value, dtype: torch.dtype):
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
