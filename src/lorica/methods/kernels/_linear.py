"""The product of one layer with its update as one autograd function, in any order that can be the
fastest.

    y = g ∘ (x Wᵀ + s·drop(x) Aᵀ Bᵀ + s·x A₂ᵀ B₂ᵀ) + b     g (out,), and A₂ B₂, frozen: optional

x (N, in), W (out, in), A (k, in), B (out, k); N tokens, m = in, n = out. Multiplies in addition to
the Nmn of the product with W:

    forward    factors  x Wᵀ; (x Aᵀ) Bᵀ added in place                 Nk(m + n)
               sum      V = W + s·BA; x Vᵀ                             mnk
    for x      factors  dY W; (dY B) A added in place                  Nk(m + n)
               sum      V again; dY V                                  mnk
    for A, B   small    (dY B)ᵀ X, dYᵀ (X Aᵀ)                          2Nk(m + n)
               outer    G = dYᵀ X; Bᵀ G, G Aᵀ                          Nmn + 2mnk

These are f1, f2, b1, b3, b4, b5 of Cherniuk et al., RunLoRA, arXiv 2312.03415, 2023; no other
order of theirs is ever the cheapest. Forward saves only x for backward (and, for g, y before the
scaling): V and x Aᵀ are formed again, a dropout mask is drawn again from its seed, and under
autocast x is cast again, because layers share one x, and a cast copy for each layer would cost more
memory.

A weight that is not stored as dense values is `packed`: the product x Wᵀ is its format's own, W is
made of it in backward for the gradient of x, and no sum is formed.

Products with g are folded into V or B where these are smaller than an activation. From the product
u = x Vᵀ, ∂L/∂g = Σ dY ∘ u; from the output of a layer without bias, ∂L/∂g = (Σ dY ∘ y) / g.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.interfaces import BaseLike, Factors, RowScale, UpdateLike
from lorica.methods.fields import one_of
from lorica.methods.kernels._orders import WIDE, Call, Order
from lorica.methods.kernels.base import AbstractKernel, plain
from lorica.tensors import dropout
from lorica.tensors.matmul import added, no_autocast, rounds_float32

SAVES = ("product", "nothing", "output")
FEW, PART = 32, 512  # of a product formed in parts: the largest rank, and tokens per part
SLICE = 64  # rows at a time, to avoid a float32 copy of the whole tensor
TINY = 2.0**-60  # least |g|, so that y / g recovers what g scaled


class _Saved(NamedTuple):
    """What forward saves for backward."""

    x: Tensor | None
    w: Tensor | None  # None: packed
    bias: Tensor | None
    a: Tensor
    b: Tensor
    gain: Tensor | None
    a2: Tensor | None
    b2: Tensor | None
    h: Tensor | None  # x Aᵀ
    u: Tensor | None  # y before g and the bias
    formed: Tensor | None  # g ∘ (W + ΔW)
    g: Tensor | None  # the gain apart from zero
    y: Tensor | None


def linear(*arguments: object) -> Tensor:
    """The function below; its arguments are those of `forward`, by position."""
    # Torch has no types for `apply`.
    return _Linear.apply(*arguments)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context, which takes any attribute
        x: Tensor, w: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor,
        gain: Tensor | None, a2: Tensor | None, b2: Tensor | None, scale: float,
        forward_sum: bool, input_sum: bool, outer: bool, keep_sum: bool, p: float, seed: int,
        drop_all: bool, saves: str, dtype: torch.dtype, grad: bool, formed: Tensor | None = None,
        packed: BaseLike | None = None,
    ) -> Tensor:  # fmt: skip
        needs = (grad and need for need in ctx.needs_input_grad)  # which is set under no_grad, too
        need_x, need_w, _, need_a, need_b, need_gain, *_ = needs
        g = None if gain is None else _apart_from_zero(gain, dtype)
        call = _Call(x, w, bias, a, b, g, a2, b2, scale, p, seed, drop_all, dtype, packed)
        call.plain = formed
        keep = need_gain and saves == "product"
        again = need_gain and saves == "nothing"
        output = need_gain and saves == "output"
        # A frozen A needs no x in backward, only the small x Aᵀ; evaluation needs neither.
        slim = need_b and not (need_a or need_w or again)
        y, h, u = call.forward(forward_sum, keep)
        if slim and h is None:
            h = call.small()
        if output and not torch.compiler.is_compiling():
            ctx.version = _marked(y)
        ctx.save_for_backward(*_Saved(
            x if need_a or need_w or again else None, w, bias, a, b, gain, a2, b2,
            h if slim else None, u, call.formed if keep_sum and need_x and input_sum else None,
            g, y if output else None,
        ))  # fmt: skip
        ctx.rest = scale, p, seed, drop_all, dtype, packed
        ctx.order = input_sum, outer and not slim
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # Any: as above
        x, w, bias, a, b, gain, a2, b2, h, u, formed, g, y = _unpack(ctx)
        if torch.is_grad_enabled():  # a second derivative, in which saved products are constants
            formed = None
            g = None if gain is None else _apart_from_zero(gain, ctx.rest[-2])
            if u is not None and x is not None:
                u = None  # formed again from x, with its derivative
            if h is not None or u is not None:
                raise RuntimeError(
                    "this layer saved a product for backward, which a second derivative would"
                    " treat as a constant; add `+reference` to the method to differentiate twice"
                )
        with no_autocast(grads[0].device.type):
            call = _Call(x, w, bias, a, b, g, a2, b2, *ctx.rest)
            call.formed = formed
            out = call.backward(grads[0], h, u, y, ctx.needs_input_grad, *ctx.order)
        return *out, *[None] * 15


def _marked(y: Tensor) -> int:
    """y's version, raised well above that of a copy that a hook on saved tensors may return."""
    nothing = y[:0]
    for _ in range(3):
        nothing.zero_()
    return y._version


def _unpack(ctx: Any) -> _Saved:  # Any: torch's context
    """The saved tensors, after a check that the model hasn't changed the output in place.

    Torch checks that itself, except where a hook keeps the tensors, as in checkpointed segments.
    """
    saved: _Saved | None = None
    try:
        saved = _Saved(*ctx.saved_tensors)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
    y = None if saved is None else saved.y
    if saved is None or (y is not None and not _compiling() and y._version > ctx.version):
        raise RuntimeError(
            "the model changes the output of an adapted layer in place, and backward reads that"
            " output for the gradient of the magnitude; save a separate copy with"
            " `+auto(saves='product')` in the method, or nothing, at the cost of one more product,"
            " with `+auto(saves='nothing')`"
        )
    return saved


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _watched() -> bool:
    """Whether a dispatch mode sees each operation and may keep its result, as in selective
    checkpointing: then nothing may be changed in place."""
    inner: Any = torch._C  # pyright: ignore[reportPrivateUsage]  # Any: without stubs
    return not _compiling() and inner._len_torch_dispatch_stack() > 0


def _plus(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """y + scale·left right, in place where no dispatch mode keeps y."""
    if _watched():
        return torch.addmm(y, left, right, alpha=scale)
    return y.addmm_(left, right, alpha=scale)


def _apart_from_zero(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """g (out,), so far from 0 that y / g recovers what g scaled, for products in this dtype.

    In at least float32: rounded to half precision, it would not change while a magnitude trains.
    """
    g = gain.to(torch.promote_types(dtype, torch.float32))
    least = max(TINY, torch.finfo(dtype).tiny)  # float16 has no TINY
    return g.abs().clamp_min_(least).copysign_(g)


def _times(y: Tensor, factor: Tensor, *, fresh: bool = True) -> Tensor:
    """y ∘ factor, computed in the factor's precision and rounded to y's dtype once: in place, or
    in a copy where y is not `fresh` or a dispatch mode may keep it."""
    keep = not fresh or _watched()
    if y.dtype == factor.dtype:
        return y * factor if keep else y.mul_(factor)
    y = y.clone() if keep else y
    if y.device.type != "cpu" or _compiling() or torch.is_grad_enabled():
        return y.mul_(factor)
    # On a CPU mul_ would make a float32 copy of all of y, which takes thirty times as long.
    for i in range(0, y.shape[0], SLICE):
        y[i : i + SLICE].mul_(factor if factor.ndim == 1 else factor[i : i + SLICE])
    return y


def _into_rank(small: Tensor, x: Tensor) -> Tensor:
    """smallᵀ x (k, m) of small (N, k) and x (N, m).

    A CPU divides the rows of the result among its threads, and k rows are too few for that. A
    batched product over parts of the tokens takes 0.5 to 0.8 of the time. The parts do not depend
    on the number of threads.
    """
    n, k = small.shape
    if x.device.type != "cpu" or x.dtype not in WIDE or _compiling() or k > FEW or n < PART:
        return small.T @ x
    parts = max(2, round(n / PART))
    even = n // parts * parts

    def split(t: Tensor) -> Tensor:
        return torch.unflatten(t[:even], 0, (parts, -1))

    out = torch.bmm(split(small).mT, split(x)).sum(0)
    return out if even == n else torch.addmm(out, small[even:].T, x[even:])


def _over_tokens(dy: Tensor, y: Tensor) -> Tensor:
    """Σ dY ∘ y (out,), in at least float32; in float16 even the products would overflow."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    if dy.dtype != torch.float16:
        return (dy * y).sum(0, dtype=wide)
    if _compiling():
        return (dy.to(wide) * y).sum(0)
    # In slices, so that no float32 copy of an activation is made.
    parts = zip(torch.split(dy, SLICE), torch.split(y, SLICE), strict=True)
    return torch.stack([(d.to(wide) * v).sum(0) for d, v in parts]).sum(0)


class _Call:
    """The tensors of one call, in the dtype that it computes in."""

    def __init__(
        self, x: Tensor | None, w: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor,
        g: Tensor | None, a2: Tensor | None, b2: Tensor | None, scale: float, p: float, seed: int,
        drop_all: bool, dtype: torch.dtype, packed: BaseLike | None,
    ) -> None:  # fmt: skip
        self.dense, self.packed, self.dtype = None if w is None else w.to(dtype), packed, dtype
        self.a, self.b = a.to(dtype), b.to(dtype)
        self.input = None if x is None else x.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.k, self.still = a.shape[0], scale
        self.mask = dropout.Mask(p, seed) if p else None
        self.formed: Tensor | None = None
        self.plain: Tensor | None = None  # the sum without g, which may be changed here
        self.scale = scale / (1 - p)  # dropout scales up the features that it keeps
        self.frozen: tuple[Tensor, Tensor] | None = None  # A₂ and B₂, apart from A and B
        if a2 is not None and b2 is not None:
            right, left = a2.to(dtype), b2.to(dtype)
            if drop_all:  # dropout falls on both, so they are one pair
                self.a, self.b = torch.cat([self.a, right]), torch.cat([self.b, left], 1)
            else:
                self.frozen = right, left
        self.g = g

    @property
    def w(self) -> Tensor:
        """W (out, in); made anew at each use where it is packed."""
        if self.dense is not None:
            return self.dense
        assert self.packed is not None  # one of the two is given
        return self.packed.weight().to(self.dtype)

    def frozen_product(self, bias: Tensor | None) -> Tensor:
        """x Wᵀ, plus the bias where one is given (N, out)."""
        if self.packed is None:
            return F.linear(self.x, self.w, bias)
        return self.packed.product(self.x) if bias is None else self.packed.linear(self.x)

    @property
    def x(self) -> Tensor:
        assert self.input is not None  # saved wherever backward reads it
        return self.input

    def dropped(self) -> Tensor:
        """x after dropout, without its scale."""
        if self.mask is None:
            return self.x
        return self.mask.blank_(self.x.clone(memory_format=torch.contiguous_format))

    def small(self) -> Tensor:
        return self.dropped() @ self.a.T

    def sum(self, gained: bool = True) -> Tensor:
        """g ∘ (W + ΔW) (out, in), of both pairs."""
        if self.formed is not None and gained:
            return self.formed
        if given := self.plain is not None:
            v, self.plain = self.plain, None
        else:
            v = added(self.w, self.b, self.a, self.scale)
            if self.frozen is not None:
                a2, b2 = self.frozen
                v = _plus(v, b2, a2, self.still)
        if self.g is not None and gained:
            v = _times(v, self.g[:, None], fresh=not (given and _compiling()))
        self.formed = v if gained else None
        return v

    def forward(self, as_sum: bool, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y (N, out); x Aᵀ where it was formed; y without gain and bias where it is to be kept."""
        h = None
        late = self.g is not None and (keep or not as_sum)  # y is scaled, not V
        bias = None if late else self.bias
        if as_sum:
            y = F.linear(self.x, self.sum(not late), bias)
        else:
            h = self.small()
            y = _plus(self.frozen_product(bias), h, self.b.T, self.scale)
            if self.frozen is not None:
                a2, b2 = self.frozen
                y = _plus(y, self.x @ a2.T, b2.T, self.still)
        if self.g is None or not late:
            return y, h, None
        u = y if keep else None
        y = _times(y, self.g, fresh=not keep)
        if self.bias is not None:
            y = y + self.bias if _watched() else y.add_(self.bias)
        return y, h, u

    def backward(
        self, dy: Tensor, h: Tensor | None, u: Tensor | None, y: Tensor | None,
        needs: Sequence[bool], as_sum: bool, outer: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        need_x, need_w, need_bias, need_a, need_b, need_gain, *_ = needs
        k, row = self.k, None if self.g is None else self.g[:, None]
        b = self.b if row is None else _times(self.b, row, fresh=False)
        z: Tensor | None = None
        dx = dw = da = db = None
        if (need_a and not outer) or (need_x and not as_sum):
            z = (dy @ b).mul_(self.scale)  # (N, k)
        needs_outer = need_w or (outer and (need_a or need_b))
        G = dy.T @ self.x if needs_outer else None  # (out, in)
        if need_x:
            dx = dy @ self.sum() if z is None or as_sum else self._for_x(dy, z)
        if outer and G is not None:
            da = (b[:, :k].T @ G).mul_(self.scale) if need_a else None
            db = G @ self.a[:k].T if need_b else None
        elif need_a or need_b:
            if h is None:
                x = self.dropped()
                if need_a and z is not None:
                    da = _into_rank(z[:, :k], x)
                h = x @ self.a[:k].T if need_b else None
            if need_b and h is not None:
                db = _into_rank(h[:, :k], dy).T  # faster than dYᵀ h, whose result is tall
        if db is not None:
            db.mul_(self.scale if row is None else row * self.scale)
        if need_w and G is not None:
            dw = G if row is None else _times(G, row, fresh=False)
        dbias = dy.sum(0) if need_bias else None
        dgain = self._for_gain(dy, u, y) if need_gain else None
        return dx, dw, dbias, da, db, dgain

    def _for_x(self, dy: Tensor, z: Tensor) -> Tensor:
        """dY W + (dY B) A, without forming W + BA."""
        dx = z @ self.a
        dx = dx if self.mask is None else self.mask.blank_(dx)
        w, (a2, b2) = self.w, self.frozen or (None, None)  # w: made here once where it is packed
        on_dy = dy.shape[0] <= w.shape[1]  # on the smaller of the two
        if self.g is not None and on_dy:
            dy = _times(dy, self.g, fresh=False)
        elif self.g is not None:
            w = _times(w, self.g[:, None], fresh=False)
            b2 = None if b2 is None else _times(b2, self.g[:, None], fresh=False)
        dx.addmm_(dy, w)
        return dx if a2 is None or b2 is None else dx.addmm_(dy @ b2, a2, alpha=self.still)

    def _for_gain(self, dy: Tensor, u: Tensor | None, y: Tensor | None) -> Tensor:
        if y is not None and self.g is not None:
            return _over_tokens(dy, y) / self.g
        return _over_tokens(dy, self._before_gain() if u is None else u)

    def _before_gain(self) -> Tensor:
        as_sum = self.mask is None and self.packed is None
        u = self.x @ self.sum(False).T if as_sum else self.frozen_product(None)
        if not as_sum:
            u.addmm_(self.small(), self.b.T, alpha=self.scale)
            if self.frozen is not None:
                a2, b2 = self.frozen
                u.addmm_(self.x @ a2.T, b2.T, alpha=self.still)
        return u


class Plan(NamedTuple):
    """How one call is computed, and from which tensors.

    Attributes:
        dtype: of the products.
        w, own, frozen: W (out, in) where it is dense, the trained factors and the frozen ones.
        forms: whether W + ΔW (out, in) is used here, if the row scale forms it anyway.
    """

    order: Order
    dtype: torch.dtype
    w: Tensor | None
    own: Factors
    frozen: Factors | None
    forms: bool


@dataclass(frozen=True, kw_only=True)
class Fused(AbstractKernel):
    """A kernel that uses the function above; each file says in which order.

    Args:
        saves: what a layer whose rows are scaled (`dora`) saves for the scales' gradient: `product`
            (default), its output before the scaling, which nothing outside the layer can write to;
            `nothing`, at the cost of one more product with W; or `output`, its output itself, which
            an activation after it may save anyway. Choose `output` only where no kernel writes into
            a layer's output through a pointer, as some fused activations and rotary embeddings do
            in their backward: torch notices writes by its own operations alone, and the gradient
            would be wrong without an error. With a bias, `output` saves the product.
    """

    saves: str = "product"

    def __post_init__(self) -> None:
        one_of(self, "saves", *SAVES)

    @abc.abstractmethod
    def order(self, call: Call) -> Order:
        """In which order to compute this call."""

    def keeps_sum(self) -> bool:
        """Whether W + ΔW is saved for backward."""
        return False

    def plan(self, x: Tensor, base: BaseLike, update: UpdateLike) -> Plan | None:
        """None: compute the plain products. A delta without a pair has an order of its own; where a
        mask can't be a seed, the compiler does the dropout; transforms need plain products."""
        dropping = update.dropping
        unlike = (dropping and not dropout.seeded()) or (not _compiling() and dropout.transformed())
        if update.delta.pair() is None or base.lookup or unlike:
            return None
        own, frozen = update.delta.factors(), update.frozen_factors
        w, device = base.weight() if base.dense else None, x.device
        assert own is not None  # a pair has factors
        auto = torch.is_autocast_enabled(device.type)
        auto = auto and x.dtype != torch.float64  # which torch's autocast doesn't cast, either
        dtype = torch.get_autocast_dtype(device.type) if auto else x.dtype
        grad = torch.is_grad_enabled()
        order = self.order(Call(
            tokens=x.numel() // max(x.shape[-1], 1), in_features=own.A.shape[1],
            out_features=own.B.shape[0], r=own.A.shape[0],
            frozen_rank=0 if frozen is None else frozen.A.shape[0], dtype=dtype,
            device=device.type, exact=not rounds_float32(device.type), dropping=dropping,
            packed=w is None, needs_x=grad and x.requires_grad,
            needs_w=grad and w is not None and w.requires_grad,
            needs_a=grad and own.A.requires_grad, needs_b=grad and own.B.requires_grad,
        ))  # fmt: skip
        # the caller's sum is wide
        alike = dtype in WIDE and w is not None and dtype == w.dtype == own.A.dtype
        return Plan(order, dtype, w, own, frozen, order.forward_sum and alike)

    def product(
        self, x: Tensor, base: BaseLike, update: UpdateLike, *, gain: RowScale | None = None
    ) -> Tensor:
        plan = self.plan(x, base, update)
        if plan is None:
            return plain(x, base, update, gain=gain)
        order, dtype, w, own, frozen, forms = plan
        g, formed = (None, None) if gain is None else gain(forms)
        bias = base.bias()
        a2, b2 = (None, None) if frozen is None else (frozen.A, frozen.B)
        if frozen is not None and frozen.scale != own.scale:
            b2 = frozen.B * (frozen.scale / own.scale)
        dropping, grad = update.dropping, torch.is_grad_enabled()
        saves = self.saves
        if saves == "output" and (bias is not None or _watched()):
            saves = "product"  # with a small g, rounding y with its bias would lose the product
        with no_autocast(x.device.type):
            y = linear(
                x.reshape(-1, x.shape[-1]), w, bias, own.A, own.B, g, a2, b2, own.scale,
                order.forward_sum, order.input_sum, order.outer, self.keeps_sum(),
                update.dropout if dropping else 0.0, dropout.draw_seed() if dropping else 0,
                update.drop_frozen, saves, dtype, grad, formed, base if w is None else None,
            )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])
