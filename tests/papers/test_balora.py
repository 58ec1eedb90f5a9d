"""BA-LoRA: three penalties on the logits, over PiSSA's start."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import lorica
from lorica import Recipe
from lorica.methods.objectives.balora import output_penalties
from lorica.methods.objectives.balora.balora import Balora
from lorica.methods.objectives.base import Context
from lorica.run import Trainer
from models import (
    LENGTH,
    MODELS,
    VOCAB,
    batch,
    bert,
    bert_masked,
    gpt2,
    llama,
    perturb,
    t5,
    train,
)  # fmt: skip
from reference import balora as twin

CONSTANT = "schedules.balora(floor=1, wait=0, ramp=0)"
SHIFTED = {"llama": True, "gpt2": True, "qwen2": True, "bert_masked": False}


def random(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def begin(method: str, model: Any = None, *, steps: int = 8, lr: float = 1e-2, **fields: Any):
    model = (llama(num_hidden_layers=1) if model is None else model).double().train()
    fields = {"r": 4, "dtype": torch.float64, "verbose": False, **fields}
    adapters = lorica.attach(model, method, **fields)
    return adapters, lorica.optimizer(adapters, lr=lr, total_steps=steps, seed=1)


def penalty(z: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What the objective adds for these logits (N, D), without a teacher; constant weights."""
    only: Any = {"cr": 0, "dr": 0, "svdr": 0, **arguments}
    handle: Any = SimpleNamespace(recipe=Recipe.parse("lora"), model=nn.Identity())
    labels = torch.zeros(z.shape[:-1], dtype=torch.long)
    context = Context({"logits": z}, {"labels": labels}, handle)
    return Balora(**only).loss(z.new_zeros(()), context)


# -- the terms -------------------------------------------------------------------------------------


def test_by_hand():
    """Two rows, or two classes, and the numbers that a pencil gives."""
    z = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert penalty(z, svdr=1, form="nlu", k=1).item() == pytest.approx(-3 / 4)
    assert penalty(z, svdr=1, form="nlg", k=1).item() == pytest.approx(-3 / math.sqrt(10))
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # C = [[2, 2], [2, 2]]
    assert penalty(z, dr=1, form="nlu").item() == pytest.approx((4 + 4) / 2)
    assert penalty(z, dr=1, form="nlg", top_k=2).item() == pytest.approx(-math.log(2))
    z = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)  # softmax(z/2) = (3/4, 1/4)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(output_penalties.divergence(z, torch.zeros_like(z), 2.0)) == pytest.approx(4 * kl)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_each_term_is_the_twins(shape):
    z, teacher = random(*shape), random(*shape, seed=1)
    for t in (0.5, 2.0):
        torch.testing.assert_close(
            output_penalties.divergence(z, teacher, t), twin.cr(z, teacher, t)
        )
    cases: list[tuple[str, str, dict[str, Any], torch.Tensor]] = [
        ("dr", "nlu", {}, twin.dr_nlu(z)),
        ("dr", "nlg", {"top_k": 2}, twin.dr_nlg(z, 2)),
        ("dr", "nlg", {}, twin.dr_nlg(z, 20)),
        ("svdr", "nlu", {"k": 2}, twin.svdr_nlu(z, 2)),
        ("svdr", "nlu", {}, twin.svdr_nlu(z, min(shape) - 1)),
        ("svdr", "nlg", {"k": 2}, twin.svdr_nlg(z, 2)),
        ("svdr", "nlg", {}, twin.svdr_nlg(z, 10)),
    ]
    for term, form, arguments, expected in cases:
        made = penalty(z, form=form, **{term: 0.7}, **arguments)
        torch.testing.assert_close(made, 0.7 * expected)


@pytest.mark.parametrize("form", ["nlu", "nlg"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_of_the_spectrum_is_the_closed_form(form, k):
    z = random(6, 5).requires_grad_()
    penalty(z, svdr=1, form=form, k=k).backward()
    closed = (twin.gradient_nlu if form == "nlu" else twin.gradient_nlg)(z.detach(), k)
    assert z.grad is not None and float((z.grad - closed).abs().max()) < 1e-14
    # Equal singular values spoil no gradient, as long as the k-th is none of them.
    same = torch.diag(torch.tensor([3.0, 2, 1, 1, 1])).double().requires_grad_()
    penalty(same, svdr=1, form=form, k=2).backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_bounds_and_what_changes_nothing():
    for n, d, k in ((6, 5, 2), (3, 8, 1)):
        z = random(n, d)
        value = float(penalty(z, svdr=1, form="nlu", k=k))
        assert -1 <= value <= -k / min(n, d)
        assert float(penalty(30 * z, svdr=1, form="nlu", k=k)) == pytest.approx(value)
        low = random(n, k) @ random(k, d, seed=2)
        assert float(penalty(low, svdr=1, form="nlu", k=k)) == pytest.approx(-1)
        value = float(penalty(z, svdr=1, form="nlg", k=k))
        assert -math.sqrt(k) <= value < 0
        assert float(penalty(30 * z, svdr=1, form="nlg", k=k)) == pytest.approx(value)
        entropy = -float(penalty(z, dr=1, form="nlg", top_k=4))
        assert 0 < entropy < math.log(4)
        assert -float(penalty(z + 7, dr=1, form="nlg", top_k=4)) == pytest.approx(entropy)
        assert float(output_penalties.divergence(z, z + 7, 2.0)) == pytest.approx(0, abs=1e-14)
    apart = torch.linalg.qr(random(6, 3) - random(6, 3).mean(0)).Q
    apart = apart - apart.mean(0)
    assert float(penalty(apart + 5, dr=1, form="nlu")) == pytest.approx(0, abs=1e-20)
    assert float(penalty(random(1, 3), dr=1, form="nlu")) == 0, "one row has no covariance"


def test_a_wide_matrix_is_sketched():
    """Above 4096 columns: near the exact values and gradient, the same each time, and no draw of
    the global generator."""
    scale = torch.linspace(0, 5, 24, dtype=torch.float64).flip(0).exp()
    wide = random(24, 24) @ torch.diag(scale) @ random(24, 4100, seed=1)
    before, gradients = torch.get_rng_state(), []
    for _ in range(2):
        z = wide.clone().requires_grad_()
        value = penalty(z, svdr=1, form="nlg", k=4)
        value.backward()
        gradients.append(z.grad)
        exact = twin.svdr_nlg(wide, 4)
        assert 0 < abs(float(value.detach() - exact)) < 1e-4 * abs(float(exact))
    assert torch.equal(*gradients) and torch.equal(before, torch.get_rng_state())
    closed = twin.gradient_nlg(wide, 4)
    assert float((gradients[0] - closed).norm() / closed.norm()) < 0.02
    narrow = wide[:, :4096]
    torch.testing.assert_close(
        penalty(narrow, svdr=1, form="nlg", k=4), twin.svdr_nlg(narrow, 4), rtol=1e-12, atol=0
    )


def test_the_form_follows_the_logits():
    z, flat = random(2, 3, 5), random(6, 5)
    assert penalty(flat, dr=1) == penalty(flat, dr=1, form="nlu")
    assert penalty(z, dr=1) == penalty(z, dr=1, form="nlg") != penalty(z, dr=1, form="nlu")


def test_half_precision_is_computed_in_float32():
    z = random(6, 5).bfloat16()
    wide = z.float()
    cases: list[tuple[str, dict[str, Any], torch.Tensor]] = [
        ("nlu", {"dr": 1}, twin.dr_nlu(wide)),
        ("nlg", {"dr": 1}, twin.dr_nlg(wide, 20)),
        ("nlu", {"svdr": 1, "k": 2}, twin.svdr_nlu(wide, 2)),
        ("nlg", {"svdr": 1, "k": 2}, twin.svdr_nlg(wide, 2)),
    ]
    for form, arguments, expected in cases:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(penalty(z, form=form, **arguments), expected)


# -- in a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHIFTED, "bert"])
def test_the_loss_is_the_twins(name):
    model = (MODELS | {"bert_masked": bert_masked})[name]()
    adapters, _ = begin(f"balora(cr=0.3, dr=0.2, svdr=0.1)+{CONSTANT}", model)
    perturb(adapters)
    inputs = batch(model, size=4)
    if name != "bert":
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][0, :3] = inputs["labels"][1, 4] = -100
    outputs = model(**inputs)
    with torch.no_grad(), adapters.disabled():
        teacher = model(**inputs).logits
    if name == "bert":
        z, t = outputs.logits, teacher
        terms = twin.cr(z, t, 2), twin.dr_nlu(z), twin.svdr_nlu(z, 2)
    else:
        z, t = (twin.rows(x, inputs["labels"], SHIFTED[name]) for x in (outputs.logits, teacher))
        terms = twin.cr(z, t, 2), twin.dr_nlg(z, 20), twin.svdr_nlg(z, 10)
    expected = sum(w * term for w, term in zip((0.3, 0.2, 0.1), terms, strict=True))
    added = adapters.loss(outputs, inputs, share=0.5) - outputs.loss
    torch.testing.assert_close(added, 0.5 * expected)
    assert all(abs(float(term.detach())) > 1e-3 for term in terms)


def test_an_encoder_decoder_does_not_shift():
    model = t5()
    adapters, _ = begin(f"balora(cr=0, dr=1, svdr=0)+{CONSTANT}", model)
    perturb(adapters)
    inputs = batch(model)
    inputs["labels"][0, 2:] = -100
    outputs = model(**inputs)
    z = twin.rows(outputs.logits, inputs["labels"], False)
    torch.testing.assert_close(adapters.loss(outputs, inputs) - outputs.loss, twin.dr_nlg(z, 20))


def test_several_labels_a_row_count_as_one_row():
    """Yes or no for each class: labels of the logits' shape, none left out."""
    model = bert(problem_type="multi_label_classification")
    adapters, _ = begin(f"balora+{CONSTANT}", model)
    inputs = {**batch(model, size=5), "labels": torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1, 0]]}
    perturb(adapters)
    outputs = model(**inputs)
    with torch.no_grad(), adapters.disabled():
        teacher = model(**inputs).logits
    z = outputs.logits
    expected = 0.15 * twin.cr(z, teacher, 2) + 0.03 * (twin.dr_nlu(z) + twin.svdr_nlu(z, 2))
    torch.testing.assert_close(adapters.loss(outputs, inputs) - outputs.loss, expected)


def test_the_default_weights_are_the_forms():
    for model, weights in ((llama(num_hidden_layers=1), "cr=0.025, dr=0.005, svdr=0.005, k=10"),
                           (bert(num_labels=7), "cr=0.15, dr=0.03, svdr=0.03, k=5")):  # fmt: skip
        losses = []
        for method in ("balora", f"balora({weights})"):
            adapters, _ = begin(f"{method}+{CONSTANT}", model)
            perturb(adapters)
            inputs = batch(model, size=8)
            losses.append(float(adapters.loss(model(**inputs), inputs).detach()))
            model = lorica.detach(model)
        assert losses[0] == losses[1]


def test_nothing_pulls_at_the_start():
    """L_CR = 0 with zero gradient: the start is the original model."""
    gradients = []
    for weight in (0, 1e3):
        adapters, _ = begin(f"balora(cr={weight}, dr=0, svdr=0)")
        inputs = batch(adapters.model)
        outputs = adapters.model(**inputs)
        loss = adapters.loss(outputs, inputs)
        assert abs(float((loss - outputs.loss).detach())) < 1e-9
        loss.backward()
        moved: list[Any] = [t.parameter.grad for t in adapters.trained()]
        gradients.append(torch.cat([g.flatten() for g in moved]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_packed_rows_count_as_rows_of_their_own():
    """Attention apart by position ids, and no label at a start: the terms are sums over rows."""
    values = []
    for packed in (True, False):
        model = llama(num_hidden_layers=1)
        model.config.use_cache = False
        adapters, _ = begin(f"balora(cr=1, dr=1, svdr=1)+{CONSTANT}", model)
        perturb(adapters)
        ids = batch(model, length=5)["input_ids"]
        labels = ids.clone()
        labels[:, 0] = -100
        inputs = {"input_ids": ids, "labels": labels}
        if packed:
            inputs = {k: v.reshape(1, -1) for k, v in inputs.items()}
            inputs["position_ids"] = torch.arange(5).repeat(1, 2)
        outputs = model(**inputs)
        values.append(adapters.loss(outputs, inputs) - outputs.loss)
    torch.testing.assert_close(*values)


def test_micro_batches_weigh_by_their_labels():
    """A penalty that is a mean over rows enters an update once, however it is cut."""
    adapters, _ = begin(f"balora(cr=1, dr=1, svdr=0)+{CONSTANT}")
    perturb(adapters)
    model, inputs = adapters.model, batch(adapters.model, size=4)
    labels = inputs["labels"] = inputs["labels"].clone()
    labels[0, :5], labels[3] = -100, -100  # the last row has none
    outputs = model(**inputs)
    whole = adapters.loss(outputs, inputs) - outputs.loss
    total = (labels[:, 1:] != -100).sum()
    parts = torch.zeros_like(whole)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part = {k: v[rows] for k, v in inputs.items()}
        outputs = {"logits": model(input_ids=part["input_ids"]).logits, "loss": whole.detach()}
        share = float((part["labels"][:, 1:] != -100).sum() / total)
        parts = parts + adapters.loss(outputs, part, share=share) - outputs["loss"]
    torch.testing.assert_close(parts, whole)


def test_without_weights_it_is_pissa():
    prints = []
    for method in ("pissa", "balora(cr=0, dr=0, svdr=0)"):
        adapters, optimizer = begin(method)
        calls: list[int] = []
        adapters.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        train(adapters, optimizer, 4)
        assert len(calls) == 4, "no teacher is asked"
        prints.append(adapters.fingerprint())
    assert prints[0] == prints[1]


def test_the_second_choice_is_part_of_the_text():
    made = Recipe.parse("balora")
    assert made.text() == "balora" and made.schedules[0].text() == "schedules.balora"
    for text in (f"balora+{CONSTANT}", "balora(cr=0.1)+schedules.balora(wait=0.5)+gaussian"):
        assert Recipe.parse(Recipe.parse(text).text()) == Recipe.parse(text) != made


# -- over the run ----------------------------------------------------------------------------------


def test_the_weights_follow_the_run():
    steps = 20
    adapters, optimizer = begin("balora(cr=0.3, dr=0.2, svdr=0.1)", steps=steps, lr=1e-3)
    model, seen = adapters.model, []
    for step in range(steps):
        inputs = batch(model, seed=step)
        outputs = model(**inputs)
        loss = adapters.loss(outputs, inputs)
        with torch.no_grad(), adapters.disabled():
            teacher = twin.rows(model(**inputs).logits, inputs["labels"], True)
        z = twin.rows(outputs.logits.detach(), inputs["labels"], True)
        falls, comes = twin.factors(step, steps)
        expected = 0.3 * falls * twin.cr(z, teacher, 2)
        expected += comes * (0.2 * twin.dr_nlg(z, 20) + 0.1 * twin.svdr_nlg(z, 10))
        torch.testing.assert_close((loss - outputs.loss).detach(), expected)
        seen.append(comes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == pytest.approx([0] * 5 + [1] * 15)
    (schedule,) = adapters.recipe.schedules
    assert "from step 4, in full from 5 on" in schedule.plan(steps)
    assert [schedule.at(p)[0] for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.55, 0.1])
    assert schedule.at(0.225)[1] == pytest.approx(0.5)


STEPS, ACCUMULATE = 8, 2
METHOD = "balora(cr=0.5, dr=0.5, svdr=0.5)"


def trainer(folder: Path, callbacks: Any = None, method: str = METHOD, **over: Any) -> Trainer:
    model = llama(num_hidden_layers=1)
    lorica.attach(model, method, r=2, verbose=False)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (32, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATE, "learning_rate": 1e-2, "report_to": "none",
        "save_strategy": "no", "seed": 5, "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "optim": "adamw_torch", "lr_scheduler_type": "constant",
    }  # fmt: skip
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Trainer(model=model, args=TrainingArguments(**{**options, **over}), train_dataset=data,
                   eval_dataset=data, callbacks=callbacks)  # fmt: skip


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_trainer_is_the_plain_loop(tmp_path, monkeypatch):
    """Each micro-batch by its share of the update's labels; evaluation has no penalty."""
    run, seen, shares = trainer(tmp_path), [], []
    count = run._share

    def share(inputs: Any, items: Any) -> float:
        seen.append({k: v.clone() for k, v in inputs.items()})
        shares.append(count(inputs, items))
        return shares[-1]

    monkeypatch.setattr(run, "_share", share)
    run.train()
    model = llama(num_hidden_layers=1)
    model.config.use_cache = False
    adapters = lorica.attach(model, METHOD, r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, 1e-2, total_steps=STEPS, seed=5)
    model.train()
    for i in range(0, len(seen), ACCUMULATE):
        assert sum(shares[i : i + ACCUMULATE]) == pytest.approx(1)
        items = sum(int((one["labels"][:, 1:] != -100).sum()) for one in seen[i : i + ACCUMULATE])
        for one, part in zip(seen[i : i + ACCUMULATE], shares[i : i + ACCUMULATE], strict=True):
            outputs = model(**one, num_items_in_batch=torch.tensor(items))
            adapters.loss(outputs, one, share=part).backward()
        torch.nn.utils.clip_grad_norm_([t.parameter for t in adapters.trained()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == STEPS * ACCUMULATE
    assert adapters.fingerprint() == run.adapters.fingerprint()
    monkeypatch.undo()
    plain = trainer(tmp_path, method="pissa")
    plain.adapters.load_state_dict(run.adapters.state_dict())
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("cut", [1, 4])
def test_a_killed_run_is_the_straight_run(cut, tmp_path):
    straight = trainer(tmp_path / "straight")
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": cut}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", [StopAt(cut + 1)], **saving).train()
    resumed = trainer(tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.adapters.fingerprint() == straight.adapters.fingerprint()


# -- what they do ----------------------------------------------------------------------------------


def trained(weights: str, seed: int = 0) -> tuple[float, float, float, float]:
    """(KL to the original model, entropy of the 20 largest, share of the 2 leading singular values
    of the norm, the task's loss) after forty steps on a small task."""
    model = llama(seed, num_hidden_layers=1)
    adapters, optimizer = begin(f"balora({weights})+{CONSTANT}", model, steps=40, lr=5e-3)
    inputs = batch(model, size=8)
    for _ in range(40):
        adapters.loss(model(**inputs), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        other = batch(model, seed=9, size=8)
        z = twin.rows(model(**other).logits, other["labels"], True)
        with adapters.disabled():
            teacher = twin.rows(model(**other).logits, other["labels"], True)
        own = model(**inputs)
    return (
        float(twin.cr(z, teacher, 1)), -float(twin.dr_nlg(z, 20)),
        -float(twin.svdr_nlg(z, 2)), float(own.loss),
    )  # fmt: skip


def test_each_penalty_moves_what_it_names():
    none, near, nearer = (trained(f"cr={c}, dr=0, svdr=0") for c in (0, 0.3, 1))
    assert none[0] > 1.05 * near[0] and near[0] > 1.15 * nearer[0], "the KL falls"
    some, much = (trained(f"cr=0, dr={d}, svdr=0") for d in (0.1, 0.5))
    assert none[1] < some[1] - 0.004 < much[1] - 0.01, "the entropy rises"
    few, fewer = (trained(f"cr=0, dr=0, svdr={s}, k=2") for s in (0.3, 1))
    assert none[2] < few[2] - 0.03 < fewer[2] - 0.1, "the leading part of the spectrum rises"
    assert all(run[3] > none[3] for run in (nearer, much, fewer)), "and the task pays"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("balora(cr=-1)", r"`balora\(cr=-1\)`: a number of at least 0"),
        ("balora(cr=True)", r"`balora\(cr=True\)`: a number"),
        ("balora(k=0)", r"`balora\(k=0\)`: a whole number of at least 1"),
        ("balora(k=2.5)", r"`balora\(k=2.5\)`: a whole number"),
        ("balora(top_k=1)", r"`balora\(top_k=1\)`: a whole number of at least 2"),
        ("balora(temperature=0)", r"`balora\(temperature=0\)`: a number of at least 0.001"),
        ("balora(temperature=None)", r"`balora\(temperature=None\)`: a number"),
        ("balora(form='rows')", "allowed: 'auto', 'nlu', 'nlg'"),
        (
            "balora(cr=0, temperature=3)",
            r"\(temperature=3\)`: it has no effect here: `cr=0`",
        ),
        ("balora(svdr=0, k=3)", r"`balora\(k=3\)`: it has no effect here: `svdr=0`"),
        (
            "balora(form='nlu', top_k=5)",
            r"\(top_k=5\)`: it has no effect here: .*`form='nlg'`",
        ),
        ("balora+schedules.balora(floor=2)", r"`balora\(floor=2\)`: a number in \[0, 1\]"),
        ("balora+schedules.balora(wait=0.9, ramp=0.1)", "together below 1"),
        ("balora+full", "`balora`"),
        ("balora+adalora", "`balora`"),
    ],
)
def test_an_argument_out_of_range_or_without_effect(text, match):
    with pytest.raises(ValueError, match=match):
        Recipe.parse(text)


def test_what_the_batch_cannot_give():
    adapters, _ = begin(f"balora+{CONSTANT}")
    inputs = batch(adapters.model)
    outputs = adapters.model(**inputs)
    for given, match in (
        (({"loss": outputs.loss}, inputs), "the logits, which the model did not return"),
        ((outputs,), r"the labels, .* `adapters.loss\(outputs, batch\)`"),
        ((outputs, {"labels": inputs["labels"][:, 1:]}), "do not match"),
    ):
        with pytest.raises(ValueError, match=match):
            adapters.loss(*given)
    with pytest.raises(ValueError, match="for regression leave the method out"):
        penalty(random(4, 1), dr=1)
    with pytest.raises(ValueError, match="give a `k` below 3"):
        penalty(random(9, 3), svdr=1, k=3)


def test_who_counts_the_steps():
    adapters = lorica.attach(gpt2(n_layer=1), "balora", r=2, verbose=False)
    inputs = batch(adapters.model)
    with pytest.raises(ValueError, match="no optimizer is bound"):
        adapters.loss(adapters.model(**inputs), inputs)
    with pytest.raises(ValueError, match="whose length is not known; give `total_steps`"):
        lorica.optimizer(adapters, lr=1e-3)
    adapters = lorica.attach(gpt2(n_layer=1), f"balora+{CONSTANT}", r=2, verbose=False)
    train(adapters, lorica.optimizer(adapters, lr=1e-3), 1)
    adapters = lorica.attach(gpt2(n_layer=1), "pissa+schedules.balora", r=2, verbose=False)
    with pytest.raises(ValueError, match="no effect without `balora`"):
        lorica.optimizer(adapters, lr=1e-3, total_steps=9)


def test_a_copy_has_the_weights_of_its_moment():
    """They belong to the handle: a copy keeps its own while the original goes on."""
    adapters = lorica.attach(llama(), "balora", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=10)
    train(adapters, optimizer, 3)
    twin_of = lorica.Adapters.of(copy.deepcopy(adapters.model))
    then = dict(adapters.signals)
    inputs = batch(adapters.model)
    with torch.no_grad():
        losses = [a.loss(a.model(**inputs), inputs) for a in (adapters, twin_of)]
    assert torch.equal(*losses)
    train(adapters, optimizer, 1, first=3)
    assert twin_of.signals == then != adapters.signals
