"""Tensor trains: a matrix as a chain of small cores, one for each digit of its row and column
indices.

    cores G_k (r_{k−1}, d_k, r_k), r_0 = r_D = 1;  T[j_1 .. j_D] = G_1[:, j_1, :]·…·G_D[:, j_D, :]

The first p digits are the index of an input, i = (j_p, …, j_1) with j_1 fastest, the others that
of an output, o = (j_{p+1}, …, j_D) with j_D fastest, both row-major: the authors' contraction.
Cutting the train between them makes T a product of two factors, A (r, in) and B (out, r).

Their earlier code reshapes T straight to (out, in): the leading q digits are those of an output,
o = (j_1, …, j_q), the others those of an input, i = (j_{q+1}, …, j_D), the last one fastest in
both. The train read from its other end (`turned`) has the inputs' digits first, and only the
outputs' digits are in the reverse order (`reordered`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.tensors.dtensor_ops import copy_, draw
from lorica.tensors.linalg import vector_norm

Cores = Sequence[Tensor]


def split(shape: Sequence[int], features: int, out: int) -> int | None:
    """How many leading modes multiply to `features`, the rest to `out`; None where none do."""
    for p in range(1, len(shape)):
        if math.prod(shape[:p]) == features and math.prod(shape[p:]) == out:
            return p
    return None


def modes(size: int, r: int) -> list[int]:
    """Factors of `size`, largest first, whose cores have the fewest entries at rank r.

    The outer core has d·r entries and every other d·r², so the outer mode is large, and the others
    are prime, except for 4, which costs as much as 2·2 and saves a core.
    """
    primes = _primes(size)
    outer = {1}
    for prime in primes:
        outer |= {d * prime for d in outer}
    choices = [[d, *_small(_primes(size // d))] for d in sorted(outer)]
    best = min(choices, key=lambda c: (c[0] * r + sum(c[1:]) * r * r, len(c)))
    return sorted(best, reverse=True)


def _primes(size: int) -> list[int]:
    out: list[int] = []
    prime = 2
    while prime * prime <= size:
        while size % prime == 0:
            out.append(prime)
            size //= prime
        prime += 1
    return [*out, size] if size > 1 else out


def _small(primes: list[int]) -> list[int]:
    twos = primes.count(2)
    return [p for p in primes if p != 2] + [4] * (twos // 2) + [2] * (twos % 2)


def ranks(shape: Sequence[int], r: int) -> list[tuple[int, int, int]]:
    """Shapes of the cores: r between any two, 1 at the ends."""
    bonds = [1, *[r] * (len(shape) - 1), 1]
    return [(bonds[k], d, bonds[k + 1]) for k, d in enumerate(shape)]


def draw_cores(cores: Cores, generator: torch.Generator) -> None:
    """Each uniform, of Frobenius norm 1: ‖T‖ is then about r^(−(D−1)/2)."""
    for core in cores:
        value = draw(core.shape, generator, bound=1.0)
        copy_(core, (value / vector_norm(value)).to(core.device))


# -- the other index map


def turned(cores: Cores) -> list[Tensor]:
    """The same train, read from its other end."""
    return [core.permute(2, 1, 0) for core in reversed(cores)]


def reordered(X: Tensor, digits: Sequence[int]) -> Tensor:
    """X (n, out) whose columns count outputs by these digits, the last one fastest -> counted with
    the first one fastest."""
    axes = range(len(digits), 0, -1)
    return X.view(len(X), *digits).permute(0, *axes).flatten(1)


# -- two orders of one product ---------------------------------------------------------------------


# Only products of two matrices: torch folds larger ones differently with and without a gradient,
# and the same cores, frozen and trained, must give the same bits.


def factors(cores: Cores, p: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with T = B·A: each side multiplied out from its end, where the bond
    is 1."""
    inputs = [core.permute(2, 1, 0) for core in cores[:p]]
    return _multiplied_out(inputs), _multiplied_out([*reversed(cores[p:])]).T


def _multiplied_out(cores: Cores) -> Tensor:
    """(r, d_1·d_2·…), the first mode fastest, of cores (r_k, d_k, r_{k−1}) from the end on."""
    out = cores[0][..., 0]
    for core in cores[1:]:
        out = (core.flatten(0, 1) @ out).view(len(core), -1)  # (r_k·d_k, size so far)
    return out


def through(x: Tensor, cores: Cores, p: int) -> Tensor:
    """(tokens, in) -> (tokens, out): x Tᵀ, one core after the other, in x's dtype. Rows of h are
    tokens times the input digits not yet summed, or the output digits already there."""
    h = x
    for core in cores[:p]:
        matrix = core.to(x.dtype).transpose(0, 1).flatten(0, 1)  # (d_k·r_{k−1}, r_k)
        h = h.reshape(-1, len(matrix)) @ matrix
    for core in cores[p:]:
        h = (h @ core.to(x.dtype).flatten(1)).view(-1, core.shape[2])
    return h.view(len(x), math.prod(core.shape[1] for core in cores[p:]))


def multiplies(cores: Cores, p: int) -> tuple[int, int, int]:
    """Multiplies of the two orders: of `factors` once, then of each token with these factors, and
    of a token `through` the cores."""
    shapes = [tuple(core.shape) for core in cores]
    once, each, way = 0, 0, 0
    for side in (shapes[:p], [(c, d, b) for b, d, c in reversed(shapes[p:])]):
        size = 1
        left = math.prod(d for _, d, _ in side)
        each += left * side[-1][2]
        for k, (bond, d, after) in enumerate(side):
            size *= d
            once += size * bond * after if k else 0
            way += left * bond * after
            left //= d
    return once, each, way
