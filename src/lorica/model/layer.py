"""AdaptedLayer: a frozen base, an update, and a combine. Knows no method by name. AdaptedLinear is
that of a single matrix; `lorica.model.experts` has that of a stack.

y = combine(x; W, update),    update = delta + frozen factors     (lorica.model.update)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorica.interfaces import Site
from lorica.methods.combine.base import AbstractCombine
from lorica.methods.kernels.base import AbstractKernel
from lorica.model.bases.base import AbstractBase
from lorica.model.module_hooks import share_hooks
from lorica.model.update import Update
from lorica.tensors.matmul import no_autocast


class AdaptedLayer(nn.Module):
    """One adapted weight, which `store` presents as (out, in).

    Attributes:
        disabled: compute what the base alone does.
        frozen_for_now: names of parameters that do not train at present, see
            `lorica.training.freezing`.
        weight_read: whether `weight` has been read since this was set to False; None: this is not
            recorded. A model that multiplies with `weight` itself does not see the adapter.
    """

    def __init__(
        self, store: AbstractBase, update: Update, combine: AbstractCombine,
        kernel: AbstractKernel, site: Site, *, train_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
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
        self.frozen_for_now: tuple[str, ...] = ()
        self.weight_read: bool | None = None

    @property
    def place(self) -> str:
        """Path of the module in the model that holds the weight, in whose place one of ours is."""
        return self.store.place(self.site.name)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) that this layer computes with, in at least float32."""
        with no_autocast(self.store.device.type):
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
        """What the forward reads beside base and trained parameters, of this layer's own: frozen
        factors, masks, shares."""
        other = {name for name, _, _ in self.trained()}
        return [
            (name, p)
            for name, p in self.named_parameters()
            if name not in other and not name.startswith("base.")
        ]

    @property
    def weight(self) -> nn.Parameter:
        if self.weight_read is False:
            self.weight_read = True
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


class AdaptedLinear(AdaptedLayer):
    """Takes the place of `base`, the untouched module, in the model.

    Attributes that models read of a linear layer (`weight`, `bias`, `in_features`, `out_features`)
    are the base's.
    """

    def __init__(
        self, store: AbstractBase, update: Update, combine: AbstractCombine,
        kernel: AbstractKernel, site: Site, *, train_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__(store, update, combine, kernel, site, train_bias=train_bias)
        self.base = store.module
        share_hooks(self.base, self)

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return self.base.forward(x)
        if self.frozen_for_now:
            return self._forward_partly_frozen(x)
        y = self.store.finish(self.combine(x, self.store, self.update, self.kernel))
        if self.store.lookup or torch.is_autocast_enabled(x.device.type):
            return y
        return y.to(x.dtype)

    def _forward_partly_frozen(self, x: Tensor) -> Tensor:
        """The forward with the parameters of `frozen_for_now` as constants."""
        names, self.frozen_for_now = self.frozen_for_now, ()
        if torch.compiler.is_compiling():  # where `requires_grad` cannot be switched
            constants = {name: self.get_parameter(name).detach() for name in names}
            try:
                return torch.func.functional_call(self, constants, (x,))
            finally:
                self.frozen_for_now = names
        held = [p for name in names if (p := self.get_parameter(name)).requires_grad]
        try:
            for p in held:
                p.requires_grad_(False)
            return self.forward(x)
        finally:
            for p in held:
                p.requires_grad_(True)
            self.frozen_for_now = names
