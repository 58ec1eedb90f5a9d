"""What goes wrong without a word elsewhere is an error here that says what, where and what to do.

Each failure has a test; those of other rooms are named in docs/reliability.md.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import lorica
from lorica.run import Trainer
from models import batch, llama, logits, perturb


def rows(count: int = 16, *, masked: int = 0) -> Dataset:
    """Rows of 7 token ids; of the last `masked` no label counts."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 61, (count, 7), generator=generator)
    labels = ids.clone()
    labels[count - masked :] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def trainer(model: Any, out: Path, data: Dataset | None = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **{**defaults, **options})
    return Trainer(model=model, args=arguments, train_dataset=data or rows())


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.nan


def poisoned(model: Any, path: str, when: list[bool], backward: bool, value: float) -> None:
    """Spoil the output (or its gradient) of a module where `when[0]`."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not when[0]:
            return None
        return Poison.apply(output) if backward else output * value  # type: ignore[return-value]

    model.get_submodule(path).register_forward_hook(hook)


class Switch(TrainerCallback):
    """Turns the fault on before some steps, and keeps what was held then."""

    def __init__(self, first: int, when: list[bool], steps: int) -> None:
        self.first, self.when, self.steps = first, when, steps
        self.held: str | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.when[0] = self.first <= state.global_step < self.first + self.steps
        if self.when[0] and self.held is None:
            self.held = lorica.Adapters.of(kwargs["model"]).fingerprint()


class Rate(TrainerCallback):
    """Another rate for the steps before `until`."""

    def __init__(self, run: Any, rate: float, until: int) -> None:
        self.run, self.rate, self.until = run, rate, until

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = self.rate if state.global_step < self.until else args.learning_rate
        for group in self.run.optimizer.param_groups:
            group["lr"] = rate


def from_step(first: int, when: list[bool], steps: int = 100) -> Switch:
    """The fault is there after `first` steps, for so many."""
    return Switch(first, when, steps)


# -- a loss that is no number ----------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["lora", "lora+lorarite"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_at_its_step(value, optim, tmp_path):
    """It says the step, the first layer of the forward pass, the last good checkpoint."""
    model, when = llama(), [False]
    adapters = lorica.attach(model, optim, r=2, verbose=False)
    poisoned(model, "model.layers.1.mlp.up_proj", when, backward=False, value=value)
    run = trainer(model, tmp_path / "out", save_strategy="steps", save_steps=2)
    fault = from_step(5, when)
    run.add_callback(fault)
    with pytest.raises(ValueError) as caught:
        run.train()
    text = str(caught.value)
    assert "the loss is nan at step 6: training has diverged" in text
    assert "'model.layers.1.mlp.up_proj' is the first whose output is not finite" in text
    assert text.endswith(f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-4'}")
    assert "--learning-rate" in text and "--dtype float32" in text
    assert adapters.fingerprint() == fault.held, "the weights have not moved any more"
    lorica.load(llama(), tmp_path / "out" / "checkpoint-4")


def test_the_layer_with_the_first_gradient_that_is_no_number_is_named(tmp_path):
    """From the loss backwards: what lies nearer to the loss than the fault has a finite one. The
    losses are fine, since such steps are left out; and clipping hides nothing."""
    model, when = llama(), [False]
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    poisoned(model, "model.layers.1.self_attn.o_proj", when, backward=True, value=0)
    run = trainer(model, tmp_path / "out", max_steps=60, save_strategy="steps", save_steps=5)
    fault = from_step(6, when)
    run.add_callback(fault)
    with pytest.raises(ValueError) as caught:
        run.train()
    text = str(caught.value)
    assert "training stops at step 9: 3 steps in a row had to be left out" in text
    first = "not finite from step 7 on, first in 'model.layers.1.self_attn.o_proj' (from the loss"
    assert first in text and "in 11 of 14 layers that train" in text and "`--resume`" in text
    assert "whose output" not in text and "--learning-rate" in text
    assert text.endswith(f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-5'}")
    assert adapters.fingerprint() == fault.held


def test_a_step_that_is_left_out_does_not_stop_a_run_and_is_counted(tmp_path, caplog):
    model, when = llama(), [False]
    lorica.attach(model, "lora", r=2, verbose=False)
    poisoned(model, "model.layers.1.self_attn.o_proj", when, backward=True, value=0)
    run = trainer(model, tmp_path / "out")
    run.add_callback(from_step(5, when, steps=1))
    run.train()
    assert run.state.global_step == 12 and run.steps_left_out() == 1
    assert caplog.text.count("step 6 is left out (1 so far). Gradients are not finite at") == 1


@pytest.mark.parametrize("save_steps", [1, 12])
def test_a_save_does_not_hide_why_training_stops(save_steps, tmp_path, monkeypatch):
    """With a checkpoint at each step and at the last one alone: a rate that makes a weight
    infinite in one step, whose loss and gradients were fine. Such a rate is refused by itself."""
    monkeypatch.setattr("lorica.methods.arguments.MOST", math.inf)
    model = llama()
    lorica.attach(model, "lora+sgd", r=2, verbose=False)
    run = trainer(
        model, tmp_path / "out", max_steps=save_steps, save_strategy="steps",
        save_steps=save_steps, learning_rate=1e38, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    run.add_callback(Rate(run, 0.0, until=save_steps - 1))
    with pytest.raises(ValueError) as caught:
        run.train()
    text = str(caught.value)
    assert f"step {save_steps} has made weights that are not finite" in text
    assert "training has diverged" in text and "--learning-rate" in text
    assert text.endswith("There is no checkpoint before this step")


@pytest.mark.parametrize("last", [False, True])
def test_figures_that_are_read_a_step_later_stop_the_run_too(last, tmp_path, monkeypatch):
    """As on a GPU, where nobody waits for them; the last step's are read before the end."""
    monkeypatch.setattr("lorica.tensors.figures.lags", lambda device: True)
    model, when = llama(), [False]
    lorica.attach(model, "lora", r=2, verbose=False)
    poisoned(model, "model.layers.1.mlp.up_proj", when, backward=False, value=math.nan)
    run = trainer(model, tmp_path / "out", max_steps=6 if last else 12)
    run.add_callback(from_step(5, when))
    with pytest.raises(ValueError, match="the loss is nan at step 6: training has diverged") as e:
        run.train()
    assert "in 14 of 14 layers that train" in str(e.value) and "whose output" not in str(e.value)
    assert run.state.global_step == 6


def test_accumulated_and_half_precision_losses_are_looked_at(tmp_path):
    """Any of the micro-batches; and the filter of the Trainer, which hides such a loss, is none."""
    model, when = llama(), [False]
    lorica.attach(model, "lora", r=2, verbose=False)
    poisoned(model, "lm_head", when, backward=False, value=math.inf)
    run = trainer(model, tmp_path / "out", gradient_accumulation_steps=3, bf16=True)
    assert run.args.logging_nan_inf_filter
    run.add_callback(from_step(2, when))
    with pytest.raises(ValueError, match="at step 3: .*'lm_head' is the first whose output"):
        run.train()


def test_an_evaluation_that_is_no_number_is_an_error(tmp_path):
    model, when = llama(), [False]
    lorica.attach(model, "lora", r=2, verbose=False)
    poisoned(model, "lm_head", when, backward=False, value=math.nan)
    run = trainer(model, tmp_path / "out")
    run.eval_dataset = rows(4)
    assert math.isfinite(run.evaluate()["eval_loss"])
    when[0] = True
    with pytest.raises(ValueError, match="`eval_loss` is nan at step 0: the model gives values"):
        run.evaluate()


def test_the_look_costs_next_to_nothing():
    """Of a step of a model as small as this one, whose cost is all overhead, less than a tenth."""
    import time

    from lorica.run.guard import Guard

    model = llama()
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    guard, inputs = Guard(adapters, Path("none")), {"labels": torch.ones(1, dtype=torch.long)}
    ids = torch.tensor(rows(2)["input_ids"])
    spent: dict[str, list[float]] = {"step": [], "look": []}
    for step in range(30):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        between = time.perf_counter()
        guard.note(loss, inputs)
        guard.look(optimizer, step + 1)
        looked = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        spent["look"].append(looked - between)
        spent["step"].append(time.perf_counter() - began - spent["look"][-1])
    look, whole = (sorted(spent[k])[15] for k in ("look", "step"))
    print(f"look {1e6 * look:.0f} us, step {1e6 * whole:.0f} us")
    assert look < 0.1 * whole


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_whose_labels_are_all_masked_is_named_as_such(accumulate, tmp_path):
    """Not as a divergence: no learning rate helps."""
    model = llama()
    lorica.attach(model, "lora", r=2, verbose=False)
    options = {"gradient_accumulation_steps": accumulate, "train_sampling_strategy": "sequential"}
    run = trainer(model, tmp_path / "out", rows(16, masked=8), **options)
    with pytest.raises(ValueError) as caught:
        run.train()
    step = 8 // (2 * accumulate) + 1
    assert f"at step {step}: a batch has no label to learn from, all of them" in str(caught.value)
    assert "diverged" not in str(caught.value)


def test_data_of_which_every_label_is_masked_is_refused_before_a_model_is_read(tmp_path, capsys):
    from lorica.cli import main

    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}\n' * 3)
    out = tmp_path / "out"
    assert main(["train", "--data", str(data), "--output-dir", str(out)]) != 0
    assert "no token with a label is left within `max_length`" in capsys.readouterr().err
    assert not out.exists()


def test_an_evaluation_without_a_label_is_an_error():
    from lorica.data import prepare
    from lorica.inference.evaluate import evaluate
    from test_generate import SIZE, make_tokenizer

    tokenizer = make_tokenizer()
    made = prepare(
        Dataset.from_list([{"prompt": "a", "completion": "b"}]), tokenizer, max_length=64
    )
    bare = made.dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    made = dataclasses.replace(made, dataset=bare)
    model = llama(vocab_size=SIZE, max_position_embeddings=256)
    with pytest.raises(ValueError, match="no label counts in these rows"):
        evaluate(model, made, tokenizer)


# -- adapters that do nothing ----------------------------------------------------------------------


class Detached(nn.Module):
    """A layer without a gradient, since it runs where none is computed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("steps", [12, 4])
def test_an_adapter_without_gradient_stops_a_run_however_short(steps, tmp_path):
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Detached(mlp.up_proj)
    lorica.attach(model, "lora", r=2, verbose=False)
    with pytest.raises(ValueError) as caught:
        trainer(model, tmp_path / "out", max_steps=steps).train()
    words = f"1 adapter(s) had no gradient in {min(steps, 10)} steps"
    assert words in str(caught.value) and "model.layers.1.mlp.up_proj.inner" in str(caught.value)


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_a_first_step_at_rate_zero_hides_no_adapter_without_gradient(steps):
    """A warm-up begins at rate 0, and without any gradient such a step counts as none."""
    model = llama()
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=steps)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    with pytest.raises(ValueError, match="had no gradient"):
        for _ in range(steps):
            for t in adapters.trained():
                t.parameter.grad = torch.zeros_like(t.parameter)
            model(**batch(model))
            optimizer.step()
            warm.step()


@pytest.mark.parametrize("method", ["lora", "dora", "rslora+lorarite"])
def test_an_adapter_that_changes_no_logit_is_not_measured_nor_merged(method, tmp_path):
    """It was saved before its first step; the same adapter is fine where it still trains."""
    from lorica.data import prepare
    from lorica.formats import merge_to
    from lorica.inference.evaluate import evaluate
    from test_generate import SIZE, make_tokenizer

    tokenizer = make_tokenizer()

    def fresh() -> Any:
        return llama(vocab_size=SIZE, max_position_embeddings=256)

    model = fresh()
    adapters = lorica.attach(model, method, r=2, verbose=False)
    empty = lorica.save(adapters, tmp_path / "empty")
    made = prepare(
        Dataset.from_list([{"prompt": "a", "completion": "b"}]), tokenizer, max_length=64
    )
    base = evaluate(model, made, tokenizer)
    with torch.no_grad():
        for _, pair in adapters.pairs():
            pair.B.add_(0.1)
    trained = lorica.save(adapters, tmp_path / "trained")

    loaded = lorica.load(fresh(), empty, trainable=False)
    with pytest.raises(ValueError, match="changes no logit, so the evaluation would be that of"):
        evaluate(loaded.model, made, tokenizer)
    with loaded.disabled():  # the base itself is wanted
        assert evaluate(loaded.model, made, tokenizer) == base
    with pytest.raises(ValueError, match="changes no logit, so the merged model would be that of"):
        merge_to(loaded, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    again = lorica.load(fresh(), empty)
    assert evaluate(again.model, made, tokenizer) == base
    good = lorica.load(fresh(), trained, trainable=False)
    assert evaluate(good.model, made, tokenizer)["loss"] != base["loss"]
    merge_to(good, tmp_path / "merged")


# -- what was asked for takes place ----------------------------------------------------------------


def test_targets_and_experts_that_cannot_be_adapted_are_errors_and_what_is_left_is_told():
    from transformers import MixtralConfig, MixtralForCausalLM

    def experts() -> Any:
        config = MixtralConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        )  # fmt: skip
        return MixtralForCausalLM(config)

    for names in (["q_proj", "w1"], ["q_proj", "experts"], ["gate_up_proj"]):
        model = experts()
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match="`target_modules`"):
            lorica.attach(model, "lora", r=2, target_modules=names, verbose=False)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    adapters = lorica.attach(experts(), "lora", r=2, verbose=False)
    told, left = adapters.summary.details(), adapters.summary.unadapted
    assert left and all(f"  not adapted  {name} (" in told for name in left)


def test_schedules_that_no_optimizer_carries_stop_its_first_step():
    """AdaLoRA under a plain optimizer would train as LoRA for ever."""
    model = llama()
    adapters = lorica.attach(model, "adalora", r=2, verbose=False)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    plain = torch.optim.AdamW([t.parameter for t in adapters.trained()], lr=1e-3)
    ids = torch.tensor(rows(2)["input_ids"])
    model(input_ids=ids, labels=ids).loss.backward()
    other.step()
    before = adapters.fingerprint()
    with pytest.raises(ValueError) as caught:
        plain.step()
    text = str(caught.value)
    assert "this AdamW trains adapters of" in text and "`adalora` would not act with it" in text
    assert "lorica.optimizer(adapters" in text and "TrainerMixin" in text
    assert adapters.fingerprint() == before
    lorica.training.bind.bind(plain, adapters, total_steps=20)
    plain.step()
    assert plain.param_groups[0]["lorica"]["step"] == 1


@pytest.mark.parametrize("method", [
    "lorarite", "riemannian", "vectoradamw", "loraplus", "lora+sgd", "galore", "dora+loraplus",
])  # fmt: skip
def test_rules_and_rates_that_a_plain_optimizer_does_not_know_stop_its_first_step(method):
    """Under AdamW they would train as AdamW, and be saved under their own names."""
    model = llama()
    adapters = lorica.attach(model, method, r=2, verbose=False)
    plain = torch.optim.AdamW([t.parameter for t in adapters.trained()], lr=1e-3)
    ids = torch.tensor(rows(2)["input_ids"])
    model(input_ids=ids, labels=ids).loss.backward()
    before = adapters.fingerprint()
    name = method.split("+")[-1]
    with pytest.raises(ValueError, match=f"`{name}` would not act with it.*lorica.optimizer"):
        plain.step()
    assert adapters.fingerprint() == before
    if "loraplus" not in method:
        with pytest.raises(ValueError, match=f"does not move parameters by `{name}`"):
            lorica.training.bind.bind(plain, adapters, total_steps=20)
    lorica.optimizer(adapters, lr=1e-3, total_steps=20).step()
    assert adapters.fingerprint() != before


def test_a_plain_optimizer_does_where_the_method_asks_for_nothing_else():
    for method in ("lora", "dora+olora", "lora+lorafa"):
        model = llama()
        adapters = lorica.attach(model, method, r=2, verbose=False)
        plain = torch.optim.AdamW([t.parameter for t in adapters.trained()], lr=1e-3)
        ids = torch.tensor(rows(2)["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        plain.step()


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)
def test_processes_with_different_adapters_write_no_checkpoint(tmp_path):
    """One of two moves one number by a millionth after step 3; no loss would show it."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        *("--nproc-per-node=2", str(Path(__file__).with_name("drifting.py")), str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    said = [tmp_path / f"said.{rank}" for rank in range(2)]
    assert all(file.exists() for file in said), ran.stderr[-3000:]
    for file in said:
        assert "the 2 processes hold different adapters at step 4" in file.read_text()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


# -- merging ---------------------------------------------------------------------------------------


def test_a_merge_that_changes_more_than_rounding_explains_is_not_written(tmp_path, monkeypatch):
    """One adapter of fourteen is forgotten."""
    from lorica.formats import merge_to

    model = llama()
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    perturb(adapters)
    merge = lorica.merge

    def forgetful(model: Any) -> Any:
        layer = adapters.layers["model.layers.0.mlp.up_proj"]
        with torch.no_grad():
            layer.update.delta.pair().B.zero_()
        return merge(model)

    monkeypatch.setattr("lorica.formats.merge.merge", forgetful)
    with pytest.raises(ValueError, match="explains .* would not be the trained one"):
        merge_to(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tied(model: Any) -> Any:
    """A merge that forgets to say in the configuration that the head is untied."""
    merged = lorica.merge(model)
    merged.config.tie_word_embeddings = True
    return merged


@pytest.mark.parametrize("form", ["target_modules", "modules_to_save"])
def test_a_trained_head_that_would_be_tied_again_is_not_written(form, tmp_path, monkeypatch):
    from lorica.formats import merge_to

    def adapted() -> Any:
        model = llama(tie_word_embeddings=True)
        fields: Any = {form: ["lm_head"]}
        perturb(lorica.attach(model, "lora", r=2, verbose=False, **fields))
        return model

    model = adapted()
    before = logits(model)
    merge_to(model, tmp_path / "good")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "good")), before)
    monkeypatch.setattr("lorica.formats.merge.merge", tied)
    with pytest.raises(ValueError, match="lm_head was trained apart .* tied again"):
        merge_to(adapted(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_the_command_line_says_the_same(verb, tmp_path, capsys):
    """Steps 1 to 4 are fine; the rate then is so high that the loss overflows."""
    from lorica.cli import main

    words = {"train": ["--max-samples", "24"], "pretrain": ["--model-config", "llama-1m"]}[verb]
    words += ["--max-steps", "8", "--per-device-train-batch-size", "2", "--max-length", "32"]
    words += ["--save-steps", "2", "--learning-rate", "1e18", "--max-grad-norm", "0"]
    words += ["--warmup-ratio", "0", "--output-dir", str(tmp_path / "out")]
    assert main([verb, *words]) == 1
    told = capsys.readouterr().err
    assert "the loss is nan at step " in told and "training has diverged" in told
    assert "There is no checkpoint before this step" in told
    assert not (tmp_path / "out" / "result.json").exists()


# -- the page --------------------------------------------------------------------------------------


def test_the_page_names_tests_that_exist_and_figures_that_were_measured():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    files = [p for d in ("tests", "benchmarks") for p in (root / d).rglob("*.py")]
    defined = {n for p in files for n in re.findall(r"^def (\w+)", p.read_text("utf-8"), re.M)}
    known = defined | {p.name for p in files}
    cells = [line.split("|")[-2] for line in page.splitlines() if line.startswith("| ")]
    named = [n for cell in cells for n in re.findall(r"`([^`]+)`", cell)]
    assert len(named) > 60
    assert not [n for n in named if n not in known and not (root / n).is_file()]
    quoted = re.findall(r"^> (.+) \[table\]\(\.\./(\S+)\)$", page, re.M)
    assert len(quoted) == page.count("\n> ")
    for words, file in quoted:
        assert words in (root / file).read_text(encoding="utf-8"), file
