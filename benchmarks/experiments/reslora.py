"""ResLoRA: shortcuts between the adapters of consecutive layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from _bench import Arm, Column, Effect, Seen, mean, train
from _language import batch, loss, pretrained, shifted

import lorica
from lorica.methods.deltas.reslora import approximated

PAPER = (
    "shortcuts let gradients reach early adapters, so the loss falls faster than LoRA's with the"
    " same parameters; merging loses a part of the gain where a shortcut passes inputs on."
)
SETTING = (
    "A Llama of 6 layers, 64 wide, moves from one Markov chain to a mixture of it with another in"
    " 50 steps of 8 sentences; r = 2 on queries and values."
)
RATES = (1e-2, 3e-2, 6e-2)
ARMS = {
    "LoRA": Arm("lora", RATES),
    "block, P = 2": Arm("reslora(pre_num=2)", RATES),
    "middle, P = 2": Arm("reslora(shortcut='middle', pre_num=2)", RATES),
    "input": Arm("reslora(shortcut='input')", RATES),
}
COLUMNS = {
    "end": Column("loss at the end", "low"),
    "early": Column("mean training loss of the first 30 steps", "low"),
    "merged": Column("lost by merging"),
    "gradient": Column("first gradient of B, first two layers"),
}
CHOICE, SEEDS, LAYERS = "end", 3, 6


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    model = pretrained(seed, layers=LAYERS, steps=120)
    new, generator = shifted(seed), torch.Generator().manual_seed(77 + seed)
    adapters = lorica.attach(
        model, arm.method, r=2, target_modules=["q_proj", "v_proj"], fresh=(), seed=seed,
        verbose=False,
    )  # fmt: skip
    norms: list[float] = []

    def forward(step: int) -> torch.Tensor:
        if step == 0:  # B gets the first gradient, since it is 0
            model(**batch(new, torch.Generator().manual_seed(5), 32)).loss.backward()
            own = [t.parameter for t in adapters.trained() if t.role == "B"]
            norms.extend(float(p.grad.square().sum()) for p in own[:4] if p.grad is not None)
            model.zero_grad()
        return model(**batch(new, generator, 8)).loss

    losses = train(adapters, forward, lr=lr, steps=50, seed=seed)
    end = loss(model, new)
    if "shortcut" in arm.method:
        batches = [batch(new, generator) for _ in range(4)]
        with approximated(lorica.Adapters.of(model), batches):
            lorica.merge(model)
    else:
        lorica.merge(model)
    return {
        "end": end, "early": mean(losses[:30]), "merged": loss(model, new) - end,
        "gradient": sum(norms) ** 0.5,
    }  # fmt: skip


def effects(seen: Seen) -> Iterable[Effect]:
    for arm in ("block, P = 2", "middle, P = 2", "input"):
        ours, plain = (seen.at(a, 1e-2, "early") for a in (arm, "LoRA"))
        yield Effect(f"{arm}: the loss falls faster than LoRA's, both at 1e-2",
                     [a < b for a, b in zip(ours, plain, strict=True)])  # fmt: skip
        why = (
            "More terms of the same scale are a longer step; a higher rate gives LoRA as much, and"
            " the two are level within the spread over seeds."
        )
        for column, what in (
            ("early", "the loss falls faster"),
            ("end", "a lower loss at the end"),
        ):
            yield Effect(f"{arm}: {what}, at the best rate of each",
                         seen.below(arm, "LoRA", column), why)  # fmt: skip
    yield Effect("block: larger first gradients in early layers",
                 seen.above("block, P = 2", "LoRA", "gradient"))  # fmt: skip
    yield Effect("block: merging loses nothing",
                 [abs(x) < 1e-4 for x in seen.each("block, P = 2", "merged")])  # fmt: skip
    yield Effect("middle and input: merging loses something",
                 [a > 1e-3 and b > 1e-3 for a, b in zip(
                     seen.each("middle, P = 2", "merged"), seen.each("input", "merged"),
                     strict=True)])  # fmt: skip
