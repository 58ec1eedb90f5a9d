"""What a call in Python is given is checked at the door, and the same for every rule."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorica
from lorica.data import detect, read
from lorica.recipe import registry
from lorica.run.options import UsageError
from lorica.text import LONGEST, clear_errors

RULES = registry.names("rules")


def adapted(word: str = "adamw", r: int = 2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    try:
        return lorica.attach(model, f"dora+{word}", r=r, train_rest=True, verbose=False)
    except ValueError:  # a rule of whole matrices
        return lorica.attach(model, word, r=r, verbose=False)


def trained(word: str = "adamw", r: int = 2, steps: int = 2):
    adapters = adapted(word, r)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=9)
    for _ in range(steps):
        optimizer.zero_grad()
        adapters.model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
    return adapters, optimizer


NONSENSE = {
    "total_steps": [0, -1, 2.5, 2.0, True, "10", math.nan, math.inf, [3], torch.tensor(3), 1j],
    "lr": ["1e-3", -1e-3, math.nan, math.inf, True, [1e-3], 1j, 10**400, 1e38, torch.ones(2), {}],
    "modules_lr": ["1e-3", -1, math.nan, False],
    "weight_decay": ["0.1", -0.1, math.nan, math.inf, None, True, [0.1], 1e38],
    "seed": ["42", -1, 1.5, None, True],
    "betas": [0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("0.9", "0.99"), None, (0.9, math.nan), "ab"],
    "eps": ["1e-8", 0, -1e-8, math.nan, None, True, 1e300],
    "momentum": ["0.9", 1.0, -0.1, math.nan, None, True],
    "fused": ["yes", 2],
    "learning_rate": [1e-3],
    "x" * 60_000: [1],
}


@pytest.mark.parametrize("word", RULES)
def test_nonsense_is_refused_with_its_name_and_its_value(word):
    adapters = adapted(word)
    for name, values in NONSENSE.items():
        for value in values:
            with pytest.raises(ValueError) as caught:
                lorica.optimizer(adapters, **{"lr": 1e-3, name: value})
            text = str(caught.value)
            assert f"`{name[:20]}" in text and len(text) < 4000, (name, value, text[:300])
    optimizer = lorica.optimizer(adapters, lr=1e-3)  # nothing was bound, nothing is left over
    assert optimizer.param_groups[0]["lorica"]["total_steps"] == 0


FORMS = {
    "target_modules": [2.5, True, {"a": 1}, b"q", [1], [None], int],
    "exclude_modules": [2.5, 1, {"a": 1}, [1]],
    "modules_to_save": ["0", 1, [2], 2.5],
    "layers_to_transform": [-1, 2.5, "0", ["0"], [0.5], True, [True]],
    "rank_pattern": [(0.9, 1), 3, "q", [1], None],
    "alpha_pattern": [(0.9, 1), 3.5],
}


@pytest.mark.parametrize("name", FORMS)
def test_names_and_layers_of_another_form_are_refused(name):
    for value in FORMS[name]:
        with pytest.raises(ValueError, match=f"`{name}") as caught:
            lorica.attach(nn.Sequential(nn.Linear(6, 8)), "lora", verbose=False, **{name: value})
        assert len(str(caught.value)) < 1000
    assert lorica.Recipe(layers_to_transform=range(2)).layers_to_transform == (0, 1)
    assert lorica.Recipe(layers_to_transform=1).layers_to_transform == (1,)
    assert lorica.Recipe(target_modules={"b", "a"}).target_modules == ("a", "b")


def test_numbers_of_numpy_and_tensors_are_numbers():
    adapters = adapted()
    given = {"lr": np.float32(1e-3), "weight_decay": np.float64(0.1), "total_steps": np.int64(7)}
    optimizer = lorica.optimizer(adapters, seed=np.int32(3), **given)
    saved = optimizer.state_dict()["param_groups"]
    kinds = {type(v) for g in saved for k, v in g.items() if k not in ("params", "lorica")}
    assert not any(kind.__module__.startswith("numpy") for kind in kinds), "a safe load refuses it"
    assert type(saved[0]["lorica"]["total_steps"]) is int
    lorica.optimizer(adapted(), lr=torch.tensor(1e-3), fused=True)


@pytest.mark.parametrize("fused, foreach", [(True, True)])
def test_switches_of_torch_that_exclude_each_other(fused, foreach):
    with pytest.raises(ValueError, match="torch's AdamW refuses .*Leave one of them out"):
        lorica.optimizer(adapted(), lr=1e-3, fused=fused, foreach=foreach)


@pytest.mark.parametrize("word", RULES)
def test_an_optimizers_state_of_another_rank_or_not_finite_is_refused(word):
    _, optimizer = trained(word)
    good = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(optimizer.state_dict())
    big = [v for s in good["state"].values() for v in s.values() if v.numel() > 1]
    assert big
    other = trained(word, r=3)[1]
    with pytest.raises(ValueError, match="it is of another rank, or of another model"):
        other.load_state_dict(good)
    for value in (math.nan, math.inf):
        bad = copy.deepcopy(good)
        states = [v for s in bad["state"].values() for v in s.values() if v.numel() > 1]
        states[-1].view(-1)[0] = value
        with pytest.raises(ValueError, match="not finite in '.*Resume from an earlier"):
            optimizer.load_state_dict(bad)
    lost = copy.deepcopy(good)
    entries = max(lost["state"].values(), key=len)
    del entries[min(entries)]
    if entries:  # else it is a parameter that never had a gradient
        with pytest.raises(ValueError, match="has no numbers .*Resume from a checkpoint"):
            optimizer.load_state_dict(lost)
    fewer = copy.deepcopy(good)
    fewer["param_groups"][0]["params"] = fewer["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match="the checkpoint's optimizer moves"):
        optimizer.load_state_dict(fewer)
    for nonsense in ({}, {"state": {}, "param_groups": []}):
        with pytest.raises(ValueError, match="pass what `optimizer.state_dict"):
            optimizer.load_state_dict(nonsense)
    again = optimizer.state_dict()["state"]
    for i, state in kept["state"].items():
        assert all(torch.equal(v, again[i][k]) for k, v in state.items()), "nothing was written"
    fresh = trained(word, steps=0)[1]
    fresh.load_state_dict(good)


@pytest.mark.parametrize("spoil, match", [
    (lambda s: s.update({next(iter(s)): next(iter(s.values())) * math.nan}), "not finite, first"),
    (lambda s: s.update({next(iter(s)): next(iter(s.values())).long()}), "type: .* torch.int64"),
    (lambda s: s.update({next(iter(s)): next(iter(s.values()))[:1]}), "shape: "),
    (lambda s: s.update({next(iter(s)): "x" * 9999}), "is no state of adapters"),
    (lambda s: s.update({"x": torch.ones(1)}), "extra: x"),
    (lambda s: s.clear(), "missing: "),
])  # fmt: skip
def test_a_state_of_adapters_that_cannot_be_one_is_refused_and_nothing_is_written(spoil, match):
    adapters = adapted()
    before = adapters.fingerprint()
    saved = {k: v.clone() + 1 for k, v in adapters.state_dict().items()}
    spoil(saved)
    with pytest.raises(ValueError, match=match) as caught:
        adapters.load_state_dict(saved)
    assert adapters.fingerprint() == before and len(str(caught.value)) < 2000
    for nonsense in ("adapters.pt", None, [1], {1: torch.ones(1)}):
        with pytest.raises(ValueError, match="is no state of adapters"):
            adapters.load_state_dict(nonsense)


def test_no_message_of_a_call_is_longer_than_a_person_reads(tmp_path):
    """What is echoed is bounded where the errors leave, whoever words them."""
    long, many = "x" * 60_000, [f"name{i}" for i in range(3000)]
    model = nn.Sequential(nn.Linear(6, 6))
    adapters = lorica.attach(nn.Sequential(nn.Linear(6, 6)), "lora", r=2, verbose=False)
    state = adapters.state_dict()
    calls = [
        lambda: lorica.attach(model, long), lambda: lorica.attach(model, "+".join(many)),
        lambda: lorica.attach(model, "lora", **{long: 1}),
        lambda: lorica.attach(model, "lora", target_modules=many),
        lambda: lorica.attach(model, "lora", seed=long),
        lambda: lorica.Recipe.parse("lora", **dict.fromkeys(many, 1)),
        lambda: lorica.optimizer(adapters, **dict.fromkeys(many, 1)),
        lambda: adapters.load_state_dict({**state, **dict.fromkeys(many, torch.ones(1))}),
        lambda: adapters.load_state_dict({**state, long: torch.ones(1)}),
        lambda: lorica.load(model, long), lambda: lorica.save(adapters, long),
        lambda: read(long), lambda: read(tmp_path, columns=dict.fromkeys(many, "a")),
        lambda: detect(many), lambda: detect([long]),
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for number, call in enumerate(calls):
        with pytest.raises(ValueError) as caught:
            call()
        assert 0 < len(str(caught.value)) <= LONGEST, number


@given(st.text(), st.integers(0, 3000), st.booleans())
def test_messages_are_cut_where_errors_leave(text, times, other):
    said = text * times

    @clear_errors()
    def call() -> None:
        raise UsageError(said) if other else ValueError(said)

    with pytest.raises(ValueError) as caught:
        call()
    told = str(caught.value)
    assert type(caught.value) is (UsageError if other else ValueError)
    assert len(told) <= LONGEST and (other or len(said) > LONGEST or told == said)
