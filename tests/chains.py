"""What the tests of restarting schedules share: layers of doubles that train each on its own, and a
linear teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lorica
from reference import adamw

OUT, IN, R = 6, 5, 2
SIZES = ((IN, OUT), (4, 7), (IN, OUT))  # (in, out) of layers, two of them of one shape


def one(
    method: str, *, steps: int | None = 30, lr: float = 0.02, **fields: Any
) -> tuple[Any, torch.optim.Optimizer]:
    """A single layer of doubles, adapted, and its optimizer."""
    return several(method, ((IN, OUT),), steps=steps, lr=lr, **fields)


def several(
    method: str, sizes: Sequence[tuple[int, int]] = SIZES, *, steps: int | None = 30,
    lr: float = 0.02, **fields: Any,
) -> tuple[Any, torch.optim.Optimizer]:  # fmt: skip
    """Layers of doubles that don't feed each other, adapted, and their optimizer: each trains as if
    it were alone.

    Args:
        sizes: (in, out) of each.
    """
    torch.manual_seed(3)
    layers = (nn.Linear(*size, bias=False, dtype=torch.float64) for size in sizes)
    fields = {"r": R, "lora_alpha": 3, **fields}
    model = nn.Sequential(*layers)
    adapters = lorica.attach(model, method, dtype=torch.float64, verbose=False, **fields)
    return adapters, lorica.optimizer(adapters, lr=lr, total_steps=steps, seed=1)


def gradient(effective: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, target, ∂L/∂W') of a least-squares loss of one layer on the batch of this step."""
    generator = torch.Generator().manual_seed(step)
    out, features = effective.shape
    x = torch.randn(7, features, generator=generator, dtype=torch.float64)
    y = torch.randn(7, out, generator=generator, dtype=torch.float64)
    return x, y, 2 * (x @ effective.T - y).T @ x / y.numel()


def move(adapters: Any, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One optimizer step on the sum of the layers' losses."""
    losses = []
    for _, layer in adapters:
        x, y, _ = gradient(torch.zeros_like(layer.store.weight()), step)
        losses.append(nn.functional.mse_loss(layer(x), y))
    loss = torch.stack(losses).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_trains_as(
    method: str, weight: Callable[[dict[str, Tensor], Tensor], Tensor], steps: int = 8,
    **fields: Any,
) -> None:  # fmt: skip
    """Several layers, trained by AdamW, stay where the twin's equations are after every step.

    Args:
        weight: the twin's ΔW (out, in), of a layer's trained parameters by name and of W.
    """
    adapters, optimizer = several(method, steps=steps, lr=0.02, **fields)
    own = {
        n: {k: p for k, p in layer.update.delta.named_parameters() if p.requires_grad}
        for n, layer in adapters
    }
    twins = {n: {k: p.detach().clone() for k, p in of.items()} for n, of in own.items()}
    states: Any = {n: {k: {} for k in of} for n, of in own.items()}
    for u in range(steps):
        for name, layer in adapters:
            W, state = layer.store.weight().detach(), states[name]
            leaves = {k: v.clone().requires_grad_() for k, v in twins[name].items()}
            effective = W + weight(leaves, W)
            G = gradient(effective.detach(), u)[2]
            grads = torch.autograd.grad(effective, [*leaves.values()], G)
            for (k, v), g in zip(leaves.items(), grads, strict=True):
                twins[name][k] = adamw.step(v.detach(), g, state[k], lr=0.02)
        move(adapters, optimizer, u)
        for name, of in own.items():
            for k, p in of.items():
                torch.testing.assert_close(p.detach(), twins[name][k], rtol=1e-7, atol=1e-10)


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
