"""EffectiveWeight: a stack of weights that multiplies as W + ΔW without being formed.

A model's code hands its expert tensors to products of its own: one expert after the other, all at
once over sorted tokens, or a gathered copy for each token. This tensor takes the place of such a
weight for the time of a forward, and each product with it becomes

    x V = x W + (drop(x) L) R        V = diag(g) (W + L R)

by the very function that the model called, so only the experts that tokens are routed to cost
anything. Whatever else is done with it sees the sum, formed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only  # pyright: ignore[reportPrivateUsage]

from lorica.tensors import dropout
from lorica.tensors.grouped import grouped

Function = Callable[..., Any]  # Any: of torch's, which have no common type


class Term(NamedTuple):
    """One low-rank part of the update, in the layout of the weight.

    Attributes:
        left, right: (..., p, k) and (..., k, q) of a weight (..., p, q), any scale folded in.
        drop: dropout of the input that this part sees; None: none.
    """

    left: Tensor
    right: Tensor
    drop: Callable[[Tensor], Tensor] | None = None


class EffectiveWeight(Tensor):
    """A stack of matrices (E, p, q), or one of them (p, q), that counts as diag(g) (W + Σ L R), or
    as (W + Σ L R) diag(g).

    Attributes:
        stored: W itself.
        parts: the parts of the update, or what makes them.
        gain: g (..., p) or (..., q), or None.
        on_rows: whether g scales the rows, of length q.
        one: multiplies x (n, in) by the transpose of one expert's W (out, in), given as a whole
            number; None: that takes the stack's own products.
        met: called with the experts, as an index, that some rows are multiplied with; None: no
            call. Not called where all of the stack takes part in one product.
    """

    stored: Tensor
    parts: tuple[Term, ...] | Callable[[], tuple[Term, ...]]
    gain: Tensor | None
    on_rows: bool
    one: Callable[[Tensor, int], Tensor] | None
    met: Callable[[Any], None] | None  # Any: as torch's indexing takes it
    which: Any  # the part of the stack that this is; None: all of it

    @classmethod
    def of(
        cls, stored: Tensor, terms: tuple[Term, ...] | Callable[[], tuple[Term, ...]],
        gain: Tensor | None, *, on_rows: bool,
    ) -> EffectiveWeight:  # fmt: skip
        # Torch has no types for it.
        make = cast(Function, Tensor._make_subclass)  # pyright: ignore[reportPrivateUsage]
        made: EffectiveWeight = make(cls, stored.detach(), False)
        made.stored, made.parts, made.gain, made.on_rows = stored, terms, gain, on_rows
        made.one, made.met, made.which = None, None, None
        return made

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parts of the update, made when they are first asked for."""
        if callable(self.parts):
            self.parts = self.parts()
        return self.parts

    @classmethod
    def __torch_function__(
        cls, func: Function, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: of whatever function
        kwargs = kwargs or {}
        handle = _HANDLERS.get(func)
        if handle is not None:
            out = handle(func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in _ABOUT:
            plain = [a.stored if isinstance(a, EffectiveWeight) else a for a in args]
            return func(*plain, **kwargs)
        args, kwargs = tree_map_only(EffectiveWeight, EffectiveWeight.formed, (args, kwargs))
        return func(*args, **kwargs)

    def formed(self) -> Tensor:
        """diag(g) (W + Σ L R) in W's dtype.

        Raises:
            ValueError: dropout falls on the update's input, so that no one matrix is the update.
        """
        if any(term.drop is not None for term in self.terms):
            raise ValueError(
                "this model does something with its expert tensors that is no product, so dropout"
                " can't fall on the input of their update; train it with `lora_dropout=0`"
            )
        total = self.stored
        for term in self.terms:
            total = total + (term.left @ term.right).to(total.dtype)
        if self.gain is None:
            return total
        return (total * self.gain.unsqueeze(-1 if self.on_rows else -2)).to(self.stored.dtype)

    def changed(self, change: Callable[[Tensor], Tensor]) -> EffectiveWeight:
        """The same of a part of the stack, taken alike from all that it is made of."""

        def terms() -> tuple[Term, ...]:
            return tuple(Term(change(t.left), change(t.right), t.drop) for t in self.terms)

        gain = None if self.gain is None else change(self.gain)
        return self._as(EffectiveWeight.of(change(self.stored), terms, gain, on_rows=self.on_rows))

    def flipped(self) -> EffectiveWeight:
        """Its transpose."""

        def terms() -> tuple[Term, ...]:
            return tuple(Term(t.right.mT, t.left.mT, t.drop) for t in self.terms)

        turned = EffectiveWeight.of(self.stored.mT, terms, self.gain, on_rows=not self.on_rows)
        return self._as(turned)

    def _as(self, other: EffectiveWeight) -> EffectiveWeight:
        other.one, other.met, other.which = self.one, self.met, self.which
        return other

    def meets(self, x: Tensor) -> None:
        """Note that x is multiplied with this part of the stack."""
        if self.met is not None and self.which is not None and x.numel():
            self.met(self.which)


# -- what is done with it


def _item(func: Function, weight: Any, index: Any) -> Any:  # Any: as torch's indexing takes it
    """One matrix of the stack, or one for each of several ids."""
    if weight.stored.ndim != 3 or isinstance(index, (bool, tuple, list, slice)) or index is None:
        return NotImplemented
    if isinstance(index, Tensor) and (index.dtype in _NO_IDS or index.ndim > 1):
        return NotImplemented

    def one(t: Tensor) -> Tensor:
        return t[index]

    part = weight.changed(one)
    part.which = index
    if isinstance(index, Tensor) and index.ndim == 0 and index.device.type == "cpu":
        part.which = int(index)
    return part


def _transpose(func: Function, weight: EffectiveWeight, *dims: int, **named: int) -> Any:
    count = weight.stored.ndim
    wanted = [*dims, *named.values()]
    if not wanted and count != 2:
        return NotImplemented  # .T and .t() of a stack
    pair = {d % count for d in wanted}
    return weight.flipped() if not wanted or pair == {count - 1, count - 2} else NotImplemented


def _swap(func: Function, weight: EffectiveWeight) -> EffectiveWeight:
    return weight.flipped()


def _linear(func: Function, x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, EffectiveWeight) or weight.stored.ndim != 2 or _is_one(x):
        return NotImplemented
    y = _from_right(torch.matmul, x, weight.flipped())
    return y if bias is None else y + bias


def _matmul(func: Function, left: Any, right: Any) -> Any:
    if isinstance(right, EffectiveWeight):
        return NotImplemented if _is_one(left) else _from_right(func, left, right)
    return NotImplemented if _is_one(right) else _from_left(func, left, right)


def _rmatmul(func: Function, right: Any, left: Any) -> Any:
    return _matmul(torch.matmul, left, right)


def _is_one(x: Any) -> bool:
    """Whether the other factor is no plain matrix or stack of them."""
    return isinstance(x, EffectiveWeight) or x.ndim < 2


def _from_right(func: Function, x: Tensor, weight: EffectiveWeight) -> Tensor:
    """x V (..., n, q)."""
    weight.meets(x)
    if weight.one is not None and type(weight.which) is int and not weight.on_rows:
        return weight.one(x, weight.which)
    g = weight.gain
    if g is not None and weight.on_rows:
        x = (x * g.unsqueeze(-2)).to(x.dtype)
    y = func(x, weight.stored)
    for term in weight.terms:
        inner = x if term.drop is None else term.drop(x)
        y = y + func(func(inner, term.left), term.right)
    return y if g is None or weight.on_rows else (y * g.unsqueeze(-2)).to(y.dtype)


def _from_left(func: Function, weight: EffectiveWeight, x: Tensor) -> Tensor:
    """V x (..., p, n)."""
    weight.meets(x)
    g = weight.gain
    if g is not None and not weight.on_rows:
        x = (x * g.unsqueeze(-1)).to(x.dtype)
    y = func(weight.stored, x)
    for term in weight.terms:
        inner = x if term.drop is None else term.drop(x)
        y = y + func(term.left, func(term.right, inner))
    return y if g is None or not weight.on_rows else (y * g.unsqueeze(-1)).to(y.dtype)


def _grouped(func: Function, x: Tensor, weight: Any, *rest: Any, **options: Any) -> Any:
    """x (S, p), sorted by expert, with V (E, p, q); `offs` (E,) ends each expert's rows."""
    offs = rest[0] if rest else options.get("offs")
    if not isinstance(weight, EffectiveWeight) or offs is None or len(rest) > 1:
        return NotImplemented
    if weight.met is not None:
        weight.met(offs.diff(prepend=offs.new_zeros(1)) > 0)
    if weight.one is not None and not weight.on_rows and x.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # which torch's own grouped products don't know
            x = x.to(weight.stored.dtype)
            if weight.gain is None and not dropout.transformed() and not _drops(weight):
                left, right = (t.mT.to(x.dtype) for t in weight.terms[0][:2])
                return grouped(x, weight.stored.mT, left, right, _counts(offs))
            parts = [weight.one(rows, e) for e, rows in _groups(x, offs)]
            return _joined(parts, x, weight.stored.shape[-1])
    g = weight.gain
    owner = None if g is None else _owner(x, offs)
    if g is not None and weight.on_rows:
        x = (x * g[owner]).to(x.dtype)
    y = func(x, weight.stored, *rest, **options)
    for term in weight.terms:
        inner = x if term.drop is None else term.drop(x)
        inner = inner.to(term.left.dtype)  # the grouped products of torch know no autocast
        small = _by_group(func, inner, term.left, offs)
        y = y + _by_group(func, small, term.right, offs).to(y.dtype)
    return y if g is None or weight.on_rows else (y * g[owner]).to(y.dtype)


def _owner(x: Tensor, offs: Tensor) -> Tensor:
    """The expert of each row (S,); the last one for rows that are no expert's."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=offs.dtype)
    return torch.searchsorted(offs, rows, right=True).clamp_(max=offs.shape[0] - 1)


def _by_group(func: Function, x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """x (S, p) by w (E, p, q), each expert's rows with its own matrix; 0 for rows of no expert."""
    if all(size * w.element_size() % 16 == 0 for size in w.shape[1:]):  # what torch's can multiply
        return func(x, w, offs=offs)
    ones = w.unbind()
    parts = [rows @ ones[e] for e, rows in _groups(x, offs)]
    return _joined(parts, x, w.shape[-1])


def _drops(weight: EffectiveWeight) -> bool:
    return len(weight.terms) != 1 or weight.terms[0].drop is not None


def _groups(x: Tensor, offs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows) of each expert that has some."""
    counts = _counts(offs)
    # Cut at once: the gradient of one slice after the other would be all of x each time.
    for e, rows in enumerate(torch.split(x, [*counts, x.shape[0] - sum(counts)])[:-1]):
        if len(rows):
            yield e, rows


def _counts(offs: Tensor) -> list[int]:
    """Rows of each expert."""
    ends = [int(end) for end in offs.unbind()]  # on a CPU there is nothing to wait for
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _joined(parts: list[Tensor], x: Tensor, width: int) -> Tensor:
    """The rows one below the other, and 0 for those of no expert."""
    spare = x.shape[0] - sum(len(part) for part in parts)
    if spare or not parts:
        parts.append(x.new_zeros(spare, width))
    return torch.cat(parts)


_NO_IDS = (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FORM = (  # attributes that say how a tensor is held
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_meta",
    "is_cpu", "is_cuda", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "itemsize",
    "nbytes",
)  # fmt: skip


def _getter(name: str) -> Any:  # Any: what reads an attribute of a tensor has no type
    return inspect.getattr_static(Tensor, name).__get__


# Functions that ask for the weight's form, not its values. Any: of torch's, some without a type.
_ABOUT: frozenset[Any] = frozenset((
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement,
    Tensor.stride, Tensor.is_contiguous, Tensor.data_ptr, Tensor.element_size,
    Tensor.is_floating_point, torch.is_floating_point, torch.numel,
    Tensor.storage_offset, Tensor.__len__, Tensor.get_device,
    *(_getter(name) for name in _FORM),
))  # fmt: skip
_PRODUCTS = (
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
)  # fmt: skip
_TURNS = (
    Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims,
    torch.swapdims, Tensor.t, torch.t,
)  # fmt: skip
_HANDLERS: dict[Any, Function] = {  # Any: as above
    **dict.fromkeys(_PRODUCTS, _matmul),
    **dict.fromkeys(_TURNS, _transpose),
    Tensor.__getitem__: _item,
    Tensor.__rmatmul__: _rmatmul,
    _getter("mT"): _swap,
    _getter("T"): _transpose,
    F.linear: _linear,
    F.grouped_mm: _grouped,
}
if "_grouped_mm" in vars(torch):
    _HANDLERS[vars(torch)["_grouped_mm"]] = _grouped


def multiplies_by_group(func: Function) -> None:
    """Let `func(x, weight, offs)` be known as a product over sorted rows, as `F.grouped_mm` is."""
    _HANDLERS[func] = _grouped
