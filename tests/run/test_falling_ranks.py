"""A budget of ranks and a penalty in the Trainer: the plain loop, and a run that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

import lorica
from lorica.run import Trainer
from models import LENGTH, VOCAB, llama

STEPS, ACCUMULATE = 12, 2
# Maskings follow steps 2, 4, 6 and 8; the pattern is final from 8 on.
METHODS = ["adalora(init_r=4, tinit=1, tfinal=4, deltaT=2)+dora", "sora(threshold=3.0, stages=3)"]


def trainer(folder: Path, method: str, callbacks: Any = None, **over: Any) -> Trainer:
    model = llama(num_hidden_layers=1)
    lorica.attach(model, method, r=2, verbose=False)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (64, LENGTH), generator=generator).tolist()
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATE, "learning_rate": 2e-2, "report_to": "none",
        "save_strategy": "no", "seed": 5, "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "optim": "adamw_torch", "lr_scheduler_type": "constant",
    }  # fmt: skip
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(model=model, args=TrainingArguments(**{**options, **over}), train_dataset=data,
                   callbacks=callbacks)  # fmt: skip


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_is_the_plain_loop(method, tmp_path, monkeypatch):
    """The penalty enters each micro-batch by its share of the update's labels."""
    run, seen, shares = trainer(tmp_path, method), [], []
    count = run._share

    def share(*args: Any) -> float:
        shares.append(count(*args))
        return shares[-1]

    monkeypatch.setattr(run, "_share", share)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append({k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)})

    run.model.register_forward_pre_hook(note, with_kwargs=True)
    run.train()
    model = llama(num_hidden_layers=1)
    adapters = lorica.attach(model, method, r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, 2e-2, total_steps=STEPS, seed=5)
    model.train()
    for i, inputs in enumerate(seen):
        part = shares[i] if shares else 1.0
        assert part == 1 or 0.4 < part < 0.6
        adapters.loss(model(**inputs), inputs, share=part).backward()
        if (i + 1) % ACCUMULATE == 0:
            torch.nn.utils.clip_grad_norm_([t.parameter for t in adapters.trained()], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == STEPS * ACCUMULATE
    assert adapters.fingerprint() == run.adapters.fingerprint()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [5, 10])
def test_a_killed_run_is_the_straight_run(method, cut, tmp_path):
    straight = trainer(tmp_path / "straight", method)
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": cut}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", method, [StopAt(cut + 1)], **saving).train()
    resumed = trainer(tmp_path / "run", method, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.adapters.fingerprint() == straight.adapters.fingerprint()
    dead = [int((p.E == 0).sum()) for _, p in straight.adapters.pairs()]  # type: ignore[operator]
    assert sum(dead) > 0


def test_an_evaluation_knows_no_penalty(tmp_path):
    run = trainer(tmp_path, METHODS[0])
    run.train()
    run.eval_dataset = run.train_dataset.select(range(4))
    reported = run.evaluate()["eval_loss"]
    inputs = {k: torch.tensor(run.eval_dataset[k]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        task = run.model.eval()(**inputs).loss.item()
    assert reported == pytest.approx(task, rel=1e-5)
