"""The Trainer and a plain loop are the same training, and a resumed run is the straight one."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from merge_often import MergeOften
from transformers import TrainerCallback, TrainingArguments, get_scheduler

import lorica
from lorica import Recipe
from lorica.recipe import registry
from lorica.run import Trainer
from models import LENGTH, VOCAB, llama

STEPS, ACCUMULATE, BATCH = 10, 2, 2
METHODS = ["lora", "dora+olora", "rslora+pissa", "loraplus+lorafa", "full"]


def data(rows: int = 64) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(folder: Path, **over: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE, "learning_rate": 1e-2, "warmup_steps": 2,
        "lr_scheduler_type": "cosine", "report_to": "none", "save_strategy": "no", "seed": 5,
        "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True, "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(**{**options, **over})


def recipe(method: str, **fields: Any) -> Recipe:
    numbers = {"r": 2, "lora_dropout": 0.1}
    plain = Recipe.parse(method)
    if any(choice.only_r for choice in plain.choices):
        del numbers["r"]
    return Recipe.parse(method, **{k: v for k, v in numbers.items() if k in plain.takes}, **fields)


def scheduled(method: str) -> Recipe:
    """With a schedule that writes to the base at every third step."""
    plain = recipe(method)
    fields = {name: getattr(plain, name) for name in ("r", "init", "combine", "scale")}
    return Recipe(**fields, schedules=(MergeOften(every=3),))


def eventful() -> list[str]:
    """Every word with an interval, at two steps; and what else a schedule can do."""
    out = ["relora(every=3, warm_start=3)+dora"]
    out += ["relora(every=3, lr_scheduler_type='jagged_cosine', rewarm=1)+olora"]
    for word in (*registry.names("schedules"), *registry.names("rules")):
        fields = {f.name for f in dataclasses.fields(registry.find(word))}
        found = fields & {"every", "interval", "update_proj_gap", "deltaT"}
        if not Recipe.parse(word).objectives:  # a penalty's share is the Trainer's to know
            out += [f"{word}({name}=2)" for name in found]
    return out


METHODS += eventful()
RECIPES = {m: lambda m=m: recipe(m) for m in METHODS}
RECIPES |= {f"{m}+merges": lambda m=m: scheduled(m) for m in ("lora", "dora+olora")}


def trainer(folder: Path, made: Recipe, callbacks: Any = None, **over: Any) -> Trainer:
    model = llama()
    lorica.attach(model, made, verbose=False)
    return Trainer(
        model=model, args=arguments(folder, **over), train_dataset=data(), callbacks=callbacks
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class StopAt(TrainerCallback):
    """A run that dies after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Batches(TrainerCallback):
    """What the model saw, and the random state it saw it in."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    def watch(self, model: Any) -> None:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            inputs = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
            self.seen.append((inputs, torch.get_rng_state()))

        model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("name", RECIPES)
def test_trainer_is_a_plain_loop(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, RECIPES[name]())
    batches = Batches()
    batches.watch(run.model)
    run.train()

    model = llama()
    adapters = lorica.attach(model, RECIPES[name](), verbose=False)
    optimizer = lorica.optimizer(adapters, 1e-2, total_steps=STEPS, seed=5)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    model.train()
    for i, (inputs, state) in enumerate(batches.seen):
        torch.set_rng_state(state)
        adapters.loss(model(**inputs), inputs).backward()
        if (i + 1) % ACCUMULATE == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert len(batches.seen) == STEPS * ACCUMULATE
    assert equal(weights(model), weights(run.model))


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_is_straight(name: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", RECIPES[name]())
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", RECIPES[name](), [StopAt(7)], **saving).train()
    resumed = trainer(tmp_path / "run", RECIPES[name](), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(straight.model), weights(resumed.model))
    a, b = (t.optimizer.optimizer for t in (straight, resumed))
    for p, q in zip(a.param_groups, b.param_groups, strict=True):
        for left, right in zip(p["params"], q["params"], strict=True):
            assert a.state[left].keys() == b.state[right].keys()
            assert all(torch.equal(a.state[left][k], b.state[right][k]) for k in a.state[left])
    assert a.param_groups[0]["lorica"]["step"] == b.param_groups[0]["lorica"]["step"] == STEPS


def test_resume_with_another_recipe_or_seed_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, recipe("lora"), save_strategy="steps", save_steps=5).train()
    with pytest.raises(ValueError, match="recipe|method"):
        trainer(tmp_path, recipe("dora")).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="seed 5, this run 6"):
        trainer(tmp_path, recipe("lora"), seed=6).train(resume_from_checkpoint=True)


def test_checkpoint_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, recipe("lora"), save_strategy="steps", save_steps=4)

    def die(self: Any, folder: str) -> None:
        raise OSError("the disk is full")

    saved = run._save_rng_state

    def once(folder: str) -> None:
        saved(folder) if run.state.global_step == 4 else die(run, folder)

    monkeypatch.setattr(run, "_save_rng_state", once)
    with pytest.raises(OSError, match="full"):
        run.train()
    complete = [p.name for p in tmp_path.iterdir() if p.name.startswith("checkpoint-")]
    assert complete == ["checkpoint-4"]
    resumed = trainer(tmp_path, recipe("lora"), save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-10", "checkpoint-4", "checkpoint-8",
    ]  # fmt: skip


def test_best_model_is_loaded_and_kept(tmp_path: Path) -> None:
    model = llama()
    adapters = lorica.attach(model, recipe("dora+olora"), verbose=False)
    held: dict[int, str] = {}

    class Record(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held[state.global_step] = adapters.fingerprint()

    run = Trainer(
        model=model,
        args=arguments(
            tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
            save_total_limit=1, learning_rate=0.3,
        ),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=[Record()],
    )  # fmt: skip
    run.train()
    best = run.state.best_global_step
    assert adapters.fingerprint() == held[best]
    assert Path(run.state.best_model_checkpoint or "") == tmp_path / f"checkpoint-{best}"
    kept = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert kept["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_checkpoint_is_an_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, recipe("dora+pissa"), save_strategy="steps", save_steps=10)
    run.train()
    fresh = lorica.load(llama(), tmp_path / "checkpoint-10", verbose=False)
    assert fresh.fingerprint() == run.adapters.fingerprint()
    assert not list(tmp_path.rglob("training_args.bin"))


def test_optim_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adafactor.*adamw"):
        trainer(tmp_path, recipe("lora"), optim="adafactor")


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain = trainer(tmp_path, recipe("lora"))
    plain.train()
    for reentrant in (False, True):
        run = trainer(
            tmp_path, recipe("lora"), activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        run.train()
        for n, p in weights(run.model).items():
            torch.testing.assert_close(p, weights(plain.model)[n], atol=1e-5, rtol=1e-5)


def test_trainer_needs_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters are attached"):
        Trainer(model=llama(), args=arguments(tmp_path), train_dataset=data())


def test_a_deep_copy_trains_by_itself(tmp_path: Path) -> None:
    model = llama()
    lorica.attach(model, recipe("lora"), verbose=False)
    twin = copy.deepcopy(model)
    before = weights(model)
    Trainer(model=twin, args=arguments(tmp_path), train_dataset=data()).train()
    assert equal(before, weights(model)) and not equal(before, weights(twin))


# -- several processes and devices -----------------------------------------------------------------


def test_replicas_of_one_process_are_refused(tmp_path):
    given = arguments(tmp_path)
    given._n_gpu = 2
    model = llama()
    adapters = lorica.attach(model, recipe("lora"), verbose=False)
    with pytest.raises(ValueError, match=r"this one sees 2.*torchrun"):
        Trainer(model=model, args=given, adapters=adapters, train_dataset=data())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", ["relora(every=3, warm_start=3)", "xgblora(every=3)"])
def test_ddp_looks_for_what_rests_also_under_checkpointing(method, tmp_path):
    made = trainer(tmp_path, recipe(method), gradient_checkpointing=True)
    assert made.args.ddp_find_unused_parameters is True
    with pytest.raises(ValueError, match="rest for a while"):
        trainer(tmp_path, recipe(method), ddp_find_unused_parameters=False)


def test_ddp_is_left_alone_where_nothing_rests(tmp_path):
    for method in ("lora", "relora(every=3)"):
        assert trainer(tmp_path, recipe(method)).args.ddp_find_unused_parameters is None


def test_shards_that_could_not_be_resumed_are_refused(tmp_path):
    method = "relora(every=3, warm_start=3)"
    with pytest.raises(ValueError, match=r"no checkpoint of this run could be gone on from"):
        trainer(tmp_path, recipe(method), fsdp="full_shard")
