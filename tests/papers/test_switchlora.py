"""SwitchLoRA, arXiv 2406.06564: the algorithm, its bookkeeping, and what it is good for."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorica
from lorica import Recipe
from lorica.interfaces import Pair
from lorica.methods.schedules.switchlora import pools, ring
from lorica.recipe import registry
from lorica.tensors import dtensor_ops
from lorica.tensors.dtensor_ops import seeded
from lorica.training import weight_edits
from models import gpt2, llama, logits
from reference import switchlora as twin

WORD = "switchlora"
Switchlora, Start = registry.find(WORD), registry.find(WORD, "inits")


def own(optimizer):
    return optimizer.param_groups[0]["lorica"]["schedules"][WORD]


def two_layers(method, ranks=(4, 3), total_steps=80, seed=7, device="cpu"):
    """10 -> 12 -> 9, with a rank each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 9)).double().to(device)
    pattern = {"0": ranks[0], "2": ranks[1]}
    adapters = lorica.attach(model, method, rank_pattern=pattern, r=4, verbose=False)
    return adapters, lorica.optimizer(adapters, lr=0.02, total_steps=total_steps, seed=seed)


def backward(adapters, step, rows=6, clip=0.1):
    generator = torch.Generator().manual_seed(step)
    p = next(adapters.model.parameters())
    x = torch.randn(rows, adapters.layers["0"].in_features, generator=generator).to(p)
    adapters.model(x).square().mean().backward()
    nn.utils.clip_grad_norm_([t.parameter for t in adapters.trained()], clip)


def run(adapters, optimizer, first, last):
    for step in range(first, last):
        backward(adapters, step)
        optimizer.step()
        optimizer.zero_grad()


def pairs(adapters):
    return [(pair.A.detach().clone(), pair.B.detach().clone()) for _, pair in adapters.pairs()]


def effective(adapters):
    return [layer.effective()[0].detach().clone() for _, layer in adapters]


# -- the algorithm ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"interval": 10, "ratio": 1.0},
        {"interval": 4, "freeze": 2, "ratio": 0.6},
        {"interval": 3, "freeze": 0, "ratio": 0.4, "kappa": 0.3},
        {"interval": 4, "reset": False, "kappa": 1},
        {"interval": 4, "select": "random", "ratio": 2.0, "pools": "device"},
    ],
    ids=str,
)
def test_eighty_steps_equal_the_twin(arguments):
    T = 80
    inside = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    adapters, optimizer = two_layers(f"{WORD}({inside})", total_steps=T)
    fitted = Recipe.parse(f"{WORD}({inside})").schedules[0].fit(T)
    state = own(optimizer)
    layers = [
        twin.Layer(
            layer.store.parameter.detach(), *(p.detach() for p in (pair.A, pair.B)),
            state["A"][name], state["B"][name], pair.scale,
        )
        for (name, layer), (_, pair) in zip(adapters, adapters.pairs(), strict=True)
    ]  # fmt: skip
    options = {k: getattr(fitted, k) for k in ("interval", "ratio", "kappa", "freeze", "reset")}
    counts = []
    for t in range(T):
        backward(adapters, t)
        gradients = [(pair.A.grad, pair.B.grad) for _, pair in adapters.pairs()]
        gradients = [(a.clone(), b.clone()) for a, b in gradients]
        counts += twin.step(
            layers, gradients, t, T, lr=0.02, generator=seeded(f"7/{t}/{WORD}"),
            random=fitted.select == "random", **options,
        )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        for i, ((name, layer), ours) in enumerate(zip(adapters, layers, strict=True)):
            pair = layer.update.delta.pair()
            for got, want in (
                (pair.A, ours.A), (pair.B, ours.B), (layer.store.parameter, ours.W),
                (state["A"][name], ours.pool_A), (state["B"][name], ours.pool_B),
            ):  # fmt: skip
                torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-10)
            slots = state["slots"][:, i, : ours.r].tolist()
            assert slots == [ours.slot_A, ours.slot_B]
            assert int(state["swaps"][i]) % ours.r == ours.p_A
    assert sum(counts) == int(state["swaps"].sum()) and sum(counts) >= 12
    steps = [optimizer.state[p]["step"] for _, pair in adapters.pairs() for p in (pair.A, pair.B)]
    assert any(s.min() < T for s in steps) == fitted.reset


def test_the_trace_of_the_published_code(monkeypatch):
    """m = 64, n = 96, r = 8: slots, who is frozen when, and where the pointers are."""
    ks = [1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0] + [1, 0, 0, 0, 0] * 6
    monkeypatch.setattr(Switchlora, "frequency", lambda self, step, T: ks[step] / 8)
    model = nn.Sequential(nn.Linear(96, 64, bias=False)).double()
    adapters = lorica.attach(model, f"{WORD}(interval=10)", r=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=0.01, total_steps=200)
    state, pair = own(optimizer), next(adapters.pairs())[1]
    assert state["slots"][:, 0].tolist() == [[*range(56, 64)], [*range(60, 64), *range(56, 60)]]
    frozen = {"A": {}, "B": {}}
    for t, _ in enumerate(ks):
        backward(adapters, t)
        before, swaps = effective(adapters)[0], int(state["swaps"][0])
        if t == 6:
            assert swaps % 8 == 4, "A's turn is at 4, B's at 0 again"
            optimizer.param_groups[0]["lr"] = 0.0  # so that only the exchange could move anything
        optimizer.step()
        if t == 6:
            torch.testing.assert_close(effective(adapters)[0], before, rtol=0, atol=1e-15)
            optimizer.param_groups[0]["lr"] = 0.01
        for side, g in (("A", pair.A.grad), ("B", pair.B.grad.T)):
            frozen[side][t] = [i for i, row in enumerate(g) if not row.any()]
        optimizer.zero_grad()
        if int(state["swaps"][0]) == 12:
            break
    assert [frozen["A"][t] for t in (0, 1, 2, 3)] == [[4], [4], [4, 5], [4, 5, 6]]
    assert [frozen["A"][t] for t in (4, 5, 6)] == [[4, 5, 6, 7], [5, 6, 7], [0, 5, 6, 7]]
    assert [frozen["B"][t] for t in (0, 1, 2, 3)] == [[0], [0], [0, 1], [0, 1, 2]]
    assert [frozen["B"][t] for t in (4, 5, 6)] == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]
    assert state["slots"][0, 0].tolist() == [8, 9, 10, 11, 4, 5, 6, 7]
    assert state["slots"][1, 0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


# -- events ----------------------------------------------------------------------------------------


def busy(model, dtype, r=8, targets="all-linear", method="", total_steps=60):
    """An exchange in nearly every step, at rate 0: only exchanges write."""
    text = f"{WORD}(interval=2, freeze=0, kappa=1){method}"
    fields = {"r": r, "target_modules": targets, "dtype": dtype, "verbose": False}
    adapters = lorica.attach(model.to(dtype), text, **fields)
    return adapters, lorica.optimizer(adapters, lr=0.0, total_steps=total_steps)


@pytest.mark.parametrize("method", ["", "+dora", "+kaiming", "+olora", "+rslora", "+select"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_hundred_exchanges_of_either_side_keep_the_weight(method, dtype, bound):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64))
    adapters, optimizer = busy(model, dtype, method=method.removesuffix("+select"))
    dtensor_ops.draw_(next(adapters.pairs())[1].B, torch.Generator().manual_seed(1), bound=0.3)
    start, A = effective(adapters)[0], next(adapters.pairs())[1].A.detach().clone()
    run(adapters, optimizer, 0, 30)
    assert int(own(optimizer)["swaps"][0]) >= 100
    far = (effective(adapters)[0] - start).norm() / start.norm()
    assert far < bound and not torch.equal(next(adapters.pairs())[1].A, A)


@pytest.mark.parametrize("targets", [["c_attn"], ["wte"]])
def test_the_transposed_weight_and_the_embedding(targets):
    model = gpt2(n_layer=1, tie_word_embeddings=False).double()
    adapters, optimizer = busy(model, torch.float64, r=4, targets=targets, method="+dora")
    before = logits(model)
    for _ in range(6):
        ids = torch.arange(7)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert int(own(optimizer)["swaps"].min()) >= 4
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-11)


def one_exchange(arguments="interval=10, freeze=5", k=2, steps=3, monkeypatch=None):
    """A layer that has trained for some steps, then exchanges k vectors of either side."""
    model = nn.Sequential(nn.Linear(12, 10, bias=False)).double()
    monkeypatch.setattr(
        Switchlora, "frequency", lambda self, step, T: k / 8 if step == steps else 0.0
    )
    adapters = lorica.attach(model, f"{WORD}({arguments})", r=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=0.05, total_steps=100)
    run(adapters, optimizer, 0, steps)
    return adapters, optimizer, next(adapters.pairs())[1]


def test_the_gradients_of_the_counterparts_change_and_no_others(monkeypatch):
    adapters, optimizer, pair = one_exchange(monkeypatch=monkeypatch)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    seen = []
    for _ in range(2):
        backward(adapters, 99, clip=math.inf)
        seen.append((pair.A.grad.clone(), pair.B.grad.clone()))
        optimizer.step()
        optimizer.zero_grad()
    assert int(own(optimizer)["swaps"][0]) == 2
    for i in range(8):
        same = [torch.allclose(*g, rtol=0, atol=1e-14) for g in (
            (seen[0][0][i], seen[1][0][i]), (seen[0][1][:, i], seen[1][1][:, i]))]  # fmt: skip
        assert same == [i not in (4, 5), i not in (0, 1)], i  # rows I_B of A, columns I_A of B


@pytest.mark.parametrize("reset", [True, False])
def test_the_counterparts_state_is_zeroed_and_the_exchanged_keep_theirs(reset, monkeypatch):
    adapters, optimizer, pair = one_exchange(
        f"interval=10, reset={reset}, freeze=0", monkeypatch=monkeypatch
    )
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (pair.A, pair.B)]
    backward(adapters, 99)
    seen = []

    def look(optimizer, args, kwargs):  # registered last, so it comes after the schedule's turn
        seen.extend({k: v.clone() for k, v in optimizer.state[p].items()} for p in (pair.A, pair.B))

    optimizer.register_step_pre_hook(look)
    optimizer.step()
    for before, after, fresh, T in zip(state, seen, ((4, 5), (0, 1)), (False, True), strict=True):
        assert set(after) == {"step", "exp_avg", "exp_avg_sq"}
        for name in after:
            old, new = (x.T if T else x for x in (before[name], after[name]))
            for i in range(8):
                if reset and i in fresh:
                    assert old[i].any() and not new[i].any(), (name, i)
                else:
                    assert torch.equal(old[i], new[i]), (name, i)


def test_a_frozen_vector_rests_and_its_first_step_is_half_as_long(monkeypatch):
    """m = v = 0 after five steps without gradient, and a count of six: 0.522·lr."""
    adapters, optimizer, pair = one_exchange(monkeypatch=monkeypatch)
    backward(adapters, 3)
    optimizer.step()
    held = pair.A[4].detach().clone()
    for _ in range(4):
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
        optimizer.step()
        assert torch.equal(pair.A[4], held) and not torch.equal(pair.A[0], held)
    pair.A.grad = torch.ones_like(pair.A)
    optimizer.step()
    moved = (held - pair.A[4].detach()) / 0.05
    torch.testing.assert_close(moved, torch.full_like(moved, 0.522), rtol=1e-3, atol=0)


def test_an_exchange_and_the_reverse_one_restore_everything():
    adapters, optimizer = busy(nn.Sequential(nn.Linear(9, 8)), torch.float64, r=3)
    layer, state = adapters.layers["0"], own(optimizer)
    pair = layer.update.delta.pair()
    pools = {side: state[side]["0"] for side in "AB"}
    kept = [pair.A, pair.B, layer.store.parameter]
    before = [t.detach().clone() for t in kept]
    spare = {side: pool[:5].clone() for side, pool in pools.items()}
    # Row 0 of A and column 1 of B hold slot 5; there, and back to it in the reverse order.
    for side, i, slot in (("A", 0, 2), ("B", 1, 4), ("B", 1, 5), ("A", 0, 5)):
        old = (pair.A if side == "A" else pair.B.T)[[i]].detach().clone()
        coming = torch.tensor([slot])
        weight_edits.swap_(layer, optimizer, side, [i], pools[side][coming].clone())
        pools[side][ring.occupy(state, i=0, side=side, at=[i], slots=coming)] = old
        assert not torch.equal(kept["AB".index(side)], before["AB".index(side)]) or slot == 5
    for got, want in zip(kept, before, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-14)
    for side, pool in pools.items():
        assert torch.equal(pool[:5], spare[side])


# -- bookkeeping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["sequential", "random"])
def test_slots_stay_distinct_and_nothing_at_work_or_vacated_comes(select, monkeypatch):
    """Small pools, so that a slot that is just being left would soon be taken."""
    turns, original = [], ring.turn

    def turn(state, layer, i, side, count, random):
        at, slots = original(state, layer, i, side, count, random)
        held = state["slots"]["AB".index(side), i, : layer.site.r].tolist()
        turns.append((i, side, slots.tolist()))
        assert len(set(at)) == len(at) == len(set(slots.tolist())) == count
        assert not set(slots.tolist()) & set(held), "at work, or just being vacated"
        return at, slots

    monkeypatch.setattr(ring, "turn", turn)
    method = f"{WORD}(interval=2, freeze=0, kappa=1, select={select!r})"
    adapters, optimizer = two_layers(method, ranks=(8, 7))  # c = 10 and 9: two spare ones each
    start = effective(adapters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(adapters, optimizer, 0, 40)
    for got, want in zip(effective(adapters), start, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for i, (r, c) in enumerate(((8, 10), (7, 9))):
        for side in "AB":
            slots = own(optimizer)["slots"]["AB".index(side), i, :r].tolist()
            assert len(set(slots)) == r and set(slots) <= set(range(c))
            came = [s for j, other, slots in turns if (j, other) == (i, side) for s in slots]
            assert set(came) == set(range(c)), "a lap visits all slots"
            if select == "sequential":
                assert came == [j % c for j in range(len(came))]
    assert max(len(s) for _, _, s in turns) == 2, "never more than the spare ones"


def test_the_counts_follow_the_closed_sum():
    T, layers, r = 120, 24, 6
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(layers)))
    method = f"{WORD}(interval=12, ratio=0.5, kappa=0.3, freeze=2)"
    adapters = lorica.attach(model, method, r=r, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=0.0, total_steps=T)
    often = [twin.expected(t, T, r, interval=12, ratio=0.5, kappa=0.3) for t in range(T)]
    theta = math.log(1 / 0.3) / (0.5 * T)
    closed = r / 12 * (1 - math.exp(-theta * T)) / (math.exp(theta) - 1)
    assert sum(often) == pytest.approx(closed)
    for _ in range(T):
        for _, pair in adapters.pairs():
            pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
        optimizer.step()
    swaps = own(optimizer)["swaps"]
    deviation = math.sqrt(layers * sum(s * (1 - s) for s in often))  # all σ < 1: one coin a step
    assert max(often) < 1
    assert abs(int(swaps.sum()) - layers * closed) < 4 * deviation
    assert swaps.unique().numel() > 1, "each layer has its own draws"


@pytest.mark.parametrize(("kappa", "turns"), [(1 / 3, 91), (0.3, 83)])
def test_the_papers_run_exchanges_each_position_some_eighty_times(kappa, turns):
    """1/3 is the paper's word, 0.3 the code's."""
    fitted = Recipe.parse(f"{WORD}(kappa={kappa})").schedules[0].fit(40_000)
    assert (fitted.interval, fitted.freeze) == (40, 5)
    assert f" {turns} times in 40000 steps" in fitted.plan(40_000)
    told = sum(twin.expected(t, 40_000, 1, interval=40, ratio=0.1, kappa=kappa)
               for t in range(40_000))  # fmt: skip
    assert told == pytest.approx(turns, abs=0.5)


def test_the_interval_is_fitted_to_the_run():
    def fit(inside, T):
        fitted = Recipe.parse(f"{WORD}({inside})").schedules[0].fit(T)
        return fitted.interval, fitted.freeze, fitted._sum(T) / fitted.interval

    assert fit("", 1000)[:2] == (40, 5)
    interval, freeze, turns = fit("", 500)
    assert 10 < interval < 40 and freeze == 5 and turns == pytest.approx(2)
    assert fit("", 100)[0] == 10, "never below twice the freeze"
    assert fit("swaps=8", 2000)[2] == pytest.approx(8)
    assert fit("swaps=80, freeze=0", 2000)[2] == pytest.approx(80)
    assert fit("interval=4", 100)[:2] == (4, 2), "a freeze that was left out follows"


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["lora", "rslora", "constant(s=0.5)"])
def test_the_start_has_the_size_of_a_fresh_linear_layer(scale):
    m, n, r = 256, 1024, 64
    s = {"lora": 1 / r, "rslora": r**-0.5, "constant(s=0.5)": 0.5}[scale]
    pair = Pair(nn.Parameter(torch.zeros(r, n)), nn.Parameter(torch.zeros(m, r)), s)
    with torch.no_grad():
        Start().fill(torch.empty(m, n, device="meta"), pair, torch.Generator().manual_seed(0))
    A, B = pair.A.detach(), pair.B.detach()
    for p, std in zip((A, B), twin.init_std(m, n, r, s), strict=True):
        assert float(p.std()) == pytest.approx(std, rel=0.02)
        assert float(p.abs().max()) == pytest.approx(3**0.5 * std, rel=0.01), "uniform"
    assert float((s * B @ A).std()) == pytest.approx((3 * n) ** -0.5, rel=0.02)
    assert float(A.std() / B.std()) == pytest.approx((m / n) ** 0.25, rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_the_start_alone_is_anchored_and_has_a_text(kind):
    from walk import KINDS, adapt, inputs, only

    recipe = Recipe.parse("lora+init.switchlora", r=3)
    assert recipe.text() == "init.switchlora" and recipe.init == Start()
    assert Recipe.from_dict(recipe.to_dict()) == recipe == Recipe.parse("init.Switch-LoRA", r=3)
    assert not recipe.schedules and "base_unchanged" in recipe.given()
    model, x = KINDS[kind](), inputs(kind, 5)
    before, published = model(x), model.layer.weight.clone()
    adapters = adapt(model, "init.switchlora+rslora", r=3)
    assert only(adapters).update.frozen_factors is not None
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    lorica.detach(model)
    assert torch.equal(model.layer.weight, published)


def test_the_base_gives_up_what_the_start_adds():
    model = nn.Sequential(nn.Linear(12, 10)).double()
    W0 = model[0].weight.detach().clone()
    adapters = lorica.attach(model, WORD, r=4, verbose=False)
    layer, pair = adapters.layers["0"], next(adapters.pairs())[1]
    assert pair.scale == 1 / 4 and layer.update.frozen_factors is None
    torch.testing.assert_close(layer.store.parameter, W0 - pair.B @ pair.A / 4)


def test_presets_and_what_replaces_them():
    recipe = Recipe.parse(WORD)
    assert (recipe.r, recipe.lora_alpha, Switchlora.default_learning_rate) == (128, 1, 0.02)
    assert recipe.init == Start() and recipe.rule.name == "vectoradamw"
    assert recipe.text() == WORD and Recipe.parse(f"{WORD}+init.{WORD}") == recipe
    other = Recipe.parse(f"{WORD}+olora")
    assert other.init.name == "olora" and Recipe.parse(other.text()) == other
    assert lorica.cite(WORD).count("@") == 2, "the paper once, and LoRA's"
    assert "2406.06564" in lorica.cite(f"init.{WORD}")
    with pytest.raises(ValueError, match="no choice of the axis `inits`"):
        Recipe.parse("init.dora")
    with pytest.raises(ValueError, match="unknown method `nonsense.switchlora`"):
        Recipe.parse("nonsense.switchlora")


def pools_of(method, r=8, n=48, m=40, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m), nn.Linear(m, n))
    adapters = lorica.attach(model, method, r=r, seed=seed, verbose=False)
    state = own(lorica.optimizer(adapters, lr=0.1, total_steps=1000, seed=5))
    return adapters, {side: state[side] for side in "AB"}


@pytest.mark.parametrize("init", ["", "+gaussian", "+kaiming", "+orthogonal", "+olora", "+pissa"])
def test_spare_vectors_are_of_the_kind_that_is_at_work(init):
    adapters, pools = pools_of(f"{WORD}{init}")
    for name, pair in adapters.pairs():
        for side, p in (("A", pair.A), ("B", pair.B.T)):
            pool = pools[side][name]
            assert pool.shape == (40, p.shape[1])
            assert not pool[-8:].any(), "the last r belong to those at work"
            spare, work = (float(x.detach().square().mean()) for x in (pool[:-8], p))
            assert spare == pytest.approx(work, rel=0.25)
            rows = pool[:-8][:, :3].unique(dim=0)
            assert len(rows) == (32 if work else 1), "no vector comes twice"
    zero = init in ("+gaussian", "+kaiming", "+orthogonal")
    assert all(pool.any() != zero for pool in pools["B"].values())


def test_pools_follow_from_the_seed_and_the_layers_name():
    pools = pools_of(WORD)[1]
    again, other = pools_of(WORD)[1], pools_of(WORD, seed=1)[1]
    for side in "AB":
        for name, pool in pools[side].items():
            assert torch.equal(pool, again[side][name])
            assert not torch.equal(pool, other[side][name])
        assert not torch.equal(pools["A"]["0"][:, :40], pools["A"]["1"])


def test_origin_lora_is_the_usual_start():
    """A uniform with deviation √(1/3)/√in, B and its pool zero."""
    adapters, pools = pools_of(f"{WORD}+kaiming", n=400, m=300)
    pair = next(adapters.pairs())[1]
    assert float(pair.A.detach().std()) == pytest.approx((3 * 400) ** -0.5, rel=0.03)
    assert not pair.B.any() and not any(pool.any() for pool in pools["B"].values())


# -- beside the others -----------------------------------------------------------------------------


def test_without_exchanges_it_is_lora_from_the_same_start():
    from peft import LoraConfig, get_peft_model

    results = []
    for method in (f"{WORD}(interval={10**9}, kappa=1)", f"vectoradamw+init.{WORD}"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
        adapters = lorica.attach(model, method, r=4, lora_alpha=1, verbose=False)
        layer = adapters.layers["0"]
        start = pairs(adapters)
        run(adapters, lorica.optimizer(adapters, lr=0.02), 0, 12)
        results.append(effective(adapters))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    plain = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    theirs = get_peft_model(
        plain,
        LoraConfig(r=4, lora_alpha=1, target_modules=["0", "2"]),
        autocast_adapter_dtype=False,
    )
    with torch.no_grad():
        for i, (name, layer) in zip((0, 2), adapters, strict=True):
            one, pair = theirs.base_model.model[i], layer.update.delta.pair()
            A0, B0 = start[i // 2]
            one.base_layer.weight.copy_(layer.store.parameter - pair.scale * B0 @ A0)
            one.base_layer.bias.copy_(layer.bias)
            one.lora_A["default"].weight.copy_(pair.A)
            one.lora_B["default"].weight.copy_(pair.B)
            assert name == str(i)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)


SHAPES = {"130M": (768, 2048, 12), "250M": (768, 2560, 24), "350M": (1024, 2736, 24)}


@pytest.mark.parametrize(
    ("size", "r", "millions"),
    [("130M", 128, 71.7), ("130M", 256, 94.2), ("250M", 128, 98.9), ("350M", 256, 185.4)],
)
def test_trainable_counts_are_the_papers(size, r, millions):
    """Embeddings, head and norms train as well; these counts are its communication figures."""
    h, f, layers = SHAPES[size]
    config = LlamaConfig(
        vocab_size=32_100, hidden_size=h, intermediate_size=f, num_hidden_layers=layers,
        num_attention_heads=h // 64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    count = lorica.attach(model, WORD, r=r, train_rest=True, verbose=False).summary.trainable
    assert count == 2 * 32_100 * h + (2 * layers + 1) * h + layers * (8 * r * h + 3 * r * (h + f))
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def teach(method, T=400, n=64, r=8):
    """(remaining error of the student, floor for rank r, rank of what was learnt)."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    teacher = torch.randn(n, n, generator=generator) / n**0.5
    model = nn.Sequential(nn.Linear(n, n, bias=False))
    start = model[0].weight.detach().clone()
    adapters = lorica.attach(model, method, r=r, lora_alpha=1, verbose=False)
    pair = next(adapters.pairs())[1]
    base = start - pair.scale * (pair.B @ pair.A).detach()
    floor = torch.linalg.svdvals(teacher - base)[r:].square().sum() / n
    optimizer = lorica.optimizer(adapters, lr=0.05, total_steps=T)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T)
    for _ in range(T):
        x = torch.randn(128, n, generator=generator)
        (model(x) - x @ teacher.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    learnt = effective(adapters)[0]
    error = (learnt - teacher).square().sum() / n
    return float(error), float(floor), torch.linalg.svdvals(learnt - start), optimizer


def test_a_student_passes_the_floor_of_its_rank():
    error, floor, values, _ = teach(f"vectoradamw+init.{WORD}")
    assert error == pytest.approx(floor, rel=2e-3), "LoRA stops at Eckart and Young's floor"
    assert values[16] < 1e-4 < values[15], "B·A − B₀·A₀ has rank 2r"
    errors = []
    for interval in (40, 10):
        error, floor, values, optimizer = teach(f"{WORD}(interval={interval})")
        swaps = 2 * int(own(optimizer)["swaps"][0])
        most = min(64, 16 + swaps)
        rank = int((values > 1e-4).sum())
        assert 20 < rank <= most
        errors.append(error / floor)
    assert errors[1] < errors[0] < 0.75 and errors[1] < 0.55, "the more turns, the lower"


# -- resume and transit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside", ["interval=6, freeze=3, ratio=1.0", "interval=4, select='random', kappa=1",
               "interval=4, pools='device', kappa=1"]
)  # fmt: skip
def test_a_resumed_run_is_the_straight_run(inside):
    T, cuts = 24, (5, 6, 12, 18)
    straight, optimizer = two_layers(f"{WORD}({inside})", total_steps=T)
    files, swaps = {}, {}
    for step in range(T):
        if step in cuts:
            files[step] = io.BytesIO()
            torch.save((straight.state_dict(), optimizer.state_dict()), files[step])
            swaps[step] = own(optimizer)["swaps"].clone()
        run(straight, optimizer, step, step + 1)
    for cut in cuts:
        files[cut].seek(0)
        tensors, saved = torch.load(files[cut], weights_only=True)
        adapters, resumed = two_layers(f"{WORD}({inside})", total_steps=T)
        adapters.load_state_dict(tensors)
        resumed.load_state_dict(saved)
        run(adapters, resumed, cut, T)
        assert adapters.fingerprint() == straight.fingerprint(), cut
        for side in "AB":
            for name, pool in own(optimizer)[side].items():
                assert torch.equal(pool, own(resumed)[side][name])
        assert torch.equal(own(optimizer)["slots"], own(resumed)["slots"])
    assert int(swaps[12].sum()) >= 2 and int((own(optimizer)["swaps"] - swaps[12]).sum()) >= 2


def test_loading_into_a_running_optimizer_forgets_what_was_ordered_ahead():
    adapters, optimizer = two_layers(f"{WORD}(interval=4, kappa=1)", total_steps=24)
    run(adapters, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save((adapters.state_dict(), optimizer.state_dict()), file)
    run(adapters, optimizer, 4, 12)
    end = adapters.fingerprint()
    file.seek(0)
    tensors, saved = torch.load(file, weights_only=True)
    adapters.load_state_dict(tensors)
    optimizer.load_state_dict(saved)
    run(adapters, optimizer, 4, 12)
    assert adapters.fingerprint() == end


def test_what_is_fetched_ahead_is_what_would_be_fetched_in_time(monkeypatch):
    ends = []
    for ahead in (True, False):
        adapters, optimizer = two_layers(f"{WORD}(interval=3, freeze=1, kappa=1)", ranks=(8, 7))
        if not ahead:
            monkeypatch.setattr(pools.PoolTransfer, "take", lambda self, step: None)
        run(adapters, optimizer, 0, 20)
        ends.append((adapters.fingerprint(), own(optimizer)["slots"]))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])


def test_pools_take_no_part_in_the_graph_and_are_where_they_belong():
    adapters, optimizer = two_layers(f"{WORD}(interval=4, kappa=1)")
    run(adapters, optimizer, 0, 6)
    for side in "AB":
        for name, pool in own(optimizer)[side].items():
            assert not pool.requires_grad and pool.device.type == "cpu"
            assert pool.dtype == adapters.layers[name].update.delta.A.dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("pools", ["cpu", "device"])
@pytest.mark.parametrize("select", ["sequential", "random"])
def test_a_gpu_computes_the_same_wherever_the_pools_lie(pools, select):
    ends = []
    for device in ("cpu", "cuda"):
        method = f"{WORD}(interval=3, freeze=1, kappa=1, select={select!r}, pools={pools!r})"
        adapters, optimizer = two_layers(method, ranks=(8, 7), device=device)  # two spare ones each
        run(adapters, optimizer, 0, 30)
        held = [pool for side in "AB" for pool in own(optimizer)[side].values()]
        assert {p.device.type for p in held} == {device if pools == "device" else "cpu"}
        ends.append([t.cpu() for t in (*adapters.state_dict().values(), *held)])
        assert int(own(optimizer)["swaps"].min()) > 8
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here")
def test_it_is_the_same_on_shards():
    methods = [f"{WORD}(interval=4, freeze=1, kappa=1)", f"{WORD}(interval=3, kappa=1,"
               " select='random', pools='device')"]  # fmt: skip
    script = Path(__file__).parents[1] / "rules" / "sharded_rules.py"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        *("--nproc-per-node=2", str(script), *methods),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    for method in methods:
        assert f"ok {method}" in done.stdout.splitlines(), done.stderr[-3000:]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("interval=9, freeze=5", r"interval=9, freeze=5.*at least 10 steps.*`freeze=4`"),
        ("interval=1", "at least 2 steps; type `interval=2`"),
        ("interval=20, swaps=3", "either follows from the other; leave one out"),
        ("interval=True", "a number of steps above 0"),
        ("kappa=1.5", "a number above 0, at most 1"),
        ("kappa=None", "a number above 0, at most 1"),
        ("ratio=0", "a number above 0"),
        ("freeze=-1", "whole steps, at least 0, e.g. 5; 0: none"),
        ("select='ring'", "allowed: 'sequential', 'random'"),
        ("pools='gpu'", "allowed: 'cpu', 'device'"),
        ("reset='step'", "allowed: True, False"),
    ],
)
def test_arguments_that_make_no_sense(inside, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(f"{WORD}({inside})")


@pytest.mark.parametrize(
    ("inside", "T", "message"),
    [
        ("", None, "give `total_steps`"),
        ("swaps=3, kappa=1", None, "give `total_steps`"),
        ("interval=100000", 100, r"exchanges a position 8\.6e-05 times.*at most 8\.61"),
        ("swaps=80", 1000, r"at least 10 are needed.*at most `swaps=9`"),
        ("swaps=20", 1000, r"`freeze=2` beside it"),
    ],
)
def test_runs_that_do_not_fit(inside, T, message):
    adapters = lorica.attach(
        nn.Sequential(nn.Linear(8, 8)), f"{WORD}({inside})", r=3, verbose=False
    )
    with pytest.raises(ValueError, match=message):
        lorica.optimizer(adapters, lr=0.1, total_steps=T)


@pytest.mark.parametrize("r", [1, 6])
def test_a_rank_at_which_nothing_can_be_exchanged(r):
    model = nn.ModuleDict({"first": nn.Linear(9, 9), "small": nn.Linear(8, 6)})
    message = r"not below \(as `switchlora` needs\).*small \(6 x 8\)" if r == 6 else (
        rf"'small' \(6 x 8\) at r={r}: at ranks from 2 to 5"
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        adapters = lorica.attach(model, WORD, r=4, rank_pattern={"small": r}, verbose=False)
        lorica.optimizer(adapters, lr=0.1, total_steps=100)


def test_rules_without_a_count_per_vector_are_refused():
    for rule in ("adamw", "lorarite"):
        with pytest.raises(ValueError, match="`switchlora` needs `(row_state|vector_step)`"):
            Recipe.parse(f"{WORD}+{rule}")


def test_a_frozen_a_is_exchanged_as_well():
    adapters = lorica.attach(llama(num_hidden_layers=1), f"{WORD}(interval=4)+lorafa", r=4,
                             verbose=False)  # fmt: skip
    optimizer = lorica.optimizer(adapters, lr=0.02, total_steps=20)
    A = [a for a, _ in pairs(adapters)]
    ids = torch.arange(7)[None]
    for _ in range(8):
        adapters.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [not torch.equal(a, b) for a, (b, _) in zip(A, pairs(adapters), strict=True)]
    assert changed == [bool(k) for k in own(optimizer)["swaps"]] and any(changed)
