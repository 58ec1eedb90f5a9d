"""Every way to combine W and ΔW, found by walking the room."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from walk import KINDS, adapt, allowed, inputs, one_hot, only, serves, variants

import lorica
from lorica import Recipe
from lorica.recipe import registry
from models import perturb

COMBINES = registry.names("combine")
INITS = registry.names("inits")
CASES = [(c, k) for c in COMBINES for k in KINDS if serves(c, k)]


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("word", "kind"), CASES)
def test_forward_effective_weight_and_merge_are_one(word, kind, init, bias):
    method = f"{word}+{init}"
    if not allowed(method) or not serves(method, kind):
        return
    model, x = KINDS[kind](), inputs(kind, 2, 3)
    before = model(x)
    adapters = adapt(model, method, r=2, bias=bias)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    perturb(adapters, 0.4)
    layer = only(adapters)
    weight, offset = layer.effective()
    adapted = model(x)
    by_hand = one_hot(x) @ weight.T + (0 if offset is None else offset)
    torch.testing.assert_close(adapted, by_hand, rtol=1e-11, atol=1e-12)
    assert (adapted - before).abs().max() > 1e-2
    with adapters.disabled():
        assert torch.equal(model(x), before)
    lorica.merge(model)
    assert type(model.layer).__name__ in ("Linear", "Conv1D", "Embedding")
    torch.testing.assert_close(model(x), adapted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("word", COMBINES)
def test_the_bias_is_not_touched_by_the_combine(word):
    model = KINDS["linear"]()
    adapters = adapt(model, word, r=2)
    perturb(adapters, 0.4)
    combine = only(adapters).combine
    with torch.no_grad():
        for name, role in combine.roles.items():
            if role == "bias":  # one of its own, beside the base's
                combine.get_parameter(name).zero_()
        zero = torch.zeros(1, 6, dtype=torch.float64)
        assert torch.equal(model(zero)[0], model.layer.base.bias)
    assert torch.equal(only(adapters).effective()[1], model.layer.base.bias)


@pytest.mark.parametrize("word", COMBINES)
def test_roles_name_every_parameter(word):
    combine = only(adapt(KINDS["linear"](), word, r=2)).combine
    names = {n for n, p in combine.named_parameters() if p.requires_grad}
    assert names == set(combine.roles) & {n for n, _ in combine.named_parameters()}
    assert all(p.dtype == torch.float64 for p in combine.parameters())


@pytest.mark.parametrize(("word", "kind"), CASES)
def test_gradients_of_the_combines_own_parameters(word, kind):
    layer = only(adapt(KINDS[kind](), word, r=2))
    own = {n: p for n, p in layer.combine.named_parameters() if p.requires_grad}
    if not own:
        return
    x = inputs(kind, 4)

    def forward(*values):
        given = {f"combine.{n}": v for n, v in zip(own, values, strict=True)}
        return torch.func.functional_call(layer, given, (x,))

    assert gradcheck(forward, tuple(own.values()))


@pytest.mark.parametrize("word", COMBINES)
def test_a_row_of_zeros_does_not_poison_the_rest(word):
    """Pruned rows and padding exist; a norm of 0 must give no NaN, forward or backward."""
    for method in variants(word):
        model = KINDS["linear"]()
        with torch.no_grad():
            model.layer.weight[1] = 0
        before = model(inputs("linear", 4))
        adapters = adapt(model, method, r=2)
        after = model(inputs("linear", 4))
        torch.testing.assert_close(after, before)
        after.square().sum().backward()
        for t in adapters.trained():
            assert t.parameter.grad.isfinite().all(), (method, t.name)


@pytest.mark.parametrize("word", COMBINES)
@pytest.mark.parametrize("on", ["update", "delta"])
def test_an_anchored_start_is_exact_in_training_mode(word, on):
    """Dropout on the whole update keeps the start exact; on the delta alone (PEFT) it does not."""
    anchored = [i for i in INITS if "zero_start" not in registry.find(i).gives]
    for init in anchored:
        method = f"{word}+{init}"
        if not allowed(method):
            continue
        model, x = KINDS["linear"](), inputs("linear", 8)
        before = model(x)
        adapters = adapt(model, method, r=2, lora_dropout=0.5, lora_dropout_on=on)
        model.train()
        error = (model(x) - before).abs().max()
        assert (error < 1e-12) == (on == "update")
        perturb(adapters, 0.4)
        assert not torch.equal(model(x), model(x)), "dropout falls once the update is not zero"


@pytest.mark.parametrize("word", COMBINES)
def test_declared_needs_are_known(word):
    cls = registry.find(word)
    assert cls.needs <= set(registry.CAPABILITIES) and cls.gives <= set(registry.CAPABILITIES)
    assert "wrapped" in cls.needs
    assert Recipe.parse(word).combine == cls()
