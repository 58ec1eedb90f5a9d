"""DoRA: magnitude and direction apart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, train
from _language import batch, loss, pretrained, shifted, weights

import lorica

PAPER = (
    "full training changes a weight's direction and magnitude in opposite proportion, LoRA in the"
    " same, and DoRA learns as full training does; at equal rank it is better than LoRA (74.7 to"
    " 78.4 on commonsense tasks)."
)
SETTING = (
    "A Llama 64 wide moves from one Markov chain to a mixture of it with another in 80 steps, r ="
    " 8. Correlation of the mean change of direction and that of magnitude over the 14 layers at"
    " the end."
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ARMS = {
    "full": Arm("full", (1e-3, 3e-3, 1e-2), {}),
    "LoRA": Arm("lora", RATES, {"r": 8}),
    "DoRA": Arm("dora", RATES, {"r": 8}),
}
COLUMNS = {
    "loss": Column("loss on the mixture", "low"),
    "sized": Column("ΔM over ‖W‖ x 1000"),
    "correlation": Column("correlation of ΔD and ΔM"),
}
CHOICE, SEEDS = "loss", 3


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    model, new = pretrained(seed), shifted(seed)
    generator = torch.Generator().manual_seed(77 + seed)
    adapters = lorica.attach(model, arm.method, fresh=(), seed=seed, verbose=False, **arm.fields)
    before = weights(adapters)
    train(adapters, lambda _: model(**batch(new, generator)).loss, lr=lr, steps=80, seed=seed)
    points, sizes = [], []
    for name, weight in weights(adapters).items():
        old = before[name]
        turned = 1 - torch.cosine_similarity(weight, old, dim=1).mean()
        longer = (weight.norm(dim=1) - old.norm(dim=1)).abs().mean()
        points.append(torch.stack([turned, longer]))
        sizes.append(longer / old.norm(dim=1).mean())
    correlation = torch.corrcoef(torch.stack(points, 1))[0, 1]
    return {
        "loss": loss(model, new),
        "sized": 1e3 * float(torch.stack(sizes).mean()),
        "correlation": float(correlation),
    }


def effects(seen: Seen) -> Iterable[Effect]:
    why = "It falls from LoRA's towards that of full training, and stays near zero."
    yield Effect("LoRA: ΔD and ΔM correlate positively",
                 [x > 0 for x in seen.each("LoRA", "correlation")])  # fmt: skip
    for arm in ("full", "DoRA"):
        yield Effect(f"{arm}: they correlate negatively",
                     [x < 0 for x in seen.each(arm, "correlation")], why)  # fmt: skip
    pairs = zip(seen.each("DoRA", "correlation"), seen.each("LoRA", "correlation"), strict=True)
    yield Effect("DoRA's correlation is below LoRA's", [a < b for a, b in pairs])
    yield Effect(
        "DoRA: a lower loss than LoRA", seen.below("DoRA", "LoRA", "loss"),
        "At the best rate of each they are level within the spread over seeds.",
    )  # fmt: skip
