"""LoRA-GA from Wang, Yu and Li (arXiv 2407.05000), on a chain of linear layers without biases whose
gradients are written out, with plain gradient descent.

    h_i = h_{i−1} W_iᵀ,   L = Σ (h_n − 1)²,   δ_n = 2(h_n − 1),   ∂L/∂W_i = δ_iᵀ h_{i−1},
    δ_{i−1} = δ_i W_i
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradients(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """∂L/∂W_i (out, in) of every layer, for inputs x (n, in)."""
    inputs = [x]
    for W in weights:
        inputs.append(inputs[-1] @ W.T)
    delta, out = 2 * (inputs[-1] - 1), []
    for W, h in zip(reversed(weights), reversed(inputs[:-1]), strict=True):
        out.append(delta.T @ h)
        delta = delta @ W
    return out[::-1]


def mean_gradients(weights: list[Tensor], batches: list[Tensor]) -> list[Tensor]:
    every = [gradients(weights, x) for x in batches]
    return [torch.stack(of_one).mean(0) for of_one in zip(*every, strict=True)]


def start(G: Tensor, r: int, gamma: float = 16) -> tuple[Tensor, Tensor]:
    """(B (out, r), A (r, in)): the left vectors r+1..2r and the right vectors 1..r of G, both times
    ⁴√out/√γ. By the eigenvectors of GᵀG and GGᵀ."""
    c = G.shape[0] ** 0.25 / gamma**0.5
    right = torch.linalg.eigh(G.T @ G).eigenvectors.flip(1)
    U = G @ right[:, : 2 * r]
    U = U / U.norm(dim=0)
    return c * U[:, r:], c * right[:, :r].T


def best(G: Tensor, k: int) -> Tensor:
    """The best approximation of rank k."""
    V = torch.linalg.eigh(G.T @ G).eigenvectors.flip(1)[:, :k]
    return G @ V @ V.T


def signed(pair: tuple[Tensor, Tensor], like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair with the signs of another: an SVD leaves those of each component open, and as A and
    B hold different components, B A depends on them."""
    (B, A), (B_like, A_like) = pair, like
    return B * (B * B_like).sum(0).sign(), A * (A * A_like).sum(1, keepdim=True).sign()


def run(
    weights: list[Tensor], starts: list[Tensor], batches: list[Tensor], *, r: int, s: float,
    lr: float, like: list[tuple[Tensor, Tensor]],
) -> list[list[Tensor]]:  # fmt: skip
    """Effective weights after each step: the factors start from the gradients of `starts`, with the
    signs of `like`, and learn from `batches`, one a step."""
    pairs = [start(G, r) for G in mean_gradients(weights, starts)]
    pairs = [signed(*both) for both in zip(pairs, like, strict=True)]
    frozen = [W - s * B @ A for W, (B, A) in zip(weights, pairs, strict=True)]
    out: list[list[Tensor]] = []
    for x in batches:
        now = [W + s * B @ A for W, (B, A) in zip(frozen, pairs, strict=True)]
        moved = []
        for (B, A), G in zip(pairs, gradients(now, x), strict=True):
            moved.append((B - lr * s * G @ A.T, A - lr * s * B.T @ G))
        pairs = moved
        out.append([W + s * B @ A for W, (B, A) in zip(frozen, pairs, strict=True)])
    return out
