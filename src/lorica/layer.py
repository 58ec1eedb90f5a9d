"""AdaptedLinear: a frozen base, an update, and a combine. Knows no method by name.

y = combine(x; W, update),    update = delta + carried      (lorica.update)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorica.bases import AbstractBase
from lorica.combine import AbstractCombine
from lorica.deltas import Site
from lorica.kernels import AbstractKernel
from lorica.phases import forward_at_rest
from lorica.products import unrounded
from lorica.update import Update


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
        self.resting: tuple[str, ...] = ()  # parameters that don't train for now, see `phases`

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.base(x)
        if self.resting:
            return forward_at_rest(self, x)
        y = self.combine(x, self.store, self.update, self.kernel)
        if self.store.lookup or torch.is_autocast_enabled(x.device.type):
            return y
        return y.to(x.dtype)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) that this layer computes with, in at least float32."""
        with unrounded(self.store.parameter.device.type):
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
