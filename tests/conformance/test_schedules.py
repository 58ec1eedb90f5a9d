"""Every schedule, found by walking the room, and two of the tests' own that prove the harness."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from merge_often import MergeOften
from swap_often import SwapOften
from torch import nn
from walk import recipe, same, state_bytes

import lorica
from lorica import Recipe
from lorica.methods.schedules.base import AbstractSchedule
from lorica.recipe import registry
from lorica.training.bind import KEY
from lorica.training.training import Training
from models import llama, logits, train

STEPS = 10
INTERVALS = ("every", "interval", "update_proj_gap", "deltaT")


def recipes() -> dict[str, Recipe]:
    """Every schedule at an interval of two steps, beside the parts that its word asks for."""
    out = {
        f"tests' {s.name} over {method}": Recipe.parse(method, r=4, schedules=(s,))
        for s in (MergeOften(every=2), SwapOften(every=2))
        for method in ("lora", "dora", "pissa", "dora+olora+rslora")
    }
    for word in registry.names("schedules"):
        fields = {f.name for f in dataclasses.fields(registry.find(word))}
        often = {name: 2 for name in INTERVALS if name in fields}
        often |= {"kappa": 1} if "kappa" in fields else {}  # as often at the end as at the start
        out[word] = recipe(f"{word}({', '.join(f'{k}={v}' for k, v in often.items())})", r=4)
    return out


RECIPES = recipes()


def begin(method: Recipe, dtype=torch.float32, **fields: Any):
    model = llama(num_hidden_layers=1).to(dtype)
    adapters = lorica.attach(model, method, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=STEPS, seed=3, **fields)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    return adapters, optimizer, scheduler


def go(adapters, optimizer, scheduler, first: int, last: int):
    for step in range(first, last):
        train(adapters, optimizer, 1, first=step)
        scheduler.step()


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_straight_run_from_every_step(name, tmp_path):
    straight = begin(RECIPES[name])
    files = []
    for step in range(STEPS):
        parts = {
            "adapters": straight[0].state_dict(),
            "optimizer": straight[1].state_dict(),
            "scheduler": straight[2].state_dict(),
        }
        torch.save(parts, tmp_path / f"{step}.pt")
        files.append(tmp_path / f"{step}.pt")
        go(*straight, step, step + 1)
    end = state_bytes(straight[0])
    moments = copy.deepcopy(straight[1].state_dict()["state"])
    for cut in range(1, STEPS):
        parts = torch.load(files[cut], weights_only=True)
        resumed = begin(RECIPES[name])
        resumed[0].load_state_dict(parts["adapters"])
        resumed[1].load_state_dict(parts["optimizer"])
        resumed[2].load_state_dict(parts["scheduler"])
        go(*resumed, cut, STEPS)
        assert same(state_bytes(resumed[0]), end), f"cut after {cut} steps"
        for i, state in resumed[1].state_dict()["state"].items():
            assert all(torch.equal(v, moments[i][k]) for k, v in state.items())


@pytest.mark.parametrize("name", RECIPES)
def test_the_state_has_the_structure_that_init_gave_it(name):
    adapters, optimizer, scheduler = begin(RECIPES[name])

    def structure(value):
        if isinstance(value, dict):
            return {k: structure(v) for k, v in value.items()}
        return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)

    own = optimizer.param_groups[0]["lorica"]
    before = structure(own)
    go(adapters, optimizer, scheduler, 0, STEPS)
    assert structure(optimizer.param_groups[0]["lorica"]) == before
    assert own["step"] == STEPS


def everything(adapters) -> dict[str, torch.Tensor]:
    """Weights and gradients."""
    grads = {f"{t.name}.grad": t.parameter.grad for t in adapters.trained()}
    return {**state_bytes(adapters), **{n: g.clone() for n, g in grads.items() if g is not None}}


def events(name: str, monkeypatch) -> list[tuple[int, float]]:
    """(step, change of the logits) of every call of a schedule that changed a weight or a
    gradient."""
    method = RECIPES[name]
    adapters, optimizer, scheduler = begin(method, torch.float64)
    seen = []

    def watch(cls: type[AbstractSchedule], hook: str) -> None:
        original = getattr(cls, hook)

        def watched(self, state, training):
            before, bits = logits(adapters.model), everything(adapters)
            original(self, state, training)
            change = (logits(adapters.model) - before).abs().max().item()
            if not same(bits, everything(adapters)):
                seen.append((training.step, change))

        monkeypatch.setattr(cls, hook, watched)

    for schedule in method.schedules:
        watch(type(schedule), "before_step")
        watch(type(schedule), "after_step")
    go(adapters, optimizer, scheduler, 0, STEPS)
    return seen


@pytest.mark.parametrize("name", RECIPES)
def test_an_event_keeps_the_function_exactly_where_that_is_declared(name, monkeypatch):
    changes = [change for _, change in events(name, monkeypatch)]
    declared = all("keeps_function" in s.gives for s in RECIPES[name].schedules)
    if declared:
        assert len(changes) >= 2, "fewer than two events in the run"
        assert max(changes) < 1e-9
    else:
        assert changes and max(changes) > 1e-9, "the function was kept: declare `keeps_function`"


@pytest.mark.parametrize("name", RECIPES)
def test_the_resumed_runs_have_events_on_both_sides_of_a_cut(name, monkeypatch):
    """Else the test above would pass a schedule that forgets everything."""
    steps = [step for step, _ in events(name, monkeypatch)]
    both = [(sum(s < cut for s in steps), sum(s >= cut for s in steps)) for cut in range(STEPS)]
    assert any(before >= 2 and after >= 2 for before, after in both), steps


@pytest.mark.parametrize("name", RECIPES)
def test_an_interval_that_never_ends_is_no_schedule(name):
    method = RECIPES[name]

    def endless(s):
        fields = {f.name for f in dataclasses.fields(s)}
        return dataclasses.replace(s, **{n: 10**9 for n in INTERVALS if n in fields})

    if not any(n in {f.name for f in dataclasses.fields(s)} for s in method.schedules
               for n in INTERVALS):  # fmt: skip
        return
    never = dataclasses.replace(method, schedules=tuple(endless(s) for s in method.schedules))
    none = dataclasses.replace(method, schedules=())
    results = []
    for one in (never, none):
        model = llama(num_hidden_layers=1).double()
        adapters = lorica.attach(model, one, dtype=torch.float64, verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=10**11)
        train(adapters, optimizer, 4)
        results.append({n: layer.effective()[0] for n, layer in adapters})
    # To rounding: an anchored start stands in the base of the one, beside it in the other.
    for layer, expected in results[1].items():
        told = f"{layer}: without events the run is no ordinary one; an argument of another meaning"
        told += f" needs another name than {', '.join(INTERVALS)}"
        torch.testing.assert_close(results[0][layer], expected, rtol=1e-9, atol=1e-9, msg=told)


@pytest.mark.parametrize("name", RECIPES)
def test_some_step_of_every_run_is_final(name):
    for schedule in RECIPES[name].schedules:
        for steps in (STEPS, STEPS + 1, 10 * STEPS):
            assert 0 <= schedule.fit(steps).final_from(steps) <= steps


@pytest.mark.parametrize("name", RECIPES)
def test_init_and_restore_touch_nothing(name):
    adapters, optimizer, _ = begin(RECIPES[name])
    before = state_bytes(adapters)
    training = Training(optimizer, adapters, optimizer.param_groups[0][KEY])
    for schedule in RECIPES[name].schedules:
        state = schedule.fit(STEPS).init(adapters)
        schedule.fit(STEPS).restore(state, training)
    assert same(before, state_bytes(adapters)) and not optimizer.state


@pytest.mark.parametrize("name", RECIPES)
def test_the_rates_are_the_schedulers_again_after_each_step(name):
    adapters, optimizer, scheduler = begin(RECIPES[name])
    for step in range(4):
        rates = [g["lr"] for g in optimizer.param_groups]
        train(adapters, optimizer, 1, first=step)
        assert [g["lr"] for g in optimizer.param_groups] == rates
        scheduler.step()


@pytest.mark.parametrize("name", RECIPES)
def test_a_base_that_is_written_to_says_so(name):
    adapters, optimizer, scheduler = begin(RECIPES[name])
    published = {n: layer.store.parameter.clone() for n, layer in adapters}
    go(adapters, optimizer, scheduler, 0, STEPS)
    kept = all(torch.equal(layer.store.parameter, published[n]) for n, layer in adapters)
    assert kept == adapters.base_unchanged
    if adapters.base_unchanged:
        lorica.detach(adapters.model)
    else:
        with pytest.raises(ValueError, match="keep_base=True"):
            lorica.detach(adapters.model)


@pytest.mark.parametrize("name", RECIPES)
def test_the_merged_model_is_the_adapted_one_at_the_end(name):
    adapters, optimizer, scheduler = begin(RECIPES[name], torch.float64)
    go(adapters, optimizer, scheduler, 0, STEPS)
    model = adapters.model
    before = logits(model)
    lorica.merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RECIPES)
def test_keeping_the_base_makes_detach_possible(name):
    method = RECIPES[name]
    model = llama(num_hidden_layers=1)
    published = {n: p.clone() for n, p in model.named_parameters()}
    adapters = lorica.attach(model, method, keep_base=True, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=STEPS)
    train(adapters, optimizer, STEPS)
    lorica.detach(model)
    assert all(torch.equal(p, published[n]) for n, p in model.named_parameters())


def test_two_schedules_that_edit_the_same_thing_are_refused():
    with pytest.raises(
        ValueError, match="`merge_often` and `swap_often` both edit the (base|pair)"
    ):
        Recipe.parse("lora", schedules=(MergeOften(), SwapOften()))


@pytest.mark.parametrize("schedule", [MergeOften(every=2), SwapOften(every=2)])
def test_an_event_on_a_transposed_and_on_an_embedded_weight(schedule):
    from models import gpt2

    for targets in (["c_attn"], ["wte"]):
        model = gpt2(n_layer=1, tie_word_embeddings=False).double()
        method = Recipe.parse("dora", r=4, target_modules=targets, schedules=(schedule,))
        adapters = lorica.attach(model, method, verbose=False)
        optimizer = lorica.optimizer(adapters, lr=0.0)
        before = logits(model)
        train(adapters, optimizer, 2)
        assert not adapters.base_unchanged
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


def test_an_event_never_writes_into_another_modules_weight():
    """A tied head shares the embedding's bytes: an event on one would change both."""
    from models import qwen2

    model = qwen2().double()
    method = Recipe.parse(
        "lora", r=4, target_modules=["embed_tokens"], schedules=(MergeOften(every=1),)
    )
    try:
        adapters = lorica.attach(model, method, verbose=False)
    except ValueError as error:
        assert "shares its weight" in str(error) and "embed_tokens" in str(error)
        return
    with torch.no_grad():
        nn.init.normal_(adapters.layers["model.embed_tokens"].update.delta.A)
    before = logits(model)
    train(adapters, lorica.optimizer(adapters, lr=0.0), 1)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_swap_resets_the_counterparts_state_and_nothing_else(side):
    """The counterparts' gradient depends on what was exchanged; the exchanged keep their own."""
    from lorica.training.weight_edits import swap_

    adapters = lorica.attach(llama(num_hidden_layers=1), "dora", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    train(adapters, optimizer, 3)
    layer = next(iter(adapters.layers.values()))
    pair = layer.update.delta.pair()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    numbers = {
        id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    width = pair.A.shape[1] if side == "A" else pair.B.shape[0]
    swap_(layer, optimizer, side, [1, 3], torch.randn(2, width))
    counterpart = pair.B.T if side == "A" else pair.A  # (r, ...)
    reset = pair.B if side == "A" else pair.A
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            old, new = before[numbers[id(p)]][name], state[name]
            if p is not reset:
                assert torch.equal(old, new)
                continue
            rows, kept = (new.T, old.T) if side == "A" else (new, old)
            assert rows.shape == counterpart.shape
            assert not rows[[1, 3]].any() and torch.equal(rows[[0, 2]], kept[[0, 2]])


def test_a_merge_resets_the_factors_state_and_keeps_the_magnitudes():
    from lorica.training.weight_edits import merge_

    adapters = lorica.attach(llama(num_hidden_layers=1), "dora", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    train(adapters, optimizer, 3)
    layer = next(iter(adapters.layers.values()))
    m = layer.combine.m
    kept = {n: v.clone() for n, v in optimizer.state[m].items()}
    values = m.detach().clone()
    merge_(layer, optimizer, link=1, init=adapters.recipe.init, generator=torch.Generator())
    for p in (layer.update.delta.A, layer.update.delta.B):
        assert not any(v.any() for v in optimizer.state[p].values())
    assert torch.equal(m, values)
    assert all(torch.equal(v, kept[n]) for n, v in optimizer.state[m].items())


WEIGHTY = [w for w in registry.names("deltas") if "weight" in Recipe.parse(w).given()
           and Recipe.parse(w).delta.wraps]  # fmt: skip
RESTARTS = {
    "relora(every=2)": "relora(every=2)",
    "cola(every=2, accumulate='base')": "cola(every=2)",
    "plora(every=2, accumulate='base')": "plora(every=2)",
    "xgblora(every=2, layers=1, accumulate='base')": "xgblora(every=2, layers=1)",
}


@pytest.mark.parametrize("delta", WEIGHTY)
@pytest.mark.parametrize("method", RESTARTS)
def test_restarts_stand_over_every_delta_that_gives_a_weight(method, delta, monkeypatch):
    """In the base always; carried where the delta has factors, and refused by name where not. Not
    over updates that other layers read, which would lose them."""
    if "separate" not in Recipe.parse(delta).given():
        with pytest.raises(ValueError, match="needs `separate`"):
            Recipe.parse(f"{method}+{delta}")
        return
    monkeypatch.setitem(RECIPES, "over", recipe(f"{method}+{delta}", r=4))
    changes = [change for _, change in events("over", monkeypatch)]
    assert len(changes) >= 2 and max(changes) < 1e-9
    carried = f"{RESTARTS[method]}+{delta}"
    if "factors" in Recipe.parse(delta).given() or method == RESTARTS[method]:
        assert recipe(carried, r=4)
    else:
        with pytest.raises(ValueError, match="needs `factors`"):
            Recipe.parse(carried)
