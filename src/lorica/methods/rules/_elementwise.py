"""Elementwise rules: what the pair rules end in, and what moves parameters that are in no pair.

Each comes in two forms that compute the same: `plain` over a list of parameters of any shapes, and
`stacked` over one factor of n pairs at once, (n, r, d), with a step count per pair or per vector.
Shared by the rules of this axis; no method by itself.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from torch import Tensor
from torch.optim.adamw import adamw as adamw_

from lorica.methods.arguments import MOST
from lorica.methods.fields import is_number
from lorica.methods.groups.base import Options
from lorica.tensors import foreach
from lorica.text import shorten

Shape = tuple[int, ...]


class Elementwise(abc.ABC):
    defaults: Options  # of an optimizer group

    @abc.abstractmethod
    def check(self, options: Options) -> None:
        """ValueError where an option is out of range."""

    @abc.abstractmethod
    def shapes(self, shape: Shape, options: Options) -> dict[str, Shape]:
        """State of a parameter: name -> shape, `()` for a scalar."""

    @abc.abstractmethod
    def plain(
        self, parameters: list[Tensor], gradients: list[Tensor],
        states: Sequence[dict[str, Tensor]], lr: float, decay: float, options: Options,
    ) -> None:  # fmt: skip
        """Move the parameters and their states in place."""

    @abc.abstractmethod
    def stacked(
        self, value: Tensor, gradient: Tensor, state: dict[str, Tensor],
        lr: float | Tensor, decay: float, options: Options,
    ) -> Tensor:  # fmt: skip
        """The moved value (n, r, d). May overwrite `value`, `gradient` and `state`."""


class Adam(Elementwise):
    """AdamW; `plain` is torch's own code."""

    defaults: Options = {"betas": (0.9, 0.999), "eps": 1e-8}

    def check(self, options: Options) -> None:
        betas, eps = options["betas"], options["eps"]
        given: list[object] = [*betas] if isinstance(betas, (tuple, list)) else []  # pyright: ignore
        if len(given) != 2 or not all(is_number(b, 0) and b < 1 for b in given):
            raise ValueError(f"`betas={shorten(betas)}`: two numbers in [0, 1), e.g. (0.9, 0.999)")
        if not (is_number(eps, 0, MOST) and eps > 0):  # at 0 a gradient of 0 would be 0/0
            raise ValueError(f"`eps={shorten(eps)}`: a number above 0, e.g. 1e-8")

    def shapes(self, shape: Shape, options: Options) -> dict[str, Shape]:
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}

    def plain(
        self, parameters: list[Tensor], gradients: list[Tensor],
        states: Sequence[dict[str, Tensor]], lr: float, decay: float, options: Options,
    ) -> None:  # fmt: skip
        beta1, beta2 = options["betas"]
        adamw_(
            parameters, gradients, [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay,
            eps=options["eps"], maximize=False,
        )  # fmt: skip

    def stacked(
        self, value: Tensor, gradient: Tensor, state: dict[str, Tensor],
        lr: float | Tensor, decay: float, options: Options,
    ) -> Tensor:  # fmt: skip
        beta1, beta2 = options["betas"]
        count = state["step"].add_(1).double()  # 1 − β₂ᵗ in float32 is wrong in the fifth digit
        first, second = ((1 - beta**count).to(value.dtype) for beta in (beta1, beta2))
        m = state["exp_avg"].lerp_(gradient, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = v.sqrt().div_(second.sqrt()).add_(options["eps"])
        return value.mul_(1 - lr * decay).sub_(m.div(root).mul_(lr / first))


class Sgd(Elementwise):
    """p ← (1 − ηλ)p − ηb, b ← μb + g."""

    defaults: Options = {"momentum": 0.0}

    def check(self, options: Options) -> None:
        momentum = options["momentum"]
        if not (is_number(momentum, 0) and momentum < 1):
            raise ValueError(f"`momentum={shorten(momentum)}`: a number in [0, 1), e.g. 0.9")

    def shapes(self, shape: Shape, options: Options) -> dict[str, Shape]:
        return {"momentum_buffer": shape} if options["momentum"] else {}

    def plain(
        self, parameters: list[Tensor], gradients: list[Tensor],
        states: Sequence[dict[str, Tensor]], lr: float, decay: float, options: Options,
    ) -> None:  # fmt: skip
        if options["momentum"]:
            buffers = [s["momentum_buffer"] for s in states]
            foreach.mul_(buffers, options["momentum"])
            foreach.add_(buffers, gradients)
            gradients = buffers
        if decay:
            foreach.mul_(parameters, 1 - lr * decay)
        foreach.add_(parameters, gradients, alpha=-lr)

    def stacked(
        self, value: Tensor, gradient: Tensor, state: dict[str, Tensor],
        lr: float | Tensor, decay: float, options: Options,
    ) -> Tensor:  # fmt: skip
        if options["momentum"]:
            gradient = state["momentum_buffer"].mul_(options["momentum"]).add_(gradient)
        return value.mul_(1 - lr * decay).sub_(gradient * lr)
