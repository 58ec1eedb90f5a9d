"""TT-LoRA of Anjum et al. (arXiv 2408.01008) and its authors' contraction, entry by entry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def entry(cores: Sequence[Tensor], index: Sequence[int]) -> Tensor:
    """T[j_1 .. j_D]."""
    row = torch.ones(1, 1, dtype=cores[0].dtype)
    for core, j in zip(cores, index, strict=True):
        row = row @ core[:, j, :]
    return row[0, 0]


def number(digits: Sequence[int], sizes: Sequence[int]) -> int:
    """Row-major: the last digit is the fastest."""
    out = 0
    for digit, size in zip(digits, sizes, strict=True):
        out = out * size + digit
    return out


def matrix(cores: Sequence[Tensor], p: int) -> Tensor:
    """T (out, in): input (j_p, …, j_1), j_1 fastest; output (j_{p+1}, …, j_D), j_D fastest."""
    shape = [core.shape[1] for core in cores]
    T = torch.zeros(math.prod(shape[p:]), math.prod(shape[:p]), dtype=cores[0].dtype)
    for index in itertools.product(*map(range, shape)):
        i = number(index[:p][::-1], shape[:p][::-1])
        o = number(index[p:], shape[p:])
        T[o, i] = entry(cores, index)
    return T


def reshaped(cores: Sequence[Tensor], q: int) -> Tensor:
    """The authors' earlier code: the train's entries in their order, straight to (out, in), the
    first q modes being the output's."""
    shape = [core.shape[1] for core in cores]
    entries = [entry(cores, index) for index in itertools.product(*map(range, shape))]
    return torch.stack(entries).reshape(math.prod(shape[:q]), math.prod(shape[q:]))


def contraction(x: Tensor, cores: Sequence[Tensor], p: int) -> Tensor:
    """(tokens, in) -> (tokens, out): x as a tensor of axes (m_p, …, m_1) and a rank axis; rank axis
    and last mode meet each input core, then each output core appends its mode."""
    shape = [core.shape[1] for core in cores]
    h = x.reshape(len(x), *shape[:p][::-1], 1)
    for core in cores[:p]:
        h = torch.tensordot(h, core, dims=([h.ndim - 2, h.ndim - 1], [1, 0]))
    for core in cores[p:]:
        h = torch.tensordot(h, core, dims=([h.ndim - 1], [0]))
    return h.reshape(len(x), -1)


def count(shape: Sequence[int], r: int) -> int:
    """Σ r_{k−1}·d_k·r_k."""
    bonds = [1] + [r] * (len(shape) - 1) + [1]
    return sum(bonds[k] * d * bonds[k + 1] for k, d in enumerate(shape))


def decompose(T: Tensor, shape: Sequence[int], p: int, r: int) -> list[Tensor]:
    """TT-SVD of a matrix (out, in), cut to rank r, its cores filled up with zeros to that rank."""
    axes = T.reshape(*shape[p:], *shape[:p][::-1])  # (j_{p+1} .. j_D, j_p .. j_1)
    q = len(shape) - p
    rest = axes.permute(*range(len(shape) - 1, q - 1, -1), *range(q))  # (j_1 .. j_D)
    cores, bond = [], 1
    for d in shape[:-1]:
        u, s, vh = torch.linalg.svd(rest.reshape(bond * d, -1), full_matrices=False)
        kept = min(r, len(s))
        cores.append(u[:, :kept].reshape(bond, d, kept))
        rest, bond = s[:kept, None] * vh[:kept], kept
    cores.append(rest.reshape(bond, shape[-1], 1))
    out = []
    for k, core in enumerate(cores):
        a, d, b = core.shape
        left, right = (1 if k == 0 else r), (1 if k == len(cores) - 1 else r)
        filled = torch.zeros(left, d, right, dtype=T.dtype)
        filled[:a, :, :b] = core
        out.append(filled)
    return out


def choices(size: int) -> list[list[int]]:
    """Every way to write `size` as an ordered product of factors above 1; [1] for 1."""
    if size == 1:
        return [[1]]
    out = [[size]]
    for d in range(2, size):
        if size % d == 0:
            out += [[d, *rest] for rest in choices(size // d)]
    return out
