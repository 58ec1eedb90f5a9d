"""Bat: an update made of the frozen weight's own blocks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import chains
import lorica
from lorica.formats import export
from lorica.methods.deltas.bat import product
from lorica.training.weight_edits import merge_
from models import MODELS, llama, logits, perturb, train
from reference import bat as twin

# (out, in, r): whole blocks, and padded ones on either side or both
SHAPES = [(6, 8, 2), (5, 7, 3), (6, 7, 3), (5, 6, 3), (4, 4, 4), (3, 5, 1), (7, 9, 4)]


def layer(method="bat", shape=(5, 7, 3), moved=True, **fields):
    torch.manual_seed(0)
    out, features, r = shape
    model = nn.Sequential(nn.Linear(features, out, dtype=torch.float64))
    adapters = lorica.attach(model, method, r=r, verbose=False, **fields)
    if moved:
        perturb(adapters, 0.7)
    return model, adapters.layers["0"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_it_equals_the_twin_in_either_order(shape, tokens):
    model, one = layer(shape=shape)
    out, features, r = shape
    delta, x = one.update.delta, torch.randn(tokens, features, dtype=torch.float64)
    assert delta.D.shape == (-(-out // r), r, r)
    weight = twin.weight(one.base.weight, delta.D)
    torch.testing.assert_close(delta(x, one.store), x @ weight.T)
    torch.testing.assert_close(delta.weight(one.store), weight)
    torch.testing.assert_close(model(x), one.base(x) + x @ weight.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_first_gradient_equals_the_twin(shape, tokens):
    model, one = layer(shape=shape, moved=False)
    x = torch.randn(tokens, shape[1], dtype=torch.float64)
    y = model(x)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    expected = twin.gradient(dy.T @ x, one.base.weight.detach(), shape[2])
    torch.testing.assert_close(one.update.delta.D.grad, expected)


def test_layers_train_as_the_twin():
    chains.assert_trains_as("bat", lambda p, W: twin.weight(W, p["D"]), lora_alpha=None)


@pytest.mark.parametrize("tokens", [2, 4])
def test_gradients_pass_gradcheck(tokens):
    """In both orders, and of W too, which trains for a while under some schedules."""
    _, one = layer()
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    W = one.base.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(product, (x, W, one.update.delta.D))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_start_is_the_base_to_the_bit(name):
    model = MODELS[name]()
    before = logits(model)
    adapters = lorica.attach(model, "bat", r=4, verbose=False)
    assert torch.equal(logits(model), before)
    assert adapters.recipe.learning_rate == (2e-5, "bat")
    with pytest.raises(ValueError, match="`lora_alpha=8` has no effect"):
        lorica.Recipe.parse("bat", lora_alpha=8)


def test_without_a_weight_every_block_of_a_row_is_the_same():
    _, one = layer(shape=(6, 8, 2))
    with torch.no_grad():
        one.base.weight.zero_()
        delta, weight = one.update.delta, one.update.delta.weight(one.store)
    for i in range(3):
        for j in range(4):
            block = weight[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(block, delta.D[i].detach())
    assert torch.linalg.matrix_rank(weight) == 2


def test_with_a_weight_the_rank_is_full():
    _, one = layer(shape=(12, 12, 2))
    with torch.no_grad():
        assert torch.linalg.matrix_rank(one.update.delta.weight(one.store)) == 12
        assert one.update.delta.D.numel() == 2 * 12


def test_the_published_weight_comes_back_out_of_a_merged_one():
    model, one = layer(shape=(6, 8, 2))
    W, D = one.base.weight.detach().clone(), one.update.delta.D.detach().clone()
    lorica.merge(model)
    torch.testing.assert_close(twin.unmerged(model[0].weight.detach(), D), W)


def test_a_chain_of_restarts_is_one_link():
    """W + I is multiplied by I + D_i at each: two links are one with I + D = (I + D₁)(I + D₂)."""
    model, one = layer(shape=(6, 8, 2))
    W, x = one.base.weight.detach().clone(), torch.randn(4, 8, dtype=torch.float64)
    together = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    for link in (1, 2):
        before, delta = model(x), one.update.delta
        together = together @ (torch.eye(2, dtype=torch.float64) + delta.D.detach())
        merge_(one, None, link=link, init=None, generator=torch.Generator())
        torch.testing.assert_close(model(x), before)
        assert torch.equal(delta.D, torch.zeros(3, 2, 2, dtype=torch.float64))
        perturb(lorica.Adapters.of(model), 0.7, seed=link)
    single = twin.weight(W, together - torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(one.base.weight.detach() - W, single)


@pytest.mark.parametrize("tokens", [1, 3, 4, 64])
def test_the_order_with_the_fewest_multiplies_is_taken(tokens):
    _, one = layer(shape=(16, 24, 4))
    x = torch.randn(tokens, 24, dtype=torch.float64)
    with FlopCounterMode(display=False) as counted:
        one.update.delta(x, one.store)
    formed, applied = 16 * 24 * (4 + tokens), 2 * 16 * 24 * tokens
    assert counted.get_total_flops() == 2 * min(formed, applied)


def test_it_costs_more_than_what_does_not_look_at_the_weight():
    """Forward and backward multiplies at equal parameters: MiSS ≤ LoRA < Bat."""
    flops = {}
    for method, r in (("lora", 2), ("miss", 4), ("bone", 4), ("bat", 4)):
        _, one = layer(method, (32, 32, r))
        assert sum(p.numel() for p in one.update.delta.parameters()) == 128
        x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counted:
            one.update.delta(x, one.store).sum().backward()
        flops[method] = counted.get_total_flops()
    assert flops["miss"] == flops["bone"] <= flops["lora"] < flops["bat"], flops


def test_backward_keeps_no_second_weight():
    """x, W and D alone: what is formed on the way is formed again."""
    _, one = layer(shape=(40, 30, 5))
    x = torch.randn(64, 30, dtype=torch.float64, requires_grad=True)
    sizes = {}
    for name, call in {
        "kept": lambda: product(x, one.base.weight, one.update.delta.D),
        "made again": lambda: one.update.delta(x, one.store),
    }.items():
        given = {t.untyped_storage().data_ptr() for t in (x, *one.parameters())}
        seen = {}

        def keep(t, given=given, seen=seen):
            if t.untyped_storage().data_ptr() not in given:
                seen[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = call()
        sizes[name] = sum(n for n in seen.values())
        y.sum().backward()
    assert sizes["kept"] >= 40 * 30 and sizes["made again"] < 40, sizes


def test_a_parameter_that_rests_in_forward_rests_when_it_is_made_again():
    model, one = layer()
    one.frozen_for_now = ("update.delta.D",)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    assert one.update.delta.D.grad is None and one.update.delta.D.requires_grad
    with torch.no_grad():
        weight, bias = one.effective()
    torch.testing.assert_close(x.grad, 2 * (x @ weight.T + bias).detach() @ weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_truth(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    adapters = lorica.attach(model, "bat", r=4, verbose=False)
    perturb(adapters, 0.3)
    x = torch.randn(20, 32)
    expected = adapters.layers["0"].update(x, adapters.layers["0"].store).detach()
    half = copy.deepcopy(model)
    half[0].base.to(dtype)
    y = half(x.to(dtype)) - half[0].base(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapters.layers["0"].update(x, adapters.layers["0"].store).square().sum().backward()
    grad = adapters.layers["0"].update.delta.D.grad
    assert grad.dtype == torch.float32 and grad.isfinite().all()


# -- files -----------------------------------------------------------------------------------------


def adapted(method: str = "bat", **fields):
    model = llama()
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, method, verbose=False, **fields)
    perturb(adapters)
    return base, model, adapters


@pytest.mark.parametrize("method", ["bat", "dora+bat"])
def test_what_peft_has_no_form_of_is_saved_as_its_own(method, tmp_path):
    """Blocks that do not fill the weight, or a magnitude."""
    base, model, adapters = adapted(method, r=8 if "dora" in method else 5)
    out = lorica.save(adapters, tmp_path / "out")
    assert sorted(f.name for f in out.iterdir()) == ["lorica.json", "lorica.safetensors"]
    told = json.loads((out / "lorica.json").read_text())
    assert "`bat` is no product of two factors" in told["why_not_peft"]
    again = copy.deepcopy(base)
    assert lorica.load(again, out).fingerprint() == adapters.fingerprint()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="--to merged"):
        export(adapters, tmp_path / "peft")


def test_an_export_of_some_rank_is_the_nearest_and_tells_each_layers_error(tmp_path):
    base, model, adapters = adapted(r=5)
    done = export(adapters, tmp_path / "cut", r=4)
    assert set(done.errors) == set(adapters.layers) and done.error == max(done.errors.values())
    for name, one in adapters:
        s = torch.linalg.svdvals(one.update.weight(one.store).detach().double())
        assert done.errors[name] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-5)
    assert json.dumps(done.as_dict())
    again = copy.deepcopy(base)
    plain = lorica.load(again, tmp_path / "cut")
    for name, one in adapters:
        whole = one.update.weight(one.store).detach()
        near = plain.layers[name].update.weight(plain.layers[name].store).detach()
        error = float((whole - near).norm() / whole.norm())
        assert error == pytest.approx(done.errors[name], rel=1e-3)
    full = export(adapters, tmp_path / "full", r=32)
    assert full.error < 1e-12
    other = copy.deepcopy(base)
    lorica.load(other, tmp_path / "full")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_a_merged_export_is_exact(tmp_path):
    _, model, adapters = adapted(r=5)
    before = logits(model)
    report = export(adapters, tmp_path / "out", to="merged")
    assert not report.suspicious
    plain = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["bat+relora(every=2)", "bat+cola(every=2, accumulate='base')",
                                    "dora+bat+relora(every=3, warm_start=2)"])  # fmt: skip
def test_restarting_schedules_keep_the_function_and_train(method):
    model = llama(num_hidden_layers=1).double()
    adapters = lorica.attach(model, method, r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=2e-3, total_steps=9)
    first = train(adapters, optimizer, 1)
    train(adapters, optimizer, 7, first=1)
    assert train(adapters, optimizer, 1)[0] < first[0]
    assert not adapters.base_unchanged
