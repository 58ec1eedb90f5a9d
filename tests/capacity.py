"""What the tests of deltas share that trade directions for rank: targets with a flat and a decaying
spectrum, and a linear memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lorica

D = 64


def targets(seed: int = 1) -> dict[str, Tensor]:
    """Wanted changes (64, 64): all singular values 1, a Gaussian's, exp(−i/4)."""
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q for _ in range(2))
    decay = torch.exp(-torch.arange(D, dtype=torch.float64) / 4)
    return {
        "flat": u,
        "gaussian": torch.randn(D, D, dtype=torch.float64),
        "decaying": u * decay @ v,
    }


def best_of_rank(target: Tensor, r: int) -> float:
    """‖T_r‖² of the best approximation of rank r."""
    return float(torch.linalg.svdvals(target)[:r].square().sum())


def recall(method: str, pairs: int, r: int = 2, steps: int = 400, lr: float = 0.05) -> float:
    """Part of `pairs` random vectors that one adapted layer maps to their label, of 64, after
    training."""
    torch.manual_seed(0)
    x, labels = torch.randn(pairs, D), torch.randint(0, D, (pairs,))
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    adapters = lorica.attach(model, method, r=r, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model(x).argmax(1) == labels).float().mean())
