"""MoRA of Jiang et al. (arXiv 2405.12130) from its index formulas, entry by entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference import adamw


def width(features: int, out: int, r: int, kind: int) -> int:
    """r̂: the nearest to √((in + out)·r), for type 6 the even number at or below that."""
    near = int(math.sqrt((features + out) * r) + 0.5)
    return near - near % 2 if kind == 6 else near


def groups(size: int, count: int) -> list[list[int]]:
    """`size` neighbours in `count` groups, the longer ones first."""
    q, out, at = size // count, [], 0
    for p in range(count):
        length = q + 1 if p < size - count * q else q
        out.append(list(range(at, at + length)))
        at += length
    return out


def compression(kind: int, features: int, hat: int) -> Tensor:
    """C (r̂, in)."""
    C = torch.zeros(hat, features, dtype=torch.float64)
    if kind in (1, 4):
        padded = math.ceil(features / hat) * hat
        for j in range(padded):
            C[j % hat, j % features] += 1  # x̃ is x, and then x from its beginning
    else:
        for p, members in enumerate(groups(features, hat)):
            for j in members:
                C[p, j] = 1
    return C


def decompression(kind: int, out: int, hat: int) -> Tensor:
    """D (out, r̂)."""
    D = torch.zeros(out, hat, dtype=torch.float64)
    if kind in (1, 3):
        for i in range(out):
            D[i, i % hat] = 1
    else:
        for p, members in enumerate(groups(out, hat)):
            for i in members:
                D[i, p] = 1
    return D


def rotation(b: int, hat: int) -> Tensor:
    """R_b (r̂, r̂)."""
    R, h = torch.zeros(hat, hat, dtype=torch.float64), hat // 2
    for q in range(h):
        angle = b * 10000 ** (-2 * q / hat)
        R[q, q] = R[q + h, q + h] = math.cos(angle)
        R[q, q + h], R[q + h, q] = -math.sin(angle), math.sin(angle)
    return R


def delta(M: Tensor, kind: int, features: int, out: int, first: int = 0) -> Tensor:
    """ΔW (out, in). `first`: which block of the inputs comes first in type 6 (0: the paper's)."""
    hat = M.shape[0]
    if kind != 6:
        return decompression(kind, out, hat) @ M @ compression(kind, features, hat)
    n = math.ceil(features / hat)
    W = torch.zeros(out, features, dtype=torch.float64)
    for i in range(out):
        j, p = divmod(i % (n * hat), hat)
        b = (j + first) % n
        row = (M @ rotation(b, hat))[p]
        for c in range(hat):
            W[i, (b * hat + c) % features] += row[c]
    return W


class Run:
    """ReMoRA for one weight W (out, in): M trained by Adam, folded and reset, patterns in turn."""

    def __init__(self, W: Tensor, M: Tensor, patterns: list[tuple[int, int]]) -> None:
        """`patterns`: (type, first block) of each link in turn."""
        self.W, self.M, self.patterns, self.links = W.clone(), M.clone(), patterns, 0
        self.adam: dict = {}

    def map(self, M: Tensor) -> Tensor:
        kind, first = self.patterns[self.links % len(self.patterns)]
        return delta(M, kind, self.W.shape[1], self.W.shape[0], first)

    def effective(self) -> Tensor:
        return self.W + self.map(self.M)

    def step(self, G: Tensor, lr: float) -> None:
        """G (out, in): the gradient with respect to the effective weight; ΔW is linear in M, so
        ∂L/∂M_pq = ⟨G, ΔW of the matrix that is 1 at (p, q)⟩."""
        gradient = torch.zeros_like(self.M)
        for p in range(len(self.M)):
            for q in range(len(self.M)):
                unit = torch.zeros_like(self.M)
                unit[p, q] = 1
                gradient[p, q] = (G * self.map(unit)).sum()
        self.M = adamw.step(self.M, gradient, self.adam, lr=lr)

    def restart(self) -> None:
        self.W, self.M, self.adam = self.effective(), torch.zeros_like(self.M), {}
        self.links += 1
