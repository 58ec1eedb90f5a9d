"""A linear teacher that is a change of rank 24 away from a 64 x 64 layer, and a student with r ="
" 2."""

from __future__ import annotations

from typing import Any

import torch
from _bench import Arm, mean, train
from torch import Tensor, nn

import lorica

D, RANK, STEPS = 64, 24, 1200


def student(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    """{"left": ‖W − W*‖²/‖ΔW*‖², "rise": its mean largest rise in 40 steps after a multiple of
    `every`}; Adam, batches of 64 unless the arm's setting says otherwise."""
    setting: dict[str, Any] = {"batch": 64, "noise": 0.0, "curve": "constant", **arm.setting}
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model: Any = nn.Sequential(nn.Linear(D, D, bias=False))
    model[0].weight.data = normal(D, D) / D**0.5
    left, right = (torch.linalg.qr(normal(D, RANK)).Q for _ in range(2))
    delta = left @ torch.linspace(3, 0.5, RANK).diag() @ right.T
    target = model[0].weight.detach() + delta
    adapters = lorica.attach(
        model, arm.method, **{"r": 2, "lora_alpha": 2, **arm.fields}, seed=seed, verbose=False
    )

    def loss(_: int) -> Tensor:
        x = normal(setting["batch"], D)
        y = x @ target.T + setting["noise"] * normal(setting["batch"], D)
        return nn.functional.mse_loss(model(x), y)

    def left_over() -> float:
        with torch.no_grad():
            weight = adapters.layers["0"].effective()[0]
            return float((weight - target).square().sum() / delta.square().sum())

    every, errors = setting.get("every", STEPS), {}

    def watch(step: int) -> None:
        done = step + 1
        if done >= every and done < STEPS and done % every <= 40 and done % 4 == 0:
            errors.setdefault(done // every, []).append(left_over())

    train(adapters, loss, lr=lr, steps=STEPS, seed=seed, curve=setting["curve"], after=watch)
    rises = [max(after) - after[0] for after in errors.values()]
    return {"left": left_over(), "rise": mean(rises) if rises else 0.0}
