"""Every choice of who trains at which rate, found by walking the room."""

from __future__ import annotations

import itertools

import pytest
import torch
from walk import adapt

import lorica
from lorica import Recipe
from lorica.interfaces import Trained
from lorica.recipe import registry
from models import llama, train

GROUPS = registry.names("groups")
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}


def adapted(word: str, combine: str = "dora"):
    return adapt(llama(num_hidden_layers=1), f"{word}+{combine}", r=4)


@pytest.mark.parametrize("word", GROUPS)
def test_adjust_is_pure_and_keeps_the_options_names(word):
    group = registry.build(word, {})
    for role in ("A", "B", "diagonal", "core", "magnitude", "bias", "module"):
        for lookup in (False, True):
            given = dict(OPTIONS)
            trained = Trained("a.b", torch.nn.Parameter(torch.zeros(2, 2)), role, "a", lookup)
            out = group.adjust(trained, given)
            assert given == OPTIONS and set(out) == set(OPTIONS)
            assert out["lr"] > 0 and out == group.adjust(trained, dict(OPTIONS))


@pytest.mark.parametrize("word", GROUPS)
def test_every_trained_parameter_is_in_one_group_and_no_frozen_one_is(word):
    adapters = adapted(word)
    groups = adapters.param_groups(1e-3, 0.1)
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(t.parameter) for t in adapters.trained()}
    assert set(held) == {id(p) for p in adapters.model.parameters() if p.requires_grad}
    for group in groups:
        vectors = {p.ndim < 2 for p in group["params"]}
        assert not (True in vectors and group["weight_decay"]), "decay spares magnitudes"


@pytest.mark.parametrize("word", GROUPS)
def test_frozen_roles_stay_at_their_start_and_the_others_move(word):
    adapters = adapted(word)
    start = {n: v.clone() for n, v in adapters.state_dict().items()}
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 2)
    freezes = registry.find(word).freezes
    for site, layer in adapters:
        for name, p, role in layer.trained():
            moved = not torch.equal(p, start[f"{site}.{name}"])
            assert moved == (role not in freezes), name
            assert p.requires_grad == (role not in freezes)


@pytest.mark.parametrize("word", GROUPS)
def test_a_scheduler_keeps_the_ratio_of_the_rates(word):
    optimizer = lorica.optimizer(adapted(word), lr=1e-3)
    first = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates == pytest.approx([r / (2 + step) for r in first])


@pytest.mark.parametrize("pair", list(itertools.combinations(GROUPS, 2)))
def test_groups_stand_side_by_side_in_either_order(pair):
    def rates(method):
        groups = adapt(llama(num_hidden_layers=1), method, r=4).param_groups(1e-3, 0.1)
        return sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups)

    assert rates("+".join(pair)) == rates("+".join(reversed(pair)))


@pytest.mark.parametrize("word", GROUPS)
def test_something_trains_on_every_layer_it_accepts(word):
    """An embedding's zero factor is A: to freeze it there would train nothing."""
    model = llama(num_hidden_layers=1)
    targets = ["embed_tokens", "q_proj"]
    try:
        adapters = lorica.attach(
            model, Recipe.parse(word, r=4, target_modules=targets), verbose=False
        )
    except ValueError as error:
        assert "embed_tokens" in str(error)
        return
    before = {n: layer.effective()[0].clone() for n, layer in adapters}
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 2)
    for name, layer in adapters:
        assert not torch.equal(layer.effective()[0], before[name]), name
