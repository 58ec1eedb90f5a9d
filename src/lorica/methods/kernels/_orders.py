"""Which order of products needs the fewest multiplies for the shapes of one call.

With N tokens, m inputs, n outputs, rank k, multiplies in addition to the product with W itself:

    forward    factors  Nk(m + n)               sum  mnk          sum is cheaper from N > mn/(m + n)
    for x      factors  Nkm (+ Nkn for dY B)    sum  mnk
    for A, B   small    2Nk(m + n)              outer  Nmn + 2mnk, which wants a large k

dY B is used for both x and A, so the two parts of backward are chosen together. In half precision,
and where products round float32 to TF32, W + ΔW would lose small updates; under dropout there is no
single weight; a packed one would have to be unpacked beside its own product. No sums are formed
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Order:
    """What is formed: W + ΔW in forward, W + ΔW for the gradient of x, and dYᵀ X for those of A and
    B."""

    forward_sum: bool = False
    input_sum: bool = False
    outer: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one layer.

    Args:
        tokens: N, rows of the input.
        r, frozen_rank: rank of the trained factors, and of the frozen ones.
        dtype, device: of the products, and the device's type.
        exact: whether products of float32 keep float32's precision, see `rounds_float32`.
        packed: W is stored in another form than its values.
        needs_x, needs_w, needs_a, needs_b: whether a gradient of each is needed.
    """

    tokens: int
    in_features: int
    out_features: int
    r: int
    frozen_rank: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    exact: bool = True
    dropping: bool = False
    packed: bool = False
    needs_x: bool = True
    needs_w: bool = False
    needs_a: bool = True
    needs_b: bool = True


def threshold(in_features: int, out_features: int) -> int:
    """Tokens from which on W + ΔW is formed in forward; it doesn't depend on the rank."""
    return in_features * out_features // (in_features + out_features) + 1


def sums_kept(call: Call) -> bool:
    """Whether W + ΔW may be formed."""
    exact = call.dtype is torch.float64 or call.exact
    return call.dtype in WIDE and exact and not call.dropping and not call.packed


def choose(call: Call) -> Order:
    """The order with the fewest multiplies; of equal ones the one that forms less.

    Example:
        >>> from lorica.methods.kernels.base import Call, choose
        >>> choose(Call(tokens=1024, in_features=512, out_features=512, r=16))
        Order(forward_sum=True, input_sum=True, outer=False)
        >>> choose(Call(tokens=64, in_features=512, out_features=512, r=16))
        Order(forward_sum=False, input_sum=False, outer=False)
    """
    sums = sums_kept(call)
    forward = sums and call.tokens >= threshold(call.in_features, call.out_features)
    best, fewest = (False, False), backward_multiplies(call, False, False)
    for pick in ((True, False), (False, True), (True, True)) if sums else ():
        if (total := backward_multiplies(call, *pick)) < fewest:
            best, fewest = pick, total
    return Order(forward, *best)


def forward_multiplies(call: Call, forward_sum: bool) -> int:
    """Multiplies of one forward, the product with W included."""
    N, m, n = call.tokens, call.in_features, call.out_features
    k = call.r + call.frozen_rank
    return N * m * n + (m * n * k if forward_sum else N * k * (m + n))


def backward_multiplies(call: Call, input_sum: bool, outer: bool) -> int:
    """Multiplies of one backward, the product with W included."""
    N, m, n = call.tokens, call.in_features, call.out_features
    r, k = call.r, call.r + call.frozen_rank
    through = call.needs_x and not input_sum
    total = 0
    if call.needs_x:
        total += N * m * n + (m * n * k if input_sum else N * m * k)
    if through or (call.needs_a and not outer):  # dY B
        total += N * n * (k if through else r)
    if call.needs_w:
        total += N * m * n
    if outer:
        total += 0 if call.needs_w or not (call.needs_a or call.needs_b) else N * m * n
        return total + m * n * r * (call.needs_a + call.needs_b)
    total += N * m * r if call.needs_a else 0
    return total + (N * r * (m + n) if call.needs_b else 0)
