"""EVA from Paischer et al. (arXiv 2410.07170), on a chain of linear layers without biases, with
plain gradient descent. The principal directions are of all inputs at once, by eigenvectors of their
covariance; with as many components as there are inputs the incremental ones are the same."""

from __future__ import annotations

import torch
from torch import Tensor


def inputs(weights: list[Tensor], batches: list[Tensor]) -> list[Tensor]:
    """X_i (n, in) that each layer reads, of all batches (n, in)."""
    x, out = torch.cat(batches), []
    for W in weights:
        out.append(x)
        x = x @ W.T
    return out


def directions(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(V (in, in) by column, singular values of the centred inputs, explained variance ratios)."""
    centred = X - X.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values = values.flip(0).clamp_min(0)
    return vectors.flip(1), values.sqrt(), values / values.sum()


def ranks(ratios: list[Tensor], r: int, rho: float, most: list[int]) -> list[int]:
    """One rank a layer, and the other L·r − L one by one to the largest ratio that is left."""
    out = [1] * len(ratios)
    caps = [min(round(rho * r), m) for m in most]
    for _ in range(len(ratios) * (r - 1)):
        open_ = [i for i in range(len(ratios)) if out[i] < caps[i]]
        out[max(open_, key=lambda i: float(ratios[i][out[i]]))] += 1
    return out


def run(
    weights: list[Tensor], seen: list[Tensor], batches: list[Tensor], *, r: int, rho: float,
    s: float, lr: float, whiten: bool = False,
) -> list[list[Tensor]]:  # fmt: skip
    """Effective weights after each step from the start that `seen` gives; loss Σ (h_n − 1)²."""
    found = [directions(X) for X in inputs(weights, seen)]
    most = [min(W.shape) for W in weights]
    own = ranks([ratio for *_, ratio in found], r, rho, most)
    A = [V[:, :k].T for (V, *_), k in zip(found, own, strict=True)]
    if whiten:
        A = [a / S[: len(a), None].sqrt() for a, (_, S, _) in zip(A, found, strict=True)]
    B = [W.new_zeros(W.shape[0], k) for W, k in zip(weights, own, strict=True)]
    out: list[list[Tensor]] = []
    for x in batches:
        now = [W + s * b @ a for W, b, a in zip(weights, B, A, strict=True)]
        hidden = [x]
        for W in now:
            hidden.append(hidden[-1] @ W.T)
        delta = 2 * (hidden[-1] - 1)
        for i in reversed(range(len(now))):
            G = delta.T @ hidden[i]
            delta = delta @ now[i]
            A[i], B[i] = A[i] - lr * s * B[i].T @ G, B[i] - lr * s * G @ A[i].T
        out.append([W + s * b @ a for W, b, a in zip(weights, B, A, strict=True)])
    return out
