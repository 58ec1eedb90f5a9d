"""attach, detach, merge on whole models."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import lorica
from lorica import Adapters, Recipe, formats
from lorica.formats.compressed import compress
from lorica.inference.generate import generate
from lorica.model.layer import AdaptedLinear
from lorica.training.bind import bind
from models import MODELS, batch, bert, bert_masked, gpt2, llama, logits, perturb, qwen2, train
from tolerance import rounding

METHODS = ["lora", "dora", "olora", "dora+pissa+rslora"]


def attached(make=llama, method="lora", **fields):
    return lorica.attach(make(), method, verbose=False, **{"r": 4, **fields})


def snapshot(model: nn.Module) -> dict:
    return {
        "weights": {n: p.clone() for n, p in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "attributes": set(vars(model)),
    }


def assert_same(before: dict, after: dict) -> None:
    weights, others = before.pop("weights"), after.pop("weights")
    assert before == after
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[n], others[n]) for n in weights)


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_adapted_and_disabled_is_original(name, method):
    model = MODELS[name]().double()
    before = logits(model)
    adapters = lorica.attach(model, method, r=4, bias="lora_only", verbose=False)
    perturb(adapters, 0.1)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 1e-2
    with adapters.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    assert lorica.merge(model) is model
    torch.testing.assert_close(logits(model), adapted, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_detach_restores_everything(name, bias):
    model = MODELS[name]()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    model.train()
    before = snapshot(model)
    adapters = lorica.attach(model, "dora+olora", r=4, bias=bias, verbose=False)
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 2)
    assert lorica.detach(model) is model
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("make", [*MODELS.values(), bert_masked])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_beside_the_frozen_ones(make, bias):
    model = make().double()
    before = logits(model)
    adapters = lorica.attach(model, "dora", r=4, bias=bias, verbose=False)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    own = [t for t in adapters.trained() if t.role == "bias"]
    biased = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    assert own or make.__name__ in ("llama", "t5") or not biased
    perturb(adapters, 0.1)
    adapted = logits(model)
    with adapters.disabled():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    optimizer = lorica.optimizer(adapters, lr=1e-3, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(decay[id(t.parameter)] == 0 for t in own)
    model(**batch(model)).loss.backward()
    # A bias on the keys moves all scores of a query alike, so softmax takes its gradient to 0.
    assert all(t.parameter.grad is not None for t in own), "each is in the forward"
    lorica.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-9, atol=1e-9)


CALLS: dict[str, Callable[[Adapters, Path], object]] = {
    "save": lambda a, path: lorica.save(a, path),
    "merge_to": lambda a, path: formats.merge_to(a, path),
    "export": lambda a, path: formats.export(a, path),
    "compress": lambda a, path: compress(a),
    "restore": lambda a, path: formats.restore(a, path),
    "optimizer": lambda a, path: lorica.optimizer(a),
    "bind": lambda a, path: bind(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), a),
    "param_groups": lambda a, path: a.param_groups(0.1),
    "trained": lambda a, path: a.trained(),
    "pairs": lambda a, path: list(a.pairs()),
    "layers": lambda a, path: a.layers,
    "saved": lambda a, path: a.saved,
    "tables": lambda a, path: a.tables,
    "iterate": lambda a, path: list(a),
    "length": lambda a, path: len(a),
    "loss": lambda a, path: a.loss({"loss": torch.zeros(())}),
    "disabled": lambda a, path: a.disabled().__enter__(),
    "state_dict": lambda a, path: a.state_dict(),
    "load_state_dict": lambda a, path: a.load_state_dict({}),
    "fingerprint": lambda a, path: a.fingerprint(),
    "hash_base": lambda a, path: a.hash_base(),
    "base_parameters": lambda a, path: a.base_parameters(),
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("take_out", [lorica.merge, lorica.detach])
def test_a_released_handle_says_so_at_every_call(take_out, method, tmp_path):
    adapters = attached(method=method, keep_base=True, r=4 if method == "lora" else None)
    kept = lorica.save(adapters, tmp_path / "kept")
    optimizer = lorica.optimizer(adapters)
    adapters.hash_base()
    take_out(adapters.model)
    public = {n for n in vars(Adapters) if not n.startswith("_")} - {"of", "check_attached"}
    assert public <= set(CALLS)
    for name, call in CALLS.items():
        path = kept if name == "restore" else tmp_path / name
        with pytest.raises(ValueError, match=f"no longer part of.*`lorica.{take_out.__name__}`"):
            call(adapters, path)
            pytest.fail(name)
        assert name == "restore" or not path.exists()
    adapters.model(**batch(adapters.model)).loss.backward()
    with pytest.raises(ValueError, match="no longer part of"):
        optimizer.step()
    assert adapters.recipe.text() == method and str(adapters.summary)


def test_adapters_that_left_their_model_hold_up_no_other_optimizer():
    model = lorica.detach(attached(method="loraplus").model)
    adapters = lorica.attach(model, "lora", r=4, verbose=False)
    model(**batch(model)).loss.backward()
    torch.optim.SGD([t.parameter for t in adapters.trained()], 0.1).step()


def test_disabled_may_be_nested_and_survives_an_error():
    adapters = attached(method="olora")
    perturb(adapters)
    adapted = logits(adapters.model)
    with adapters.disabled():
        plain = logits(adapters.model)
        with adapters.disabled():
            assert torch.equal(logits(adapters.model), plain)
        assert torch.equal(logits(adapters.model), plain), "still within the outer one"
    with pytest.raises(KeyError), adapters.disabled():
        raise KeyError
    assert torch.equal(logits(adapters.model), adapted)


@pytest.mark.parametrize("fields", [
    {"r": 64}, {"target_modules": ["nope"]}, {"target_modules": ["embed_tokens"], "r": 40},
    {"rank_pattern": {"nope": 2}}, {"modules_to_save": ["nope"]}, {"bias": "x"},
    {"target_modules": ["q_proj"], "modules_to_save": ["sellf_attn"]},
    {"exclude_modules": ["nope"]}, {"layers_to_transform": [9]},
])  # fmt: skip
@pytest.mark.parametrize("method", ["dora+olora", "full"])
def test_a_failing_attach_leaves_the_model_as_it_was(method, fields):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError):
        lorica.attach(model, method, verbose=False, **fields)
    assert_same(before, snapshot(model))


def test_attach_twice():
    adapters = attached(method="dora")
    with pytest.raises(ValueError, match="has adapters already.*'dora'.*lorica.detach"):
        lorica.attach(adapters.model, "lora", r=4)
    lorica.attach(lorica.detach(adapters.model), "lora", r=4, verbose=False)
    with pytest.raises(ValueError, match="no adapters are attached.*lorica.attach"):
        lorica.detach(llama())
    with pytest.raises(ValueError, match="no adapters are attached"):
        lorica.merge(llama())
    assert Adapters.of(adapters.model) is not adapters


def test_parts_and_wholes_of_adapted_models_are_refused():
    whole, part = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    lorica.attach(whole, "lora", r=2, verbose=False)
    with pytest.raises(ValueError, match="a part of a model that has adapters already"):
        lorica.attach(whole.model, "lora", r=2)
    lorica.attach(part.model, "lora", r=2, verbose=False)
    with pytest.raises(ValueError, match=r"'model' of this Llama.*lorica.detach\(model.model\)"):
        lorica.attach(part, "lora", r=2)


def test_lazy_layers_are_refused_before_anything_changes():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0' is a LazyLinear that has not seen an input"):
        lorica.attach(model, "lora", r=2)
    assert type(model[1]) is nn.Linear
    model(torch.ones(1, 3))
    assert [*lorica.attach(model, "lora", r=2, verbose=False).layers] == ["0", "1"]


# -- what trains in full ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_to_save(dtype):
    model = bert().to(dtype)
    before = snapshot(model)
    first = logits(model)
    adapters = lorica.attach(model, "lora", r=4, modules_to_save=["classifier"], verbose=False)
    saved = adapters.saved["classifier"]
    assert {p.dtype for _, p, _ in saved.trained()} == {torch.float32}
    torch.testing.assert_close(logits(model), first, rtol=0.02, atol=0.02)
    train(adapters, lorica.optimizer(adapters, lr=0.05), 2)
    adapted = logits(model)
    assert not torch.allclose(adapted, first) and adapted.dtype == dtype
    with adapters.disabled():
        assert torch.equal(logits(model), first)
    merged = lorica.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), adapted, rtol=0.05, atol=0.05)
    assert merged.classifier.weight.dtype == dtype
    lorica.detach(model)
    assert_same(before, snapshot(model))


def test_a_tied_head_that_trains_leaves_the_embedding_alone(tmp_path):
    model = qwen2()
    table = model.model.embed_tokens.weight.clone()
    adapters = lorica.attach(model, "lora", r=4, modules_to_save=["lm_head"], verbose=False)
    assert adapters.summary.tied == {"lm_head": "model.embed_tokens"}
    train(adapters, lorica.optimizer(adapters, lr=0.05), 2)
    assert torch.equal(model.model.embed_tokens.weight, table)
    adapted = logits(model)
    lorica.merge(model)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    # W + ΔW is rounded where its parts were, in sums of 32 (q, k, v), 7 (attention), 32 (o, gate,
    # up) and 48 terms (down) in each of the two blocks, and of 32 in the head.
    within = rounding(torch.float32, 2 * (32 + 7 + 32 + 32 + 48) + 32, adapted.abs().max().item())
    again = logits(type(model).from_pretrained(tmp_path))
    torch.testing.assert_close(again, adapted, rtol=0, atol=within)


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_merging_a_tied_embedding_unties_it(make, tmp_path):
    model = make()
    table = {"qwen2": "embed_tokens", "gpt2": "wte"}[make.__name__]
    adapters = lorica.attach(model, "dora", r=4, target_modules=[table], verbose=False)
    assert "shares its weight with lm_head" in str(adapters.summary)
    head = model.lm_head.weight.clone()
    perturb(adapters, 0.2)
    adapted = logits(model)
    assert torch.equal(model.lm_head.weight, head), "only the input's use changes"
    lorica.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [
    {}, {"target_modules": ["q_proj"]}, {"layers_to_transform": [0]},
    {"exclude_modules": ["q_proj"]},
])  # fmt: skip
def test_full_training_trains_what_it_is_told(fields):
    model = llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    try:
        adapters = lorica.attach(model, "full", verbose=False, **fields)
    except ValueError as error:
        assert "no effect" in str(error)
        return
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if not fields:
        assert moved == set(before)
    elif "target_modules" in fields:
        assert moved == {n for n in before if "q_proj" in n}
    elif "layers_to_transform" in fields:
        assert moved and all("layers.0." in n for n in moved)
    else:
        assert moved and not any("q_proj" in n for n in moved)


def test_full_training_of_a_part_of_a_half_precision_model_can_be_undone():
    model = llama().bfloat16()
    before = snapshot(model)
    lorica.attach(model, "full", target_modules=["q_proj"], keep_base=True, verbose=False)
    lorica.detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(before, snapshot(model))


# -- dtypes, devices, modes ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_half_precision_base(method):
    model = llama().bfloat16()
    adapters = lorica.attach(model, method, r=4, verbose=False)
    assert {t.parameter.dtype for t in adapters.trained()} == {torch.float32}
    start = logits(model)
    assert start.dtype == torch.bfloat16
    losses = train(adapters, lorica.optimizer(adapters, lr=1e-2), 6)
    assert all(loss == loss for loss in losses)
    for t in adapters.trained():
        assert t.parameter.isfinite().all()
    adapted = logits(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), adapted, rtol=0.1, atol=0.3)
    lorica.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    merged = logits(model).float()
    assert (merged - adapted).norm() / adapted.norm() < 0.03


def test_adapters_may_be_narrower_or_wider():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        adapters = lorica.attach(llama(), "dora", r=4, dtype=dtype, verbose=False)
        assert {t.parameter.dtype for t in adapters.trained()} == {dtype}
        train(adapters, lorica.optimizer(adapters, lr=1e-3), 1)
    adapters = lorica.attach(llama().double(), "dora", r=4, verbose=False)
    assert {t.parameter.dtype for t in adapters.trained()} == {torch.float64}


def test_the_meta_device():
    """Planning: everything is counted, nothing is held."""
    config = llama().config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    adapters = lorica.attach(model, "dora+olora", r=4, verbose=False)
    real = lorica.attach(llama(), "dora+olora", r=4, verbose=False)
    assert all(p.is_meta for p in model.parameters())
    assert adapters.summary.trainable == real.summary.trainable
    assert adapters.summary.memory["base"] == real.summary.memory["base"]
    assert adapters.summary.memory["frozen factors"] == real.summary.memory["frozen factors"]


def test_modes_follow_the_model():
    for mode in (True, False):
        model = llama().train(mode)
        adapters = lorica.attach(model, "lora", r=4, lora_dropout=0.5, verbose=False)
        assert all(layer.training is mode for _, layer in adapters)


def test_inference_mode_before_and_after_training():
    adapters = attached(method="dora+olora")
    model, inputs = adapters.model, batch(adapters.model)
    with torch.inference_mode():
        first = model(**inputs).logits
    torch.testing.assert_close(first, logits(model))
    train(adapters, lorica.optimizer(adapters, lr=1e-3), 2)
    with torch.inference_mode():
        assert not torch.allclose(model(**inputs).logits, first)


@pytest.mark.parametrize("method", METHODS)
def test_generation_is_the_merged_models(method):
    adapters = attached(method=method)
    perturb(adapters, 0.05)
    model, prompt = adapters.model, torch.arange(1, 5)[None]
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, use_cache=False, **arguments), with_cache)
    lorica.merge(model)
    assert torch.equal(model.generate(prompt, **arguments), with_cache)


# -- torch's machinery -----------------------------------------------------------------------------


def gradients(adapters) -> dict[str, torch.Tensor]:
    return {t.name: t.parameter.grad.clone() for t in adapters.trained()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora+olora"])
def test_gradient_checkpointing(method, reentrant):
    plain = attached(method=method)
    plain.model.train()
    plain.model(**batch(plain.model)).loss.backward()
    adapters = attached(method=method)
    model = adapters.model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # else no block's input asks for a gradient, and none is computed
        model.enable_input_require_grads()
    inputs = batch(model)
    model(**inputs, use_cache=False).loss.backward()
    expected, got = gradients(plain), gradients(adapters)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    zero = [n for n, g in got.items() if not g.any()]
    assert all(n.endswith(".A") for n in zero) and bool(zero) == ("olora" not in method)


def graphs(method: str, make, steps: int = 3) -> int:
    """Graphs that dynamo captures for `steps` training steps, with no break allowed."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = make()
    adapters = lorica.attach(model, method, r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = copy.deepcopy(model)
    for _ in range(steps):
        out = compiled(torch.randn(16, 8))
        out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(expected(torch.ones(1, 8)), model(torch.ones(1, 8)))
    return counter.frame_count


# Dynamo itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", [*METHODS, "lora+materialised", "lora+reference"])
def test_compile_sees_one_graph(method):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6))

    assert graphs(method, make) == 1


def test_a_deep_copy_is_a_model_of_its_own():
    adapters = attached(method="dora+olora", bias="all", modules_to_save=["lm_head"])
    twin = copy.deepcopy(adapters.model)
    theirs = Adapters.of(twin)
    assert theirs is not adapters and theirs.model is twin
    assert theirs.fingerprint() == adapters.fingerprint()
    own = {id(p) for p in adapters.model.parameters()}
    assert not own & {id(p) for p in twin.parameters()}
    before = logits(adapters.model)
    train(theirs, lorica.optimizer(theirs, lr=1e-2), 2)
    assert torch.equal(logits(adapters.model), before)
    assert not torch.equal(logits(twin), before)
    with theirs.disabled():
        pass
    lorica.detach(twin)
    assert Adapters.of(adapters.model) is adapters


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "lorafa", "full"])
def test_state_round_trip_without_pickle(method, tmp_path):
    from safetensors.torch import load_file, save_file

    fields = {} if method == "full" else {"bias": "all", "modules_to_save": ["lm_head"], "r": 4}
    first = lorica.attach(llama(), method, verbose=False, **fields)
    perturb(first)
    state = {n: t.contiguous() for n, t in first.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(first.state_dict(), tmp_path / "a.pt")
    for loaded in (load_file(tmp_path / "a.safetensors"),
                   torch.load(tmp_path / "a.pt", weights_only=True)):  # fmt: skip
        second = lorica.attach(llama(), method, verbose=False, **{**fields, "seed": 3})
        second.load_state_dict(loaded)
        assert second.fingerprint() == first.fingerprint()
        assert torch.equal(logits(second.model), logits(first.model))
    inside = first.model.state_dict()
    assert set(first.state_dict()) <= set(inside), "a plain loop's checkpoint has all of it"


def test_a_foreign_state_is_refused_and_nothing_is_written():
    adapters = attached(method="dora")
    before = adapters.fingerprint()
    names = set(adapters.state_dict())
    good = {n: t + 1 for n, t in adapters.state_dict().items()}
    first = next(iter(good))
    short = {n: t for n, t in good.items() if n != first}
    cases = {
        "missing: " + first: short,
        "extra: x.y": {**good, "x.y": torch.zeros(1)},
        "shape: ": {**good, first: torch.zeros(3, 3)},
        "missing: ": attached(method="olora").state_dict(),
    }
    for part, state in cases.items():
        with pytest.raises(ValueError, match="not those of these adapters") as caught:
            adapters.load_state_dict(state)
        assert part in str(caught.value) and "attach with the saved one" in str(caught.value)
        assert adapters.fingerprint() == before and set(adapters.state_dict()) == names


def test_the_base_is_known_by_its_hash():
    adapters = attached(method="olora")
    published = adapters.hash_base()
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 2)
    adapters.base_hash = None
    assert adapters.hash_base() == published, "training did not touch it"
    assert attached(method="dora").hash_base() == published, "whatever is beside it"
    assert attached(lambda: llama(seed=1)).hash_base() != published
    assert attached(lambda: llama().double()).hash_base() == published, "independent of dtype"


def test_the_fingerprint_sees_every_tensor():
    adapters = attached(method="dora+olora", bias="lora_only", modules_to_save=["lm_head"])
    before = adapters.fingerprint()
    for value in adapters.state_dict().values():
        with torch.no_grad():
            flat = value.view(-1)
            kept = flat[-1].clone()
            flat[-1] += 1e-3
            assert adapters.fingerprint() != before
            flat[-1] = kept
    assert adapters.fingerprint() == before


# -- the summary -----------------------------------------------------------------------------------


def test_the_summary_counts_what_is_there():
    adapters = attached(method="dora+olora", bias="lora_only", modules_to_save=["lm_head"])
    summary, model = adapters.summary, adapters.model
    assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.total == sum(p.numel() for p in model.parameters())
    by_role: dict[str, int] = {}
    for t in adapters.trained():
        key = "modules in full" if t.role == "module" else t.role
        by_role[key] = by_role.get(key, 0) + t.parameter.numel()
    assert {k: v["elements"] for k, v in summary.trained.items()} == by_role
    assert summary.memory["optimizer"] == 8 * summary.trainable
    assert sum(info["count"] for info in summary.layers.values()) == len(adapters)
    assert json.loads(json.dumps(summary.as_dict()))["method"] == "dora+olora"
    text = summary.details()
    for part in (
        "parameters train", "magnitude", "frozen factors", "in full      lm_head",
        "default      lora_alpha=4 (from olora)", "default      learning_rate=",
    ):  # fmt: skip
        assert part in text, text


def test_the_summary_tells_layers_of_one_shape_apart_by_rank_and_scale():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    adapters = lorica.attach(
        model, "lora", r=2, lora_alpha=4, rank_pattern={"1": 4}, alpha_pattern={"2": 8, "3": 8},
        verbose=False,
    )  # fmt: skip
    shown = [line for line in adapters.summary.details().splitlines() if "adapted" in line]
    assert shown == [
        "  adapted      2 weights of shape 8 x 8, r=2, s=2",
        "  adapted      1 weight of shape 8 x 8, r=4, s=1",
        "  adapted      2 weights of shape 8 x 8, r=2, s=4",
    ]


def test_the_summary_groups_what_is_not_adapted_largest_first_with_the_reason():
    adapters = lorica.attach(llama(), "lora", r=2, target_modules=["q_proj"], verbose=False)
    lines = str(adapters.summary).splitlines()
    left = [line for line in lines if line.startswith("  not adapted")]
    shares = [float(line.split("(")[1].split("%")[0]) for line in left if "together" not in line]
    assert shares == sorted(shares, reverse=True) and len(lines) <= 14
    kinds = {line.split()[2].rstrip(","): line for line in left}
    assert "model.layers.*.mlp.up_proj.weight" in kinds
    assert kinds["model.embed_tokens.weight"].endswith(": an embedding")
    assert kinds["lm_head.weight"].endswith(": the output head")
    assert sum(line.startswith("  defaults") for line in lines) == 1


def test_the_summary_is_logged_once_and_can_be_silenced(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="lorica"):
        adapters = lorica.attach(llama(), "lora", r=4)
    assert caplog.text.count("parameters train") == 1
    assert "embed_tokens.weight" in caplog.text and "not adapted" in caplog.text
    caplog.clear()
    lorica.attach(lorica.detach(adapters.model), "lora", r=4, verbose=False)
    assert not caplog.text and not capsys.readouterr().out


def test_a_recipe_object_and_fields_reach_the_model():
    recipe = Recipe.parse("dora+olora", r=8, target_modules=["q_proj"])
    adapters = lorica.attach(llama(), recipe, verbose=False)
    assert adapters.recipe is recipe
    other = lorica.attach(llama(), recipe, r=2, verbose=False)
    assert {layer.site.r for _, layer in other} == {2}
    assert {layer.site.scale for _, layer in other} == {1.0}


class Owner(nn.Module):
    """Owns a bias of its own beside a child that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.inner(x) + self.bias


def test_a_bias_of_a_parent_trains_beside_an_adapted_child():
    torch.manual_seed(0)
    model, x = nn.Sequential(Owner(), nn.Linear(4, 2)).double(), torch.randn(3, 4).double()
    before, plain = model(x), snapshot(model)
    adapters = lorica.attach(model, "dora", r=2, bias="all", verbose=False)
    perturb(adapters, 0.3)
    adapted = model(x)
    adapted.square().sum().backward()
    assert all(t.parameter.grad is not None for t in adapters.trained())
    with adapters.disabled():
        torch.testing.assert_close(model(x), before)
    merged = lorica.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), adapted)
    assert [n for n, _ in merged.named_modules()] == list(plain["modules"])
    lorica.detach(model)
    assert_same(plain, snapshot(model))


def test_disabled_with_a_kept_base_is_the_original() -> None:
    model, ids = llama(), torch.arange(7)[None]
    plain = llama()(ids).logits
    adapters = lorica.attach(model, "full", keep_base=True, verbose=False)
    perturb(adapters)
    moved = model(ids).logits
    assert not torch.equal(moved, plain)
    with adapters.disabled():
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, moved)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_trains_itself_says_how_it_is_stored_and_whether_it_is_a_matrix(family):
    model = MODELS[family]()
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    adapters = lorica.attach(model, "full", verbose=False)
    trained = {t.name: t for t in adapters.trained()}
    hidden = [n for n, t in trained.items() if t.matrix]
    assert hidden and not any("lm_head" in n or n.rpartition(".")[0] in tables for n in hidden)
    assert {t.transposed for n, t in trained.items() if t.matrix} == {family == "gpt2"}
    table = next(iter(tables))
    model = MODELS[family]()
    one = lorica.attach(model, "full", target_modules=[table], verbose=False).trained()
    assert [(t.role, t.lookup, t.matrix) for t in one] == [("weight", True, False)]


@pytest.mark.parametrize("targets", [["q_proj"], ["1.shared_transformer.self_attn.q_proj"],
                                     ["lm_head"], "all-linear"])  # fmt: skip
def test_merging_unties_only_what_was_adapted(targets, tmp_path):
    """Zamba2 has one block in several layers, under the flag that also ties the head."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=61, hidden_size=16, num_hidden_layers=4, num_mem_blocks=1, pad_token_id=0,
        layers_block_type=["mamba", "hybrid", "hybrid", "hybrid"], mamba_d_state=4,
        mamba_ngroups=1, n_mamba_heads=4, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, adapter_rank=2, initializer_range=0.2,
    )  # fmt: skip
    model = Zamba2ForCausalLM(config).eval()
    adapters = lorica.attach(model, "lora", r=2, target_modules=targets, verbose=False)
    perturb(adapters, 0.5)
    lorica.merge(model)
    merged = logits(model)
    model.save_pretrained(tmp_path)
    loaded = Zamba2ForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), merged)
    norms = [layer.shared_transformer.input_layernorm.weight for layer in loaded.model.layers[1:]]
    assert norms[0] is norms[1] is norms[2], "what was not adapted is shared still"
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight or targets == ["lm_head"]


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4,
        max_source_positions=10, max_target_positions=12, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return ViTForImageClassification(config)


SEEING = {
    "whisper": (whisper, {"input_features": (2, 4, 20)}, torch.tensor([[3, 4], [5, 6]])),
    "vit": (vit, {"pixel_values": (2, 3, 8, 8)}, torch.tensor([0, 1])),
    "llama": (llama, None, None),
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("name", SEEING)
def test_reentrant_checkpointing_trains_every_block_whatever_the_input(name):
    make, shapes, labels = SEEING[name]
    torch.manual_seed(0)
    model = make()
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    perturb(adapters)
    model.train()
    generator = torch.Generator().manual_seed(1)
    inputs = (
        batch(model)
        if shapes is None
        else {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        | {"labels": labels}
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(vars(module).get(rate), float):
                setattr(module, rate, 0.0)
    found = []
    for reentrant in (None, True):
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append({t.name: t.parameter.grad for t in adapters.trained()})
    assert all(g is not None for g in found[1].values())
    torch.testing.assert_close(found[1], found[0])
    lorica.detach(model)


def test_a_model_on_the_meta_device_is_called_that(tmp_path):
    model = llama()
    lorica.attach(model, "lora", r=2, verbose=False)
    lorica.save(model, tmp_path / "a")
    lorica.detach(model)
    empty = model.to("meta")
    words = r"LlamaForCausalLM: \S+ is on the meta device.*Load the weights first"
    with pytest.raises(ValueError, match="cannot load adapters onto this " + words):
        lorica.load(empty, tmp_path / "a")
    with pytest.raises(ValueError, match="cannot generate with this " + words):
        generate(empty, None, [])
    for method in ("lora", "dora", "full"):  # counts what would train
        adapters = lorica.attach(empty, method, keep_base=method == "full", verbose=False)
        assert adapters.summary.trainable
        with pytest.raises(ValueError, match="cannot merge the adapters of this " + words):
            lorica.merge(empty)
        with pytest.raises(ValueError, match="cannot save the adapters of this " + words):
            lorica.save(empty, tmp_path / "b")
        with pytest.raises(ValueError, match="cannot hash the adapters of this " + words):
            adapters.fingerprint()
        lorica.detach(empty)
    assert not (tmp_path / "b").exists()
