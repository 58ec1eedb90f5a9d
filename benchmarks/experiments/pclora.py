"""PC-LoRA: the frozen weights fade away."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from _bench import Arm, Column, Effect, Seen, train
from torch import nn
from torch.nn import functional as F

import lorica

PAPER = (
    "weights that fade during fine-tuning, with distillation, leave low-rank layers that keep most"
    " of the accuracy (93 to 94 % fewer parameters in ViT-B and BERT, a few points lost)."
)
SETTING = (
    "A network of three hidden layers, 24 wide, sorts points around 18 centres into 6 classes; its"
    " hidden layers are compressed to rank 4 in 400 steps, the weights gone after 60 % of them."
)
WIDTH, CLASSES, RANK, STEPS = 24, 6, 4, 400
RATES = (3e-3, 1e-2, 3e-2)
ARMS = {
    "linear fade": Arm("pclora(alpha=1)", RATES),
    "linear fade, distilled": Arm("pclora", RATES),
    "cosine fade": Arm("pclora(shape='cosine', alpha=1)", RATES),
    "abrupt": Arm("pclora(shape='identity', alpha=1)", RATES),
    "abrupt, distilled": Arm("pclora(shape='identity')", RATES),
    "truncated W, no fade": Arm("fade+pissa", RATES, {}, {"faded": True}),
}
COLUMNS = {"accuracy": Column("accuracy", "high"), "lost": Column("lost of the original's")}
CHOICE, SEEDS = "accuracy", 3


class Perceptron(nn.Module):
    """Three hidden layers that are adapted, and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(
        self, x: torch.Tensor, labels: Any = None, output_hidden_states: bool = False
    ) -> dict[str, Any]:
        states = [x]
        for block in self.blocks:
            states.append(torch.relu(block(states[-1])))
        out: dict[str, Any] = {"logits": self.head(states[-1])}
        if labels is not None:
            out["loss"] = F.cross_entropy(out["logits"], labels)
        return {**out, "hidden_states": tuple(states)} if output_hidden_states else out


def data(seed: int, part: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(3 * CLASSES, WIDTH, generator=torch.Generator().manual_seed(900 + seed))
    generator = torch.Generator().manual_seed(10 * seed + part)
    which = torch.randint(0, 3 * CLASSES, (size,), generator=generator)
    noise = torch.randn(size, WIDTH, generator=generator)
    return centres[which] + 0.8 * noise, which % CLASSES


def accuracy(model: nn.Module, seed: int) -> float:
    x, labels = data(seed, 1, 2000)
    with torch.no_grad():
        return float((model(x)["logits"].argmax(1) == labels).float().mean())


@functools.cache
def teacher(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, (x, labels) = Perceptron(), data(seed, 0, 2000)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        model(x, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def measure(arm: Arm, lr: float, seed: int) -> dict[str, float]:
    model = Perceptron()
    model.load_state_dict(teacher(seed).state_dict())
    adapters = lorica.attach(
        model, arm.method, r=RANK, target_modules=["0", "1", "2"], fresh=(), seed=seed,
        verbose=False,
    )  # fmt: skip
    if arm.setting.get("faded"):
        for _, layer in adapters:
            layer.combine.fade_(0.0)  # type: ignore[attr-defined]
    (x, labels), generator = data(seed, 0, 2000), torch.Generator().manual_seed(seed)

    def loss(_: int) -> tuple[Any, Any]:
        rows = torch.randint(0, len(x), (64,), generator=generator)
        inputs = {"x": x[rows], "labels": labels[rows]}
        return model(**inputs), inputs

    model.train()
    train(adapters, loss, lr=lr, steps=STEPS, seed=seed)
    reached = accuracy(model, seed)
    return {"accuracy": reached, "lost": accuracy(teacher(seed), seed) - reached}


def effects(seen: Seen) -> Iterable[Effect]:
    yield Effect("a gradual fade keeps most of the accuracy: at most 15 points are lost",
                 [lost < 0.15 for lost in seen.each("linear fade", "lost")])  # fmt: skip
    yield Effect("gradual beats abrupt", seen.above("linear fade", "abrupt", "accuracy"))
    yield Effect(
        "distillation helps a gradual fade",
        seen.above("linear fade, distilled", "linear fade", "accuracy"),
        "What it gains or costs is within the spread over seeds.",
    )
    yield Effect("distillation helps an abrupt one",
                 seen.above("abrupt, distilled", "abrupt", "accuracy"),
                 "What it gains or costs is within the spread over seeds.")  # fmt: skip
    yield Effect(
        "distillation makes an abrupt one nearly as good as a gradual one (95 %)",
        seen.above("abrupt, distilled", "linear fade", "accuracy", 0.95),
        "Until the weights go the update is trained beside them, as a correction and no copy of"
        " them; all else has to be learnt in the steps that remain.",
    )
    yield Effect(
        "better than the truncated weights trained as long",
        seen.above("linear fade", "truncated W, no fade", "accuracy", 1.01),
        "A start from the singular values of W with no fade at all is as good, and simpler.",
    )
