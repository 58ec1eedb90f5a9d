"""PC-LoRA: the frozen weights fade, low-rank layers remain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

import lorica
from lorica import Recipe
from lorica.formats import export
from lorica.formats.compressed import compress, load_compressed, pack, unpack
from lorica.methods.objectives.distillation import Distillation, _features
from lorica.methods.schedules.pclora import PcLora
from models import LENGTH, MODELS, VOCAB, batch, bert, llama, logits, masked, perturb, train
from reference import pclora as twin

SHAPES = ("linear", "cosine", "one_minus_sine", "identity")


def one_layer(method="fade", bias=True, **fields: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias, dtype=torch.float64))
    adapters = lorica.attach(model, method, **{"r": 3, "verbose": False, **fields})
    perturb(adapters, 0.7)
    return model, adapters.layers["0"]


def parts(layer):
    pair, b = layer.update.delta.pair(), layer.base.bias
    b = torch.zeros(5, dtype=torch.float64) if b is None else b.detach()
    c = torch.zeros_like(b) if layer.combine.c is None else layer.combine.c
    return layer.base.weight.detach(), b, pair.A, pair.B, pair.scale, c


def fade_all(adapters, number: float) -> None:
    for _, layer in adapters:
        layer.combine.fade_(number)


# -- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.37, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_and_its_gradients_equal_the_twin(share, bias):
    model, layer = one_layer(bias=bias)
    layer.combine.fade_(share)
    x, dy = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y = model(x)
    W, b, A, B, s, c = parts(layer)
    torch.testing.assert_close(y, twin.layer(x, W, b, A, B, s, c, share))
    weight, offset = layer.effective()
    expected = twin.dense(W, b, A, B, s, c, share)
    torch.testing.assert_close(weight, expected[0])
    assert (offset is None) == (not bias)
    torch.testing.assert_close(expected[1] if offset is None else offset, expected[1])
    y.backward(dy)
    with torch.no_grad():
        dA, dB, dc = twin.gradients(x, dy, A, B, s)
    torch.testing.assert_close((A.grad, B.grad), (dA, dB))
    torch.testing.assert_close(c.grad if bias else dc, dc)
    assert layer.combine.share.grad is None and not layer.combine.share.requires_grad


@pytest.mark.parametrize("kernel", ["reference", "materialised", "auto"])
def test_all_kernels_compute_the_same(kernel):
    x = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for share in (1.0, 0.5, 0.0):
        outputs = []
        for method in ("fade+reference", f"fade+{kernel}"):
            model, layer = one_layer(method)
            layer.combine.fade_(share)
            outputs.append(model(x))
        torch.testing.assert_close(*outputs)


def test_faded_out_nothing_depends_on_the_weight():
    model, layer = one_layer("fade+pissa")
    x = torch.randn(6, 7, dtype=torch.float64)
    layer.combine.fade_(0.0)
    with torch.no_grad():
        before, dense = model(x), layer.effective()
        layer.base.weight.fill_(float("nan"))
        layer.base.bias.fill_(float("nan"))
        layer.update.frozen_B.fill_(float("nan"))
        assert torch.equal(model(x), before)
        assert all(torch.equal(a, b) for a, b in zip(layer.effective(), dense, strict=True))
        layer.combine.fade_(0.5)
        assert model(x).isnan().all()


def test_faded_out_the_frozen_product_is_not_computed(monkeypatch):
    model, layer = one_layer()
    calls = []
    linear = type(layer.store).linear
    monkeypatch.setattr(type(layer.store), "linear", lambda *a: calls.append(1) or linear(*a))
    for share in (0.5, 0.0):
        layer.combine.fade_(share)
        model(torch.randn(6, 7, dtype=torch.float64))
    assert len(calls) == 1


def test_the_number_is_read_once_after_each_change(monkeypatch):
    _, layer = one_layer()
    reads = []
    monkeypatch.setattr("lorica.methods.combine.fade.read_full", lambda t: reads.append(1) or t)
    layer.combine.fade_(0.25)
    assert [layer.combine.number for _ in range(3)] == [0.25] * 3 and len(reads) == 1
    with torch.no_grad():  # as a load writes it
        layer.combine.share.copy_(torch.tensor([0.5]))
    assert [layer.combine.number for _ in range(3)] == [0.5] * 3 and len(reads) == 2
    layer.combine.share = nn.Parameter(torch.tensor([0.75]), requires_grad=False)
    assert layer.combine.number == 0.75


@pytest.mark.parametrize("on", ["update", "delta"])
def test_the_anchor_of_a_start_fades_with_the_weight(on):
    """PiSSA: the residual goes, the best approximation of the weight stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
    adapters = lorica.attach(
        model, "fade+pissa", r=3, lora_dropout_on=on, dtype=torch.float64, verbose=False
    )
    layer = adapters.layers["0"]
    W, b = layer.base.weight.detach(), layer.base.bias.detach()
    low, x = twin.truncated(W, 3), torch.randn(6, 7, dtype=torch.float64)
    for share in (1.0, 0.5, 0.0):
        layer.combine.fade_(share)
        weight, bias = share * (W - low) + low, share * b
        torch.testing.assert_close(layer.effective()[0].detach(), weight)
        torch.testing.assert_close(model(x).detach(), x @ weight.T + bias)


@pytest.mark.parametrize("method", ["fade", "fade+pissa"])
@pytest.mark.parametrize("on", ["update", "delta"])
def test_dropout_falls_as_it_does_at_the_start(method, on, monkeypatch):
    """On the trained factors, and on an anchor where the start's own dropout does."""
    model, layer = one_layer(method, lora_dropout=0.5, lora_dropout_on=on)
    x = torch.randn(6, 7, dtype=torch.float64)
    dropped = x * masked(monkeypatch, x) * 2
    model.train()
    W, b, A, B, s, c = parts(layer)
    carried = layer.update.frozen_factors
    z = dropped if on == "update" else x
    anchor = 0 if carried is None else z @ carried.weight().T
    for share in (1.0, 0.5, 0.0):
        layer.combine.fade_(share)
        expected = share * (x @ W.T + b + anchor) + s * dropped @ A.T @ B.T + c
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("share", [1.0, 0.37, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_leaves_a_dense_layer_that_computes_the_same(share, bias):
    model, layer = one_layer(bias=bias)
    layer.combine.fade_(share)
    x = torch.randn(6, 7, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        lorica.merge(model)
        assert type(model[0]) is nn.Linear and (model[0].bias is not None) == bias
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    if share == 0:
        assert torch.linalg.matrix_rank(model[0].weight) == 3


def test_a_folder_keeps_the_share(tmp_path):
    model = llama(num_hidden_layers=1)
    adapters = lorica.attach(model, "fade+pissa", r=4, verbose=False)
    perturb(adapters)
    fade_all(adapters, 0.0)
    before = logits(model)
    lorica.save(adapters, tmp_path / "a")
    with pytest.raises(ValueError, match="PEFT has no form of `fade`"):
        from lorica import formats

        formats.export(adapters, tmp_path / "b")
    again = llama(num_hidden_layers=1)
    lorica.load(again, tmp_path / "a")
    assert torch.equal(logits(again), before)


# -- what remains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2"])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_the_compressed_model_is_the_faded_one(name, start):
    model = MODELS[name]()
    parameters = sum(p.numel() for p in model.parameters())
    adapters = lorica.attach(model, f"fade+{start}", r=4, verbose=False)
    perturb(adapters)
    fade_all(adapters, 0.0)
    before = logits(model)
    sizes = [(x.in_features, x.out_features) for _, x in adapters]
    done = compress(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-4)
    assert set(done.ranks.values()) == {4} and len(done.ranks) == len(sizes)
    less = sum(m * n - 4 * (m + n) for m, n in sizes)
    assert done.parameters_before == parameters and done.parameters == parameters - less
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert (done.bytes_before, done.bytes) == (4 * done.parameters_before, 4 * done.parameters)
    assert done.multiplies_before == sum(m * n for m, n in sizes)
    assert done.multiplies == sum(4 * (m + n) for m, n in sizes)
    again = load_compressed(MODELS[name](seed=1), model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_ranks_that_are_nothing_are_dropped_and_wide_layers_become_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(2, 2)).double()
    adapters = lorica.attach(
        model, "fade", r=2, target_modules=["0", "1"], dtype=torch.float64, verbose=False
    )
    perturb(adapters)
    fade_all(adapters, 0.0)
    with torch.no_grad():
        adapters.layers["0"].update.delta.B[:, 1] = 0
    x = torch.randn(3, 16, dtype=torch.float64)
    before = model(x)
    done = compress(adapters)
    assert done.ranks == {"0": 1} and done.multiplies == 32 + 32
    assert [type(m) for m in model] == [nn.Sequential, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("method", ["fade", "lora", "dora", "fade+mora"])
def test_a_layer_that_reads_its_base_has_no_thin_form(method):
    adapters = lorica.attach(llama(num_hidden_layers=1), method, r=4, verbose=False)
    if "mora" in method:
        fade_all(adapters, 0.0)
    before = adapters.fingerprint()
    with pytest.raises(ValueError, match=r"'model.layers.0.*' still reads its base.*lorica.merge"):
        compress(adapters)
    assert adapters.fingerprint() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_a_compressed_folder_is_read_back_to_the_bit(name, tied, dtype, tmp_path):
    model = MODELS[name](tie_word_embeddings=tied).to(dtype)
    adapters = lorica.attach(model, "fade+pissa", r=4, verbose=False)
    perturb(adapters)
    fade_all(adapters, 0.0)
    before = logits(model)
    done: Any = export(adapters, tmp_path / "out", to="compressed")
    assert json.loads(json.dumps(done.as_dict()))["ranks"] == dict(done.ranks) != {}
    assert done.parameters < done.parameters_before and done.bytes < done.bytes_before
    weights = (tmp_path / "out" / "compressed.safetensors").stat().st_size
    assert done.bytes <= weights <= done.bytes + 20_000, "what is tied is written once"
    again = unpack(tmp_path / "out")
    assert not again.training and {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(logits(again), logits(model)), "the model in memory is the compressed one"
    rough = 1e-5 if dtype is torch.float32 else 0.05
    assert done.logits.relative_change < rough
    assert float((logits(again) - before).norm() / before.norm()) < rough
    if tied:
        head: Any = again.get_output_embeddings()
        assert head.weight is again.get_input_embeddings().weight
    with pytest.raises((OSError, ValueError)):
        type(model).from_pretrained(tmp_path / "out")  # finds no weights, rather than wrong ones


def test_a_folder_that_cannot_be_vouched_for_is_refused(tmp_path):
    def faded(family: str = "llama") -> Any:
        adapters = lorica.attach(MODELS[family](), "fade", r=2, verbose=False)
        perturb(adapters)
        fade_all(adapters, 0.0)
        return adapters

    out = pack(faded(), tmp_path / "out").path
    with pytest.raises(ValueError, match="overwrite=True"):
        pack(faded(), out)
    pack(faded(), out, overwrite=True)
    with pytest.raises(ValueError, match="holds no compressed model"):
        unpack(tmp_path)
    file = out / "compressed.json"
    told = json.loads(file.read_text())
    for change, words in (
        ({"reader": 99}, "Upgrade"),
        ({"class": "Path"}, "does not have"),
        ({"tied": None}, "must be given"),
        ({"files": {}}, "is not the file"),
    ):
        file.write_text(json.dumps({**told, **change}))
        with pytest.raises(ValueError, match=words):
            unpack(out)
    file.write_text(json.dumps(told))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        unpack(out)
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        unpack(out)
    with pytest.raises(ValueError, match="cannot run with two thin"):
        pack(faded("t5"), tmp_path / "t5")
    layers = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="no transformers model"):
        pack(lorica.attach(layers, "fade", r=2, verbose=False), tmp_path / "plain")
    adapters = lorica.attach(llama(), "fade", r=2, verbose=False)
    with pytest.raises(ValueError, match=r"`fade` cannot be compressed.*`--to merged`"):
        export(adapters, tmp_path / "early", to="compressed")
    assert len(lorica.Adapters.of(adapters.model)) and not (tmp_path / "early").exists()


# -- the schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_each_forward_sees_the_share_of_its_step(shape):
    """Set once a step, whatever the number of micro-batches; 1 at first, 0 from q on."""
    model = llama(num_hidden_layers=1)
    adapters = lorica.attach(model, f"pclora(shape='{shape}')", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=10)
    seen = []
    for step in range(10):
        for micro in range(2):
            seen.append({layer.combine.number for _, layer in adapters})
            inputs = batch(model, seed=2 * step + micro)
            adapters.loss(model(**inputs), inputs, share=0.5).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = [twin.fade(shape, step, 0.6 * 10) for step in range(10) for _ in range(2)]
    got = [number for numbers in seen for number in numbers]
    assert got == pytest.approx(expected, abs=1e-7) and len(got) == 20
    assert got[0] == 1.0 and got[12:] == [0.0] * 8


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_kept_at_the_start_and_gone_at_the_end(name):
    model = MODELS[name]()
    before = logits(model)
    adapters = lorica.attach(model, "pclora", r=4, verbose=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    perturb(adapters)
    fade_all(adapters, 0.0)
    faded = logits(model)
    with torch.no_grad():
        for _, layer in adapters:
            layer.store.parameter.normal_()
    assert torch.equal(logits(model), faded) and not torch.allclose(faded, before)


def test_the_weights_are_what_was_promised_once_the_fade_has_ended():
    adapters = lorica.attach(llama(num_hidden_layers=1), "pclora(fade=0.5)", r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=7)
    final = adapters.recipe.schedules[0].fit(7).final_from(7)
    for done in range(1, 8):
        train(adapters, optimizer, 1, first=done - 1)
        assert all((layer.combine.number == 0) == (done >= final) for _, layer in adapters)


def test_s_is_one_and_the_words_are_filled():
    recipe = Recipe.parse("pclora(alpha=0.1)", r=8)
    assert (recipe.lora_alpha, recipe.combine.name) == (8, "fade")
    assert recipe.objectives == (Distillation(alpha=0.1),)
    assert Recipe.parse("pclora(alpha=1)").objectives == ()
    assert Recipe.parse("pclora+rslora", r=16).lora_alpha == 4


def test_adapters_and_optimizer_of_different_steps_are_refused():
    adapters = lorica.attach(llama(num_hidden_layers=1), "pclora", r=4, verbose=False)
    train(adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=10), 3)
    with pytest.raises(ValueError, match="step 0 of 10 λ is 1, and .* holds 0.5.*Load both"):
        train(adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=10), 1)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("pclora(fade=0)", "above 0 and at most 1"),
        ("pclora(fade=1.5)", "above 0 and at most 1"),
        ("pclora(alpha=-1)", "at least 0 and at most 1"),
        ("pclora(shape='sine')", "allowed: 'linear'"),
        ("distillation(alpha=1)", "leave the method out"),
        ("pclora+dora", "`pclora` fills the axis `combine`.*`dora`"),
        ("fade+dora", "name one of them"),
        ("pclora+relora", "`pclora` needs `base_unchanged`"),
        ("pclora(alpha=1)+relora", "both edit the base"),
        ("pclora+cola", "both edit the base"),
        ("pclora+switchlora", "`pclora` needs `base_unchanged`"),
        ("pclora+bat", "needs `base`"),
        ("pclora+galore", "Leave one|leave one"),
        ("distillation+full", "`distillation` needs `base_unchanged`"),
    ],
)
def test_refusals(method, text):
    with pytest.raises(ValueError, match=text):
        Recipe.parse(method)


def test_refusals_of_runs_and_places():
    adapters = lorica.attach(llama(num_hidden_layers=1), "pclora", r=4, verbose=False)
    with pytest.raises(ValueError, match="give `total_steps`"):
        lorica.optimizer(adapters)
    with pytest.raises(ValueError, match="is not one step"):
        PcLora(fade=0.01).fit(20)
    model = llama(num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"'model\.embed_tokens' is an embedding.*`fade` needs an input vector"
    ):
        lorica.attach(model, "fade", r=4, target_modules=["embed_tokens"], verbose=False)
    two = lorica.attach(model, "pclora(alpha=0.1)+distillation(alpha=0.5)", r=4, verbose=False)
    with pytest.raises(ValueError, match="two weights"):
        lorica.optimizer(two, total_steps=10)


@pytest.mark.parametrize("method", ["pclora+adalora", "pclora+sora", "pclora+mora", "pclora+miss"])
def test_it_stands_over_other_updates_and_budgets(method):
    adapters = lorica.attach(llama(num_hidden_layers=1), method, verbose=False, **(
        {} if "miss" in method else {"r": 4}))  # fmt: skip
    train(adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=20), 14)
    assert {layer.combine.number for _, layer in adapters} == {0.0}


# -- the loss --------------------------------------------------------------------------------------


def features(outputs) -> list[torch.Tensor]:
    return [h.detach() for h in outputs.hidden_states[1:]]


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_equals_the_twin(training):
    model = llama().double()
    inputs = batch(model)
    with torch.no_grad():
        teacher = features(model(**inputs, output_hidden_states=True))
    adapters = lorica.attach(
        model, "distillation(alpha=0.3)", r=4, dtype=torch.float64, verbose=False
    )
    model.train(training)
    outputs = model(**inputs)
    assert adapters.loss(outputs, inputs).item() == pytest.approx(0.3 * outputs.loss.item())
    perturb(adapters)
    outputs = model(**inputs)
    with torch.no_grad():
        student = features(model(**inputs, output_hidden_states=True))
        expected = twin.loss(outputs.loss, student, teacher, 0.3)
        assert twin.feature_loss(student, teacher) > 1e-3
    torch.testing.assert_close(adapters.loss(outputs, inputs).detach(), expected)
    share = adapters.loss(outputs, inputs, share=0.25) - 0.3 * outputs.loss
    torch.testing.assert_close(share.detach(), 0.25 * (expected - 0.3 * outputs.loss.detach()))


@pytest.mark.parametrize("beside", ["orthogonality", "balora(cr=0.3)"])
def test_the_tasks_loss_alone_is_weighed_whatever_the_order_of_the_words(beside):
    """A penalty keeps its weight beside it, typed first or last."""
    model = llama().double()
    inputs, found = batch(model), {}
    for text in ("distillation(alpha=0.3)", beside, "{}+{}", "{1}+{0}"):
        method = text.format("distillation(alpha=0.3)", beside)
        constant = "+schedules.balora(floor=1, wait=0, ramp=0)" if "balora" in method else ""
        recipe = Recipe.parse(f"{method}{constant}+kaiming", r=4)
        adapters = lorica.attach(model, recipe, dtype=torch.float64, verbose=False)
        lorica.optimizer(adapters, lr=1e-3)
        perturb(adapters)
        model.train()
        outputs = model(**inputs)
        found[text] = (adapters.loss(outputs, inputs) - outputs.loss).item()
        lorica.detach(model)
    weighed, penalty, *both = found.values()
    assert abs(penalty) > 1e-3
    assert both == [pytest.approx(weighed + penalty)] * 2


def test_the_features_reach_the_factors_and_the_original_gets_nothing():
    model = llama()
    adapters = lorica.attach(model, "distillation(alpha=0.0)", r=4, verbose=False)
    perturb(adapters)
    model.train()
    inputs = batch(model)
    adapters.loss(model(**inputs), inputs).backward()
    for t in adapters.trained():
        assert t.parameter.grad.abs().sum() > 0, t.name


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_features_of_every_block(name):
    model = MODELS[name]()
    adapters = lorica.attach(model, "distillation(alpha=0.0)", r=4, verbose=False)
    perturb(adapters)
    model.train()
    inputs = batch(model)
    outputs = model(**inputs)
    blocks = 4 if name == "t5" else 2  # two on each side
    assert len(_features(outputs, inputs)) == blocks
    adapters.loss(outputs, inputs).backward()
    assert sum(bool(t.parameter.grad.any()) for t in adapters.trained()) > len(adapters)


def test_padding_has_no_features():
    model = bert()
    adapters = lorica.attach(model, "distillation(alpha=0.0)", r=4, verbose=False)
    perturb(adapters)
    model.train()
    inputs = batch(model)
    short = {"input_ids": inputs["input_ids"][:, :4], "labels": inputs["labels"]}
    ids = inputs["input_ids"].clone()
    ids[:, 4:] = 0
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    padded = {"input_ids": ids, "attention_mask": mask, "labels": inputs["labels"]}
    losses = [adapters.loss(model(**one), one).item() for one in (short, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


def test_a_model_without_hidden_states_is_told_so():
    model = Perceptron()
    adapters = lorica.attach(model, "distillation", r=2, target_modules=["0"], verbose=False)
    model.train()
    inputs = {"x": torch.randn(2, WIDTH), "labels": torch.zeros(2, dtype=torch.long)}
    outputs = model(**inputs)
    with pytest.raises(ValueError, match="Perceptron returns none of hidden_states"):
        adapters.loss({"loss": outputs["loss"]}, inputs)


# -- in the Trainer --------------------------------------------------------------------------------


def run(folder: Path, steps: int = 8, **over: Any):
    from lorica.run import Trainer

    ids = torch.randint(0, VOCAB, (32, LENGTH), generator=torch.Generator().manual_seed(3))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    options = {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": 1e-3, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "optim": "adamw_torch",
    }  # fmt: skip
    resume = over.pop("resume", None)
    model = llama(num_hidden_layers=1).double()
    adapters = lorica.attach(model, "pclora", r=4, dtype=torch.float64, verbose=False)
    args = TrainingArguments(**{**options, **over})
    Trainer(model=model, args=args, train_dataset=rows).train(resume_from_checkpoint=resume)
    return adapters


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """The features' part enters an update once, and λ moves once an update."""
    whole = run(tmp_path / "a", per_device_train_batch_size=4)
    parts = run(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert {layer.combine.number for _, layer in parts} == {0.0}
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_is_the_straight_one(tmp_path, step):
    """Cut within the fade, and after it."""
    sizes = {"per_device_train_batch_size": 2}
    straight = run(tmp_path, save_strategy="steps", save_steps=step, **sizes)
    resumed = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **sizes)
    assert straight.fingerprint() == resumed.fingerprint()


# -- the claim, small ------------------------------------------------------------------------------

WIDTH, CLASSES, RANK, STEPS = 24, 6, 4, 400


class Perceptron(nn.Module):
    """Three hidden layers that are adapted, and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x, labels=None, output_hidden_states=False):
        states = [x]
        for block in self.blocks:
            states.append(torch.relu(block(states[-1])))
        out = {"logits": self.head(states[-1])}
        if labels is not None:
            out["loss"] = F.cross_entropy(out["logits"], labels)
        return {**out, "hidden_states": tuple(states)} if output_hidden_states else out


def data(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around class centres that lie on a curved sheet."""
    centres = torch.randn(3 * CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 3 * CLASSES, (size,), generator=generator)
    noise = torch.randn(size, WIDTH, generator=generator)
    return centres[which] + 0.8 * noise, which % CLASSES


def accuracy(model: nn.Module) -> float:
    x, labels = data(1, 2000)
    with torch.no_grad():
        return float((model(x)["logits"].argmax(1) == labels).float().mean())


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model, (x, labels) = Perceptron(), data(0, 2000)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        model(x, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def compressed(teacher: nn.Module, method: str, faded: bool = False) -> float:
    """Accuracy at λ = 0, after `STEPS` steps."""
    model = Perceptron()
    model.load_state_dict(teacher.state_dict())
    adapters = lorica.attach(
        model, method, r=RANK, target_modules=["0", "1", "2"], heads=[], verbose=False
    )
    if faded:
        fade_all(adapters, 0.0)
    optimizer = lorica.optimizer(adapters, lr=3e-3, total_steps=STEPS)
    (x, labels), generator = data(0, 2000), torch.Generator().manual_seed(3)
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        inputs = {"x": x[rows], "labels": labels[rows]}
        adapters.loss(model(**inputs), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {layer.combine.number for _, layer in adapters} == {0.0}
    return accuracy(model)


def test_a_gradual_fade_compresses_and_an_abrupt_one_breaks(teacher):
    """With and without distillation; beside the baseline that it only ties here as well: the
    truncated singular value decomposition of W, λ = 0 from the start, as many steps."""
    full = accuracy(teacher)
    gradual = [compressed(teacher, f"pclora(shape='{s}', alpha=1)") for s in SHAPES[:3]]
    gradual.append(compressed(teacher, "pclora"))
    abrupt = [compressed(teacher, f"pclora(shape='identity', alpha={a})") for a in (0.2, 1)]
    truncated = compressed(teacher, "fade+pissa", faded=True)
    assert full > 0.95
    assert min(gradual) > max(abrupt) + 0.3 and min(gradual) > full - 0.15
    assert all(abs(one - truncated) < 0.05 for one in gradual)
