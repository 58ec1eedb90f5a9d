"""Muon (Jordan 2024; Liu et al., arXiv 2502.16982), one matrix after the other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def polynomial(sigma: Tensor, steps: int = 5) -> Tensor:
    """What the iteration makes of singular values."""
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return sigma


def orthogonalised(N: Tensor, steps: int = 5) -> Tensor:
    """U p(Σ/‖Σ‖) Vᵀ, by the singular values; N = 0 stays 0."""
    U, sigma, Vt = torch.linalg.svd(N, full_matrices=False)
    norm = sigma.square().sum().sqrt()
    return U @ torch.diag(polynomial(sigma / max(float(norm), 1e-7), steps)) @ Vt


def adjustment(out: int, features: int, name: str) -> float:
    if name == "original":
        return max(1.0, out / features) ** 0.5
    return 0.2 * max(out, features) ** 0.5


def step(
    W: Tensor, G: Tensor, state: dict[str, Tensor], *, lr: float, momentum: float = 0.95,
    nesterov: bool = True, name: str = "match_rms_adamw", decay: float = 0.0, steps: int = 5,
) -> Tensor:  # fmt: skip
    """The new W (out, in), with the papers' M ← μM + G; `state` starts empty."""
    M = state["M"] = momentum * state.get("M", torch.zeros_like(G)) + G
    N = momentum * M + G if nesterov else M
    size = lr * adjustment(*W.shape, name)
    return (1 - lr * decay) * W - size * orthogonalised(N, steps)
