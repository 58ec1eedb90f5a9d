"""PEFT as the oracle: the same weights give the same logits, gradients and training runs.

Where PEFT fails (OLoRA on GPT-2's transposed weight, dropout on an anchored start) the closed form
stands in its place and the test says so.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F

import lorica
from lorica.model.adapters import Adapters
from lorica.tensors import dropout
from models import MODELS, batch, logits, perturb

FLAGS = {  # the words here -> PEFT's flags
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora+rslora": {"use_dora": True, "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "dora+olora": {"use_dora": True, "init_lora_weights": "olora"},
    "dora+pissa+rslora": {
        "use_dora": True, "init_lora_weights": "pissa", "use_rslora": True,
    },
}  # fmt: skip
ANCHORED = [m for m in FLAGS if "olora" in m or "pissa" in m]
EXACT = [m for m in FLAGS if m not in ANCHORED]
WIDE = [(m, d) for m, d in [*((m, torch.float64) for m in EXACT),
                            *((m, torch.float32) for m in ANCHORED)]]  # fmt: skip


@contextlib.contextmanager
def quiet():
    """PEFT sets `fan_in_fan_out` itself and says so, and calls deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(name: str, method: str, dtype: torch.dtype, **fields: Any) -> tuple[Adapters, Any]:
    """The same base under our adapters and under PEFT's, at their own starts."""
    base = MODELS[name]().to(dtype)
    ours = copy.deepcopy(base)
    given = {"r": 4, "lora_alpha": 6, **fields}
    adapters = lorica.attach(ours, method, verbose=False, heads=[], **given)
    given.pop("lora_dropout_on", None)
    targets = sorted({path.rsplit(".", 1)[-1] for path in adapters.layers})
    with quiet():
        config = LoraConfig(
            **{**given, **FLAGS.get(method, {})}, target_modules=targets,
            exclude_modules=[p for p in _not_ours(base, adapters, targets)] or None,
        )  # fmt: skip
        theirs = get_peft_model(base, config).eval()
    return adapters, theirs


def _not_ours(base, adapters: Adapters, targets: list[str]) -> list[str]:
    """`dense` in BERT also names the head's layer, which `all-linear` leaves out."""
    return [
        n for n, _ in base.named_modules()
        if n.rsplit(".", 1)[-1] in targets and n not in adapters.layers
    ]  # fmt: skip


def matched(adapters: Adapters, theirs: Any) -> list[tuple[str, Any, Any]]:
    """(name, our parameter, PEFT's parameter) of all that trains."""
    out = []
    for path, layer in adapters:
        other = theirs.base_model.model.get_submodule(path)
        out.append((f"{path} A", layer.update.delta.A, other.lora_A["default"].weight))
        out.append((f"{path} B", layer.update.delta.B, other.lora_B["default"].weight))
        magnitude = dict(other.lora_magnitude_vector.items())
        if magnitude:
            out.append((f"{path} m", layer.combine.m, magnitude["default"].weight))
    count = sum(p.requires_grad for p in theirs.parameters())
    assert len(out) == count == len(adapters.trained())
    return out


@torch.no_grad()
def align(adapters: Adapters, theirs: Any, size: float = 0.1) -> None:
    """Move ours away from the start and write the same numbers into PEFT's."""
    perturb(adapters, size)
    for _, mine, other in matched(adapters, theirs):
        other.copy_(mine)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    value = 1e-9 if dtype is torch.float64 else 2e-4
    return {"rtol": value, "atol": value}


def works_in_peft(name: str, method: str) -> bool:
    """OLoRA ignores the transposed layout there and fails with a shape error."""
    return not (name == "gpt2" and "olora" in method)


CASES = [(n, m, d) for n in MODELS for m, d in WIDE if works_in_peft(n, m)]


@pytest.mark.parametrize(("name", "method", "dtype"), CASES)
def test_equal_logits_and_gradients(name, method, dtype):
    adapters, theirs = both(name, method, dtype)
    close = tolerance(dtype)
    torch.testing.assert_close(logits(adapters.model), _logits(theirs), **close)
    if method in EXACT:
        align(adapters, theirs)
    else:
        for path, layer in adapters:  # factors may differ in sign, products may not
            other = theirs.base_model.model.get_submodule(path)
            start = other.scaling["default"] * (
                other.lora_B["default"].weight @ other.lora_A["default"].weight
            )
            mine = layer.update.delta.weight(layer.store)
            torch.testing.assert_close(mine.detach(), start.detach(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for _, mine, other in matched(adapters, theirs):
                noise = 0.05 * torch.randn(mine.shape)
                mine.add_(noise)
                other.add_(noise)
    inputs = batch(adapters.model)
    here, there = adapters.model(**inputs), theirs(**inputs)
    torch.testing.assert_close(here.logits, there.logits, **close)
    here.loss.backward()
    there.loss.backward()
    for label, mine, other in matched(adapters, theirs):
        scale = other.grad.abs().max()
        assert scale > 0, label
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, **close, msg=label)


def _logits(theirs: Any) -> torch.Tensor:
    with torch.no_grad():
        return theirs(**batch(theirs.base_model.model)).logits


def test_olora_on_the_transposed_layout_has_its_closed_form():
    """Where PEFT cannot go: W is stored as (in, out), and the start is of Wᵀ."""
    adapters = lorica.attach(MODELS["gpt2"](), "olora", r=4, lora_alpha=6, verbose=False)
    for _, layer in adapters:
        W = layer.base.weight.detach().T
        q, upper = torch.linalg.qr(W)
        start = 6 / 4 * (q[:, :4] @ upper[:4])
        torch.testing.assert_close(
            layer.update.delta.weight(layer.store).detach(), start, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize(("name", "method", "dtype"), [
    *((n, m, torch.float64) for n in MODELS for m in ("lora", "dora+rslora")),
    *(("llama", m, torch.float32) for m in ANCHORED),
    ("qwen2", "pissa", torch.float32), ("gpt2", "pissa", torch.float32),
    ("bert", "olora", torch.float32), ("t5", "olora", torch.float32),
])  # fmt: skip
def test_ten_steps_of_adamw(name, method, dtype, decay):
    adapters, theirs = both(name, method, dtype)
    pairs = matched(adapters, theirs)
    if method in EXACT:
        align(adapters, theirs, size=0.0)
    here = lorica.optimizer(adapters, lr=1e-3, weight_decay=decay)
    there = torch.optim.AdamW(
        [
            {"params": [p for _, _, p in pairs if p.ndim > 1], "weight_decay": decay},
            {"params": [p for _, _, p in pairs if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    before = logits(adapters.model)
    for step in range(10):
        inputs = batch(adapters.model, seed=step)
        for model, optimizer in ((adapters.model, here), (theirs, there)):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = logits(adapters.model)
    size = after.abs().max()
    assert (after - before).abs().max() / size > 1e-3, "something was learnt"
    error = (after - _logits(theirs)).abs().max() / size
    assert error < (1e-9 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_loraplus(decay):
    """On plain LoRA the groups are PEFT's. With a magnitude they differ on purpose: PEFT puts every
    one-dimensional parameter beside B, the theory speaks of B alone."""
    adapters, theirs = both("llama", "lora", torch.float64)
    plus = lorica.attach(
        lorica.detach(adapters.model), "loraplus(loraplus_lr_ratio=8)", r=4, lora_alpha=6,
        verbose=False,
    )  # fmt: skip
    here = lorica.optimizer(plus, lr=1e-3, weight_decay=decay)
    there = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=decay
    )
    with torch.no_grad():
        for _, mine, other in matched(plus, theirs):
            other.copy_(mine)
    rates = {id(p): g["lr"] for g in here.param_groups for p in g["params"]}
    others = {id(p): g["lr"] for g in there.param_groups for p in g["params"]}
    for label, mine, other in matched(plus, theirs):
        assert rates[id(mine)] == others[id(other)], label
    for step in range(10):
        inputs = batch(plus.model, seed=step)
        for model, optimizer in ((plus.model, here), (theirs, there)):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(plus.model), _logits(theirs), rtol=1e-9, atol=1e-9)


class Masks:
    """Dropout with the same mask at the same call, whoever calls."""

    def __init__(self, monkeypatch) -> None:
        self.calls = 0
        monkeypatch.setattr(F, "dropout", self)
        monkeypatch.setattr(dropout, "draw_seed", self.next)
        monkeypatch.setattr(dropout, "_positions", self.gone)

    def next(self) -> int:
        self.calls += 1
        return self.calls

    def gone(self, count: int, p: float, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        return (drawn < p).nonzero().squeeze(1)

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        keep = torch.ones(x.numel(), dtype=x.dtype)
        keep[self.gone(x.numel(), p, self.next())] = 0
        return x * keep.view(x.shape) / (1 - p)


DROPPED = [
    ("lora", "lora", "update", torch.float64),
    ("rslora", "rslora", "update", torch.float64),
    ("dora(dropout='authors')", "dora", "update", torch.float64),
    ("olora", "olora", "delta", torch.float32),
    ("pissa", "pissa", "delta", torch.float32),
    ("pissa+dora(dropout='authors')", "dora+pissa", "delta", torch.float32),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("ours", "peft", "on", "dtype"), DROPPED)
def test_dropout_with_equal_masks(name, ours, peft, on, dtype, monkeypatch):
    """PEFT's placement: on the factors' input alone, and in DoRA on the magnitude's correction."""
    if not works_in_peft(name, peft):
        return
    FLAGS.setdefault("dora+pissa", {"use_dora": True, "init_lora_weights": "pissa"})
    flags = FLAGS[peft]
    monkeypatch.setitem(FLAGS, ours, flags)
    adapters, theirs = both(name, ours, dtype, lora_dropout=0.4, lora_dropout_on=on)
    if peft in EXACT:
        align(adapters, theirs)
    adapters.model.train()
    theirs.train()
    inputs = batch(adapters.model)
    masks = Masks(monkeypatch)
    here = adapters.model(**inputs)
    here.loss.backward()
    used, masks.calls = masks.calls, 0
    there = theirs(**inputs)
    there.loss.backward()
    assert used == masks.calls == len(adapters), "one mask a layer"
    close = tolerance(dtype)
    torch.testing.assert_close(here.logits, there.logits, **close)
    for label, mine, other in matched(adapters, theirs):
        scale = other.grad.abs().max()
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, **close, msg=label)


@pytest.mark.parametrize("method", ["olora", "pissa"])
def test_the_default_placement_is_exact_where_pefts_is_not(method, monkeypatch):
    """PEFT drops inputs of the trained part of an anchored start and not of the frozen one."""
    adapters, theirs = both("llama", method, torch.float32, lora_dropout=0.4)
    expected = logits(MODELS["llama"]())
    Masks(monkeypatch)
    inputs = batch(adapters.model)
    with torch.no_grad():
        here = adapters.model.train()(**inputs).logits
        there = theirs.train()(**inputs).logits
    torch.testing.assert_close(here, expected, rtol=1e-4, atol=1e-4)
    assert (there - expected).abs().max() > 0.1


def test_embedding():
    base = MODELS["llama"]().double()
    ours = copy.deepcopy(base)
    adapters = lorica.attach(
        ours, "lora", r=4, lora_alpha=6, target_modules=["embed_tokens"], verbose=False
    )
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"])
    with quiet():
        theirs = get_peft_model(base, config)
    perturb(adapters)
    layer = adapters.layers["model.embed_tokens"]
    other = theirs.base_model.model.model.embed_tokens
    with torch.no_grad():
        other.lora_embedding_A["default"].copy_(layer.update.delta.A)
        other.lora_embedding_B["default"].copy_(layer.update.delta.B)
    inputs = batch(ours)
    here, there = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(here.logits, there.logits, rtol=1e-10, atol=1e-10)
    here.loss.backward()
    there.loss.backward()
    torch.testing.assert_close(layer.update.delta.A.grad, other.lora_embedding_A["default"].grad)
    torch.testing.assert_close(layer.update.delta.B.grad, other.lora_embedding_B["default"].grad)
