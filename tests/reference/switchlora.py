"""SwitchLoRA on plain matrices: pools, ring, counters and optimizer as in the training loop of
arXiv 2406.06564; every counter is kept as it is told there, nothing is derived.
"""

from __future__ import annotations

import torch

from reference import vectoradamw


def init_std(m, n, r, s):
    """(std of A's entries, std of B's) of the start, for the scale s."""
    gain = (1 / 3) ** 0.5
    other = ((1 / r) / s) ** 0.5
    A = (m**0.5 * r / n**1.5) ** 0.25 * gain**0.5
    B = (r / (m * n) ** 0.5) ** 0.25 * gain**0.5
    return A * other, B * other


def expected(t, T, r, *, interval, ratio, kappa):
    """σ_t: exchanges of a layer on either side at the 0-based step t."""
    return r / interval * max(kappa ** ((t + 1) / (ratio * T)), 1e-8)


class Layer:
    """W (m, n), A (r, n), B (m, r), pools of c rows each, and the counters of both sides."""

    def __init__(self, W, A, B, pool_A, pool_B, s):
        self.W, self.A, self.B, self.s = W.clone(), A.clone(), B.clone(), s
        self.pool_A, self.pool_B = pool_A.clone(), pool_B.clone()
        self.r, self.c = A.shape[0], pool_A.shape[0]
        r, c = self.r, self.c
        self.slot_A = [c - r + i for i in range(r)]
        self.slot_B = [c - r + (i - r // 2) % r for i in range(r)]
        self.p_A, self.p_B = 0, r // 2
        self.f_A, self.f_B = [0] * r, [0] * r
        self.moments = {}

    def weight(self):
        return self.W + self.s * self.B @ self.A

    def cap(self, k):
        frozen_A, frozen_B = (sum(f > 0 for f in counter) for counter in (self.f_A, self.f_B))
        way_A = (self.p_A - frozen_A - self.p_B) % self.r
        way_B = (self.p_B - frozen_B - self.p_A) % self.r
        return min(k, way_A, way_B, self.c - self.r)

    def incoming(self, slots, pointer, k, generator):
        if generator is None:
            start = slots[(pointer - 1) % self.r] + 1
            return [(start + j) % self.c for j in range(k)]
        free = [j for j in range(self.c) if j not in slots]
        return [free[j] for j in torch.randperm(len(free), generator=generator)[:k]]

    def swap_a(self, i, j):
        new = self.pool_A[j].clone()
        self.W += self.s * torch.outer(self.B[:, i], self.A[i] - new)
        self.pool_A[self.slot_A[i]] = self.A[i]
        self.A[i] = new
        self.slot_A[i] = j

    def swap_b(self, i, j):
        new = self.pool_B[j].clone()
        self.W += self.s * torch.outer(self.B[:, i] - new, self.A[i])
        self.pool_B[self.slot_B[i]] = self.B[:, i]
        self.B[:, i] = new
        self.slot_B[i] = j


def exchange(layer, k, *, freeze, reset=True, generator=None):
    """Steps a to e of one update; `k` is not yet capped. Returns the positions on either side."""
    k = layer.cap(k)
    r = layer.r
    I_A = [(layer.p_A + j) % r for j in range(k)]
    I_B = [(layer.p_B + j) % r for j in range(k)]
    J_A = layer.incoming(layer.slot_A, layer.p_A, k, generator if k else None)
    J_B = layer.incoming(layer.slot_B, layer.p_B, k, generator if k else None)
    layer.p_A, layer.p_B = (layer.p_A + k) % r, (layer.p_B + k) % r
    for i, j in zip(I_A, J_A, strict=True):
        layer.swap_a(i, j)
        layer.f_B[i] = freeze
        if reset:
            layer.moments["B", i] = {}
    for i, j in zip(I_B, J_B, strict=True):
        layer.swap_b(i, j)
        layer.f_A[i] = freeze
        if reset:
            layer.moments["A", i] = {}
    return I_A, I_B


def hold(layer, g_A, g_B):
    """Step f: gradients of frozen vectors are zero, and their time runs."""
    g_A, g_B = g_A.clone(), g_B.clone()
    for i in range(layer.r):
        if layer.f_A[i] > 0:
            g_A[i] = 0
            layer.f_A[i] -= 1
        if layer.f_B[i] > 0:
            g_B[:, i] = 0
            layer.f_B[i] -= 1
    return g_A, g_B


def step(layers, gradients, t, T, *, interval, ratio, kappa, freeze, lr, generator,
         reset=True, random=False):  # fmt: skip
    """One update of all layers, with clipped gradients of (A, B); returns the counts."""
    uniform = torch.rand(len(layers), generator=generator, dtype=torch.float64).tolist()
    counts = []
    for layer, u in zip(layers, uniform, strict=True):
        sigma = expected(t, T, layer.r, interval=interval, ratio=ratio, kappa=kappa)
        k = int(sigma) + int(u >= 1 - (sigma - int(sigma)))  # Bernoulli of what is left of σ
        I_A, _ = exchange(
            layer, k, freeze=freeze, reset=reset, generator=generator if random else None
        )
        counts.append(len(I_A))
    for layer, (g_A, g_B) in zip(layers, gradients, strict=True):
        g_A, g_B = hold(layer, g_A, g_B)
        layer.A, layer.B = vectoradamw.pair_step(
            layer.A, layer.B, g_A, g_B, layer.moments, lr=lr, decay=0.0
        )
    return counts
