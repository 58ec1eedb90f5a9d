"""Rules under the Hugging Face Trainer."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments
from walk import allowed

import lorica
from lorica.recipe import registry
from models import batch, llama

RULES = registry.names("rules")


def beside_dora(method):
    return f"dora+{method}" if allowed(f"dora+{method}") else method


class Batches(Dataset):
    """One example a step; the Trainer's order is switched off below."""

    def __init__(self, model, count):
        self.items = [{k: v[0] for k, v in batch(model, i, 1).items()} for i in range(count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def arguments(folder, **over):
    options = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 1,
        "learning_rate": 1e-2, "weight_decay": 0.1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant", "logging_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**{**options, **over})


def trainer(method, folder, **over):
    from lorica.run import Trainer

    adapters = lorica.attach(llama(num_hidden_layers=1), beside_dora(method), r=4, verbose=False)
    adapters.model.train()
    data = Batches(adapters.model, 4)
    return Trainer(model=adapters.model, args=arguments(folder, **over), train_dataset=data)


@pytest.mark.parametrize("word", RULES)
def test_the_trainer_is_the_plain_loop_bit_for_bit(word, tmp_path):
    made = trainer(word, tmp_path, max_grad_norm=0.0, optim="adamw_torch_fused")
    made.train()
    adapters = lorica.attach(llama(num_hidden_layers=1), beside_dora(word), r=4, verbose=False)
    adapters.model.train()
    options = adapters.recipe.rule.options_from(made.args)
    optimizer = lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1, total_steps=4, **options)
    for item in Batches(adapters.model, 4).items:
        inputs = {k: v[None] for k, v in item.items()}
        adapters.loss(adapters.model(**inputs), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapters.fingerprint() == made.adapters.fingerprint()


@pytest.mark.parametrize("word", RULES)
def test_it_resumes_bit_for_bit(word, tmp_path):
    straight = trainer(word, tmp_path / "a", save_strategy="steps", save_steps=2)
    straight.train()
    resumed = trainer(word, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.adapters.fingerprint() == straight.adapters.fingerprint()


def test_a_rule_that_clips_by_itself_turns_the_trainers_clipping_off(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lorica"):
        assert trainer("lorarite", tmp_path).args.max_grad_norm == 0
    assert "max_grad_norm is 0 instead of 1" in caplog.text
    caplog.clear()
    assert trainer("riemannian", tmp_path).args.max_grad_norm == 1
    assert not caplog.text


def test_the_trainers_arguments_reach_the_rule_or_are_refused(tmp_path):
    made = trainer("riemannian", tmp_path, adam_beta2=0.8).create_optimizer()
    assert all(g["betas"] == (0.9, 0.8) for g in made.param_groups)
    made = trainer("lorarite", tmp_path, adam_beta2=0.8).create_optimizer()
    assert {g["betas"] for g in made.param_groups if g["pair"]} == {(0.9, 0.999)}
    assert {g["betas"] for g in made.param_groups if not g["pair"]} == {(0.9, 0.8)}
    with pytest.raises(ValueError, match="`betas=.*` has no effect with the rule `sgd`"):
        trainer("sgd", tmp_path, adam_beta2=0.8).create_optimizer()
    with pytest.raises(ValueError, match=r"`optim=adafactor` is not the rule.*allowed: "):
        trainer("lorarite", tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match="stand in the method"):
        trainer("sgd", tmp_path, optim="sgd", optim_args="momentum=0.5")
    assert trainer("sgd", tmp_path, optim="sgd").create_optimizer().param_groups[0]["momentum"]


def test_another_rule_than_the_one_asked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`optim=sgd` is not the rule of the recipe"):
        trainer("lorarite", tmp_path, optim="sgd")


def test_nothing_is_trained_under_an_engine_that_flattens_parameters(tmp_path):
    from types import SimpleNamespace

    made = trainer("lorarite", tmp_path)
    args = made.args
    stand_in = type(args).__new__(type(args))
    vars(stand_in).update({**vars(args), "deepspeed": SimpleNamespace()})
    with pytest.raises(ValueError, match="use DDP or FSDP2"):
        made._check_arguments(stand_in)


def test_its_state_is_in_the_contract(tmp_path):
    for word in RULES:
        made = trainer(word, tmp_path)
        made.train()
        state = made.optimizer.optimizer.state if word else None
        size = sum(4 * v.numel() for s in state.values() for v in s.values() if v.numel() > 1)
        assert made.adapters.summary.memory["optimizer"] == size
        assert torch.is_tensor(next(iter(state)))
