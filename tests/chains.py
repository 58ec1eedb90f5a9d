"""What the tests of restarting schedules share: a single layer of doubles, and a linear teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lorica

OUT, IN, R = 6, 5, 2


def one(
    method: str, *, steps: int | None = 30, lr: float = 0.02, **fields: Any
) -> tuple[Any, torch.optim.Optimizer]:
    """A single layer of doubles, adapted, and its optimizer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    fields = {"r": R, "lora_alpha": 3, **fields}
    adapters = lorica.attach(model, method, dtype=torch.float64, verbose=False, **fields)
    return adapters, lorica.optimizer(adapters, lr=lr, total_steps=steps, seed=1)


def gradient(effective: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, target, ∂L/∂W') of a least-squares loss on the batch of this step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, IN, generator=generator, dtype=torch.float64)
    y = torch.randn(7, OUT, generator=generator, dtype=torch.float64)
    return x, y, 2 * (x @ effective.T - y).T @ x / y.numel()


def move(adapters: Any, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One optimizer step on that loss."""
    x, y, _ = gradient(torch.zeros(OUT, IN, dtype=torch.float64), step)
    loss = nn.functional.mse_loss(adapters.model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def effective(adapters: Any, name: str = "0") -> Tensor:
    return adapters.layers[name].effective()[0].detach()


def rank(matrix: Tensor) -> int:
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-9 * values[0]).sum())


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The one schedule's own state."""
    (state,) = optimizer.param_groups[0]["lorica"]["schedules"].values()
    return state


def teacher(
    method: str, *, steps: int = 1200, r: int = 2, lora_alpha: float | None = None,
    cosine: bool = False, batch: int = 64, noise: float = 0.0, seed: int = 0, **fields: Any,
) -> float:  # fmt: skip
    """‖W − W*‖²/‖ΔW*‖² after training on noisy answers of a teacher that is a rank-24 change of
    singular values 3 to 0.5 away (64 x 64, Adam at 5e-3)."""
    d, generator = 64, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model: Any = nn.Sequential(nn.Linear(d, d, bias=False))
    model[0].weight.data = normal(d, d) / d**0.5
    left, right = (torch.linalg.qr(normal(d, 24)).Q for _ in range(2))
    delta = left @ torch.linspace(3, 0.5, 24).diag() @ right.T
    target = model[0].weight.detach() + delta
    adapters = lorica.attach(
        model, method, r=r, lora_alpha=lora_alpha or r, seed=seed, verbose=False, **fields
    )
    optimizer = lorica.optimizer(adapters, lr=5e-3, total_steps=steps, seed=seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = normal(batch, d)
        y = x @ target.T + noise * normal(batch, d)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cosine:
            scheduler.step()
    return float((effective(adapters) - target).square().sum() / delta.square().sum())
