"""Every way to parametrise ΔW, found by walking the room."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from walk import IN, KINDS, OUT, adapt, allowed, inputs, one_hot, only, recipe, serves, wrapping

import lorica
from lorica import Recipe
from lorica.recipe import registry
from models import perturb

WRAPPING = list(wrapping())
DIRECT = [w for w in registry.names("deltas") if w not in WRAPPING]
CASES = [(w, k) for w in WRAPPING for k in KINDS if serves(w, k)]


def layer_of(word: str, kind: str = "linear", *, moved: bool = True, **fields):
    adapters = adapt(KINDS[kind](), word, r=2, **fields)
    if moved:
        perturb(adapters, 0.5)
    return only(adapters)


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_attaching_keeps_the_function(word, kind):
    model, x = KINDS[kind](), inputs(kind, 4)
    before = model(x)
    adapt(model, word, r=2)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_forward_is_the_product_with_the_weight(word, kind):
    layer, x = layer_of(word, kind), inputs(kind, 3, 4)
    delta, base = layer.update.delta, layer.store
    weight = delta.weight(base)
    assert (weight is not None) == ("weight" in Recipe.parse(word).given())
    if weight is None:
        return
    assert weight.abs().max() > 1e-3, "perturbed and still nothing"
    assert weight.shape == (layer.out_features, layer.in_features)
    expected = one_hot(x) @ weight.T
    torch.testing.assert_close(layer.update(x, base), expected, rtol=1e-11, atol=1e-12)
    if kind != "embedding":
        torch.testing.assert_close(delta(x, base), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_what_is_carried_is_part_of_the_product(word, kind):
    layer, x = layer_of(word, kind), inputs(kind, 4)
    before = layer.update(x, layer.store)
    A, B = torch.randn(2, IN, dtype=torch.float64), torch.randn(OUT, 2, dtype=torch.float64)
    for _ in range(2):  # a second stack joins the first
        layer.update.add_frozen_(A, B)
    scale = layer.update.delta.scale
    extra = 2 * scale * one_hot(x) @ (B @ A).T
    torch.testing.assert_close(layer.update(x, layer.store), before + extra)
    if "weight" in registry.find(word).gives:
        total = layer.update.weight(layer.store)
        torch.testing.assert_close(layer.update(x, layer.store), one_hot(x) @ total.T)
        wide = layer.store.weight() + total
        torch.testing.assert_close(
            layer.update.row_norms(layer.store), torch.linalg.vector_norm(wide, dim=1)
        )


@pytest.mark.parametrize("word", WRAPPING)
def test_declared_capabilities_are_there_and_no_others(word):
    layer, gives = layer_of(word), registry.find(word).gives
    delta = layer.update.delta
    found = {
        "factors": delta.factors() is not None,
        "pair": delta.pair() is not None,
        "sides": {"A", "B"} <= set(delta.roles.values()),
        "wrapped": True,
    }
    for name, there in found.items():
        verb = "declare it" if there else "it is not there, leave it out"
        assert (name in gives) == there, f"`{name}` in `gives` of `{word}`: {verb}"
    if (factors := delta.factors()) is not None:
        torch.testing.assert_close(factors.weight(), delta.weight(layer.store))
        assert factors.A.shape[1] == IN and factors.B.shape[0] == OUT
    if (pair := delta.pair()) is not None:
        own = {id(p) for p in delta.parameters()}
        assert {id(pair.A), id(pair.B)} <= own, "inits fill the parameters themselves"
        assert pair.A.shape[1] == IN and pair.B.shape[0] == OUT
        assert pair.A.shape[0] == pair.B.shape[1]
        assert (pair.E is not None) == ("diagonal" in gives)


@pytest.mark.parametrize("word", registry.names("deltas"))
def test_matrices_train_exactly_where_they_are_not_withdrawn(word):
    adapters = adapt(KINDS["linear"](), word, r=2)
    assert any(t.matrix for t in adapters.trained()) == ("matrices" in adapters.recipe.given())


@pytest.mark.parametrize("word", WRAPPING)
def test_a_lookup_works_exactly_where_it_is_declared(word):
    model = KINDS["embedding"]()
    if "lookup" in registry.find(word).gives:
        adapt(model, word, r=2)
        return
    before = model.layer
    with pytest.raises(ValueError, match="embedding"):
        adapt(model, word, r=2)
    assert model.layer is before


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_gradients(word, kind):
    layer = layer_of(word, kind)
    x = inputs(kind, 3)
    parameters = [p for _, p, _ in layer.trained() if p.requires_grad]
    if x.is_floating_point():
        x.requires_grad_()

    def product(*values: Tensor) -> Tensor:
        names = [n for n, p, _ in layer.trained() if p.requires_grad]
        given = dict(zip([n.removeprefix("update.") for n in names], values[1:], strict=True))
        return torch.func.functional_call(layer.update, given, (values[0], layer.store))

    assert torch.autograd.gradcheck(product, (x, *parameters))


@pytest.mark.parametrize("word", WRAPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_device(word, dtype):
    model = KINDS["linear"](dtype=dtype)
    layer = only(adapt(model, word, r=2))
    trained = {p.dtype for _, p, _ in layer.trained()}
    wide = torch.promote_types(dtype, torch.float32)
    assert trained == {wide}, "what trains is in float32, or in float64 where the base is"
    assert {p.device for p in layer.parameters()} == {layer.store.parameter.device}
    x = inputs("linear", 3, dtype=dtype)
    assert model(x).dtype == dtype
    assert layer.effective()[0].dtype == wide


@pytest.mark.parametrize("word", WRAPPING)
def test_attach_on_the_meta_device(word):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    adapters = adapt(model, word, r=2)
    assert all(t.parameter.is_meta for t in adapters.trained())
    assert adapters.summary.trainable > 0


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_state_round_trip(word, kind):
    first = adapt(KINDS[kind](), word, r=2)
    perturb(first)
    second = adapt(KINDS[kind](), word, r=2, seed=9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert first.fingerprint() == second.fingerprint()
    a, b = only(first).effective()[0], only(second).effective()[0]
    assert torch.equal(a, b)


@pytest.mark.parametrize("combine", registry.names("combine"))
@pytest.mark.parametrize("word", WRAPPING)
def test_works_under_every_combine_that_its_declarations_allow(word, combine):
    method = f"{word}+{combine}"
    if not allowed(method):
        needs = registry.find(combine).needs | registry.find(word).needs
        assert needs - Recipe.parse(word).given(), "refused though every need is met"
        return
    for kind in KINDS:
        if not serves(method, kind):
            continue
        model, x = KINDS[kind](), inputs(kind, 4)
        before = model(x)
        adapters = adapt(model, method, r=2)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
        perturb(adapters, 0.3)
        adapted = model(x)
        assert (adapted - before).abs().max() > 1e-3
        lorica.merge(model)
        torch.testing.assert_close(model(x), adapted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("word", WRAPPING)
def test_a_rank_above_the_layer_is_refused_where_r_is_a_rank(word):
    if "r" not in Recipe.parse(word).takes:
        return
    model, x = KINDS["linear"](), inputs("linear", 4)
    before = model.layer
    if Recipe.parse(word).delta.most_r(IN, OUT) is None:  # r is no bound on the rank
        said = model(x)
        adapters = adapt(model, word, r=4 * (OUT + IN))
        torch.testing.assert_close(model(x), said, rtol=0, atol=1e-12)
        assert only(adapters).site.r == 4 * (OUT + IN)
        return
    with pytest.raises(ValueError, match=rf"larger than min\(in, out\).*layer \({OUT} x {IN}\)"):
        adapt(model, word, r=OUT + 1)
    assert model.layer is before


@pytest.mark.parametrize("word", WRAPPING)
def test_roles_name_every_trained_parameter(word):
    delta = layer_of(word).update.delta
    names = {n for n, _ in delta.named_parameters()}
    assert set(delta.roles) <= names | set(delta.roles)
    trainable = {n for n, p in delta.named_parameters() if p.requires_grad}
    assert trainable == names & set(delta.roles)
    assert set(delta.roles.values()) <= {"A", "B", "diagonal", "core", "bias", "magnitude"}


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_a_restart_is_a_fresh_adapter(word, kind):
    layer = layer_of(word, kind)
    delta, x = layer.update.delta, inputs(kind, 4)
    delta.restart(1, torch.Generator().manual_seed(3))
    first = {n: p.clone() for n, p in delta.named_parameters()}
    assert layer.update(x, layer.store).abs().max() == 0
    perturb_ = [p.data.normal_() for p in delta.parameters() if p.requires_grad]
    assert perturb_
    delta.restart(1, torch.Generator().manual_seed(3))
    assert all(torch.equal(p, first[n]) for n, p in delta.named_parameters())


@pytest.mark.parametrize("word", WRAPPING)
def test_dropout_is_in_training_only_and_right_on_average(word):
    if "lora_dropout" not in Recipe.parse(word).takes:
        return
    adapters = adapt(KINDS["linear"](), word, r=2, lora_dropout=0.5)
    perturb(adapters, 0.5)
    layer = only(adapters)
    x = inputs("linear", 1)
    layer.eval()
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(1500)])
    assert draws.std(0).max() > 1e-3
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 1500**0.5)
    assert error.max() < 4.5


@pytest.mark.parametrize("word", DIRECT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_in_place(word, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 3)).to(dtype)
    published = {n: p.clone() for n, p in model.named_parameters()}
    adapters = lorica.attach(model, recipe(word), keep_base=True, verbose=False)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters.direct)
    assert all(p.dtype == torch.float32 for p in model.parameters()), "rounding would eat steps"
    assert not adapters.base_unchanged and not len(adapters)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    model(torch.randn(4, IN)).square().mean().backward()
    optimizer.step()
    with adapters.disabled():  # the kept copy stands in
        assert all(torch.equal(p, published[n]) for n, p in model.named_parameters())
    assert not all(torch.equal(p.to(dtype), published[n]) for n, p in model.named_parameters())
    lorica.detach(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, published[name]) and p.dtype == dtype


@pytest.mark.parametrize("word", DIRECT)
def test_training_in_place_cannot_be_undone_without_a_copy(word):
    model = nn.Sequential(nn.Linear(IN, OUT))
    adapters = lorica.attach(model, recipe(word), verbose=False)
    with pytest.raises(ValueError, match="keep_base=True"):
        lorica.detach(model)
    with pytest.raises(ValueError, match="trains the base itself"), adapters.disabled():
        pass
