"""GaLore (arXiv 2403.03507), one matrix after the other, in the authors' order of operations."""

from __future__ import annotations

import torch


def side_of(proj_type, shape):
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def project(G, side, U, V):
    if side == "left":
        return U.T @ G
    if side == "right":
        return G @ V.T
    return U.T @ G @ V.T


def project_back(N, side, U, V):
    if side == "left":
        return U @ N
    if side == "right":
        return N @ V
    return U @ N @ V


def step(
    W, G, state, *, lr, rank, gap, scale=0.25, proj_type="std", betas=(0.9, 0.999), eps=1e-6,
    eps_placement="before", decay=0.0, offset=0,
):  # fmt: skip
    """The new W; `state` starts as an empty dict. With `offset` the refreshes after the first are
    at steps offset, offset + gap, ..."""
    t = state.setdefault("t", 0)
    if t == 0 or (t >= offset and (t - offset) % gap == 0):
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        # Not the authors': each right vector's largest entry is positive, whatever the library.
        signs = torch.stack([v[v.abs().argmax()].sign() for v in V])
        state["U"], state["V"] = (U * signs)[:, :rank], (V * signs[:, None])[:rank]
    side, U, V = side_of(proj_type, W.shape), state["U"], state["V"]
    R = project(G, side, U, V)
    b1, b2 = betas
    M = state["M"] = b1 * state.get("M", torch.zeros_like(R)) + (1 - b1) * R
    S = state["S"] = b2 * state.get("S", torch.zeros_like(R)) + (1 - b2) * R * R
    t = state["t"] = t + 1
    if eps_placement == "before":  # the code
        size = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
        W = W - size * scale * project_back(M / (S.sqrt() + eps), side, U, V)
    else:  # the paper
        N = (M / (1 - b1**t)) / ((S / (1 - b2**t)).sqrt() + eps)
        W = W - lr * scale * project_back(N, side, U, V)
    return W - lr * decay * W


def unprojected_step(W, G, state, *, lr, betas=(0.9, 0.999), eps=1e-6):
    """The new W of what is not projected, in the authors' code: ε before the bias correction."""
    t = state["t"] = state.get("t", 0) + 1
    b1, b2 = betas
    M = state["M"] = b1 * state.get("M", torch.zeros_like(G)) + (1 - b1) * G
    S = state["S"] = b2 * state.get("S", torch.zeros_like(G)) + (1 - b2) * G * G
    return W - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * M / (S.sqrt() + eps)
