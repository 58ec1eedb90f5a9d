"""Rules that treat every number alone: what the pair rules end in, and what trains the rest.

Each comes in two forms that compute the same: `plain` over a list of parameters of any shapes, and
`stacked` over one factor of n pairs at once, (n, r, d), with a step count per pair or per vector.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, _foreach_add_, _foreach_mul_  # type: ignore[attr-defined]
from torch.optim.adamw import adamw as adamw_

Shape = tuple[int, ...]


class Elementwise(abc.ABC):
    defaults: Mapping[str, Any]  # options of an optimizer group

    @abc.abstractmethod
    def check(self, options: Mapping[str, Any]) -> None:
        """ValueError where an option is out of range."""

    @abc.abstractmethod
    def shapes(self, shape: Shape, options: Mapping[str, Any]) -> dict[str, Shape]:
        """State of a parameter: name -> shape, `()` for one number."""

    @abc.abstractmethod
    def plain(
        self, parameters: list[Tensor], gradients: list[Tensor],
        states: Sequence[dict[str, Tensor]], lr: float, decay: float, options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Move the parameters and their states in place."""

    @abc.abstractmethod
    def stacked(
        self, value: Tensor, gradient: Tensor, state: dict[str, Tensor],
        lr: float | Tensor, decay: float, options: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """The moved value (n, r, d); `value`, `gradient` and `state` are the caller's to lose."""


class Adam(Elementwise):
    """AdamW; `plain` is torch's own code."""

    defaults: Mapping[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}

    def check(self, options: Mapping[str, Any]) -> None:
        if len(options["betas"]) != 2 or not all(0 <= b < 1 for b in options["betas"]):
            raise ValueError(
                f"`betas={options['betas']!r}`: two numbers in [0, 1), e.g. (0.9, 0.999)"
            )
        if not options["eps"] > 0:  # at 0 a gradient of 0 would be 0/0
            raise ValueError(f"`eps={options['eps']!r}` must be positive, e.g. 1e-8")

    def shapes(self, shape: Shape, options: Mapping[str, Any]) -> dict[str, Shape]:
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}

    def plain(self, parameters, gradients, states, lr, decay, options) -> None:
        beta1, beta2 = options["betas"]
        adamw_(
            parameters, gradients, [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay,
            eps=options["eps"], maximize=False,
        )  # fmt: skip

    def stacked(self, value, gradient, state, lr, decay, options) -> Tensor:
        beta1, beta2 = options["betas"]
        count = state["step"].add_(1).double()  # 1 − β₂ᵗ in float32 is wrong in the fifth digit
        first, second = ((1 - beta**count).to(value.dtype) for beta in (beta1, beta2))
        m = state["exp_avg"].lerp_(gradient, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = v.sqrt().div_(second.sqrt()).add_(options["eps"])
        return value.mul_(1 - lr * decay).sub_(m.div(root).mul_(lr / first))


class Sgd(Elementwise):
    """p ← (1 − ηλ)p − ηb, b ← μb + g."""

    defaults: Mapping[str, Any] = {"momentum": 0.0}

    def check(self, options: Mapping[str, Any]) -> None:
        if not 0 <= options["momentum"] < 1:
            raise ValueError(f"`momentum={options['momentum']!r}` is in [0, 1), e.g. 0.9")

    def shapes(self, shape: Shape, options: Mapping[str, Any]) -> dict[str, Shape]:
        return {"momentum_buffer": shape} if options["momentum"] else {}

    def plain(self, parameters, gradients, states, lr, decay, options) -> None:
        if options["momentum"]:
            buffers = [s["momentum_buffer"] for s in states]
            _foreach_mul_(buffers, options["momentum"])
            _foreach_add_(buffers, gradients)
            gradients = buffers
        if decay:
            _foreach_mul_(parameters, 1 - lr * decay)
        _foreach_add_(parameters, gradients, alpha=-lr)

    def stacked(self, value, gradient, state, lr, decay, options) -> Tensor:
        if options["momentum"]:
            gradient = state["momentum_buffer"].mul_(options["momentum"]).add_(gradient)
        return value.mul_(1 - lr * decay).sub_(gradient * lr)
