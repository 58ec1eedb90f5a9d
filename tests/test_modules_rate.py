"""What trains in full beside the targets may learn at a rate of its own."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

import lorica
from lorica.run import Trainer
from models import LENGTH, VOCAB, bert, llama

SAVED = {"modules_to_save": ["lm_head", "embed_tokens"]}
REST = {"train_rest": True}
CASES = [
    ("lora", SAVED), ("dora+loraplus", SAVED), ("riemannian", SAVED), ("lorarite", SAVED),
    ("full", {}), ("galore", {"r": 4}), ("switchlora", {**REST, "r": 4}),
    ("relora+dora", {**REST, "r": 4}),
]  # fmt: skip


def attached(method: str, fields: dict):
    return lorica.attach(llama(), method, verbose=False, **fields)


@pytest.mark.parametrize(("method", "fields"), CASES, ids=[m for m, _ in CASES])
def test_modules_learn_at_their_rate_and_nothing_else_does(method, fields):
    adapters = attached(method, fields)
    plain = lorica.optimizer(adapters, 1e-3, weight_decay=0.1, total_steps=40).param_groups
    adapters = attached(method, fields)
    own = lorica.optimizer(adapters, 1e-3, weight_decay=0.1, modules_lr=7e-3, total_steps=40)

    names = {id(t.parameter): t.name for t in adapters.trained()}
    modules = {t.name for t in adapters.trained() if t.role == "module"}
    now = {names[id(p)]: g for g in own.param_groups for p in g["params"]}
    order = [t.parameter for t in attached(method, fields).trained()]
    assert len(now) == len(order) == sum(len(g["params"]) for g in own.param_groups)
    assert any("lm_head" in name for name in modules)
    assert any("embed_tokens" in name for name in modules)
    assert not any("_proj" in name for name in modules)
    assert {name for name, g in now.items() if g["lr"] == 7e-3} == modules
    rates = sorted({g["lr"] for g in plain} | {7e-3})
    assert sorted({g["lr"] for g in own.param_groups}) == rates
    decayed = sum(p.numel() for g in plain for p in g["params"] if g["weight_decay"])
    assert decayed == sum(
        p.numel() for g in own.param_groups for p in g["params"] if g["weight_decay"]
    )


def test_a_heads_bias_goes_with_its_weight():
    adapters = lorica.attach(bert(), "lora", r=2, modules_to_save=["classifier"], verbose=False)
    heads = [t for t in adapters.trained() if t.role == "module"]
    assert any(t.name.endswith(".bias") for t in heads)
    groups = lorica.optimizer(adapters, 1e-3, modules_lr=1e-2).param_groups
    fast = {id(p) for g in groups if g["lr"] == 1e-2 for p in g["params"]}
    assert fast == {id(t.parameter) for t in heads}


def test_the_first_step_moves_them_further_by_the_ratio():
    """Adam's first step is the rate times the gradient's sign."""
    adapters = attached("lora", SAVED)
    optimizer = lorica.optimizer(adapters, lr=1e-3, modules_lr=5e-3, eps=1e-30)
    before = {t.name: t.parameter.detach().clone() for t in adapters.trained()}
    for t in adapters.trained():
        t.parameter.grad = torch.full_like(t.parameter, -0.2)
    optimizer.step()
    for t in adapters.trained():
        step = 5e-3 if t.role == "module" else 1e-3
        moved = t.parameter.detach() - before[t.name]
        torch.testing.assert_close(moved, torch.full_like(moved, step), rtol=1e-3, atol=1e-7)


def test_the_same_rate_is_the_same_training():
    ends = []
    for own in (None, 1e-2):
        torch.manual_seed(0)
        adapters = attached("switchlora(interval=12)", {**REST, "r": 4})
        optimizer = lorica.optimizer(adapters, lr=1e-2, modules_lr=own, total_steps=6)
        ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
        for _ in range(6):
            adapters.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(adapters.fingerprint())
    assert ends[0] == ends[1]


def test_a_rate_for_nothing_is_refused(tmp_path):
    adapters = attached("lora", {})
    with pytest.raises(ValueError, match="in full, and none does; name some in `modules_to_save`"):
        lorica.optimizer(adapters, modules_lr=1e-2)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="none does"):
        Trainer(model=adapters.model, args=args, modules_learning_rate=1e-2)


def test_a_scheduler_scales_both_rates_alike(tmp_path):
    from datasets import Dataset

    ids = torch.randint(0, VOCAB, (16, LENGTH)).tolist()
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=5, learning_rate=1e-3,
        lr_scheduler_type="cosine", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=attached("lora", SAVED).model, args=args, modules_learning_rate=4e-3,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )  # fmt: skip
    ratios = []
    trainer.create_optimizer()
    inner = trainer.optimizer
    inner.register_step_pre_hook(
        lambda *_: ratios.append(sorted(g["lr"] for g in inner.param_groups))
    )
    trainer.train()
    assert len(ratios) == 5 and ratios[-1][0] < 1e-3
    assert all(high == pytest.approx(4 * low) for low, high in ratios)
