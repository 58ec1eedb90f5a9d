"""What every rule gets from the one optimizer they share."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from walk import allowed

import lorica
from lorica import Recipe
from lorica.methods.rules import _engine
from lorica.recipe import registry
from lorica.tensors import dtensor_ops
from lorica.training import weight_edits
from models import llama, train

# Rules of factors; one that brings its own weights has its tests in `papers`.
BESIDE = [w for w in registry.names("rules") if allowed(f"dora+{w}")]
RULES = [w for w in BESIDE if issubclass(registry.find(w), _engine.EngineRule)]
PAIR_RULES = [w for w in RULES if issubclass(registry.find(w), _engine.PairRule)]
VARIANTS = [
    *RULES, "riemannian(inner='sgd')", "riemannian(delta=0)", "lorarite(escape=True, skip=5)",
]  # fmt: skip


def stacked(layers=2, *, r=2, dtype=torch.float64, size=6, method="lora", **fields):
    model = nn.Sequential(*(nn.Linear(size, size, dtype=dtype) for _ in range(layers)))
    return lorica.attach(model, method, r=r, verbose=False, **fields)


def set_gradients(adapters, seed=0, by=1.0):
    generator = torch.Generator().manual_seed(seed)
    for t in adapters.trained():
        p = t.parameter
        p.grad = by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def steps(adapters, optimizer, count, first=0):
    for i in range(first, first + count):
        set_gradients(adapters, i)
        optimizer.step()
    return adapters.state_dict()


def held(optimizer):
    return {
        (i, j, k): v.clone()
        for i, g in enumerate(optimizer.param_groups)
        for j, p in enumerate(g["params"])
        for k, v in optimizer.state.get(p, {}).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finite(adapters, optimizer):
    values = [*adapters.state_dict().values(), *held(optimizer).values()]
    return all(bool(v.isfinite().all()) for v in values)


# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", PAIR_RULES)
def test_a_pair_is_a_group_and_the_rest_is_grouped_as_ever(word):
    adapters = lorica.attach(
        llama(num_hidden_layers=1), f"dora+{word}", r=4, modules_to_save=["lm_head"], verbose=False
    )
    groups = adapters.param_groups(1e-3, 0.1)
    pairs = [g for g in groups if g.get("pair")]
    sites = dict(adapters.pairs())
    assert [g["site"] for g in pairs] == list(sites)
    for g in pairs:
        pair = sites[g["site"]]
        assert g["params"][0] is pair.A and g["params"][1] is pair.B
        assert (g["scale"], g["ratios"], g["diagonal"]) == (pair.scale, [1.0, 1.0], None)
        assert (g["lr"], g["weight_decay"]) == (1e-3, 0.1)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(t.parameter) for t in adapters.trained()}
    rest = [g for g in groups if not g.get("pair")]
    assert {(g["lr"], g["weight_decay"]) for g in rest} == {(1e-3, 0.1), (1e-3, 0.0)}


@pytest.mark.parametrize("word", [w for w in PAIR_RULES if w != "vectoradamw"])
def test_what_is_in_no_pair_is_trained_by_torchs_adamw(word):
    adapters = stacked(method=f"dora+{word}")
    optimizer = lorica.optimizer(adapters, lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    own = [t.parameter for t in adapters.trained() if t.role == "magnitude"]
    twins = [nn.Parameter(p.detach().clone()) for p in own]
    base = torch.optim.AdamW(twins, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    for i in range(4):
        set_gradients(adapters, i)
        for p, q in zip(own, twins, strict=True):
            q.grad = p.grad
        optimizer.step()
        base.step()
    assert all(torch.equal(p, q) for p, q in zip(own, twins, strict=True))


def test_a_ratio_of_rates_is_the_ratio_of_the_steps():
    """LoRA+ over a pair rule: from the same state B goes λ times as far, A as far."""
    for word in PAIR_RULES:
        moved = {}
        for method in (word, f"{word}+loraplus(loraplus_lr_ratio=8)"):
            torch.manual_seed(0)
            adapters = stacked(1, method=method)
            optimizer = lorica.optimizer(adapters, lr=1e-3)
            pair = next(adapters.pairs())[1]
            before = pair.A.detach().clone(), pair.B.detach().clone()
            steps(adapters, optimizer, 1)
            moved[method] = pair.A.detach() - before[0], pair.B.detach() - before[1]
        (a, b), (a8, b8) = moved.values()
        torch.testing.assert_close(a8, a)
        torch.testing.assert_close(b8, 8 * b)


def test_rates_differ_within_a_stack_and_follow_a_scheduler():
    for word in PAIR_RULES:
        runs = []
        for one_by_one in (False, True):
            torch.manual_seed(0)
            adapters = stacked(3, method=word)
            optimizer = lorica.optimizer(adapters, lr=1e-2)
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = 10.0 ** -(i + 2)
                group["eps"] = 1e-8 * (1 + i * one_by_one * 1e-6)  # no two can be stacked
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            for i in range(3):
                set_gradients(adapters, i)
                optimizer.step()
                scheduler.step()
            runs.append(adapters.state_dict())
        for name, value in runs[0].items():
            torch.testing.assert_close(value, runs[1][name], rtol=1e-6, atol=1e-8)


def test_different_decays_of_a_and_b_are_refused(monkeypatch):
    from lorica.methods.groups.loraplus import LoraPlus

    monkeypatch.setattr(
        LoraPlus, "adjust", lambda self, t, o: {**o, "weight_decay": 0.1 * (t.role == "A")}
    )
    with pytest.raises(ValueError, match="gives A and B different weight decays.*both the same"):
        stacked(method="loraplus+lorarite").param_groups(1e-3, 0.1)


# -- stacking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS)
def test_the_size_of_the_stacks_plays_no_part(method, monkeypatch):
    results = []
    for limit in (1 << 22, 1, 30):
        monkeypatch.setattr(_engine, "STACKED", limit)
        torch.manual_seed(0)
        adapters = stacked(4, method=method)
        results.append(steps(adapters, lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1), 3))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-14)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("word", RULES)
def test_more_layers_are_no_more_calls(word):
    calls = []
    for layers in (2, 7):
        adapters = stacked(layers, method=word, dtype=torch.float32)
        optimizer = lorica.optimizer(adapters, lr=1e-2)
        steps(adapters, optimizer, 12)  # the start-up proof has ended
        set_gradients(adapters)
        with _Count() as count:
            optimizer.step()
        calls.append(count.calls)
    assert calls[0] == calls[1]


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", VARIANTS)
def test_the_state_survives_a_file_bit_for_bit(method, dtype, tmp_path):
    def fresh():
        torch.manual_seed(0)
        adapters = stacked(2, method=f"dora+{method}", size=16, dtype=torch.float32)
        for t in adapters.trained():
            t.parameter.data = t.parameter.data.to(dtype)
        return adapters, lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1)

    straight, optimizer = fresh()
    steps(straight, optimizer, 3)
    torch.save((straight.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    values, saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed, other = fresh()
    resumed.load_state_dict(values)
    other.load_state_dict(saved)
    assert same(held(optimizer), held(other))
    assert all(v.dtype == torch.float32 for v in held(other).values())
    assert same(steps(straight, optimizer, 3, 3), steps(resumed, other, 3, 3))
    assert same(held(optimizer), held(other))
    for state in saved["state"].values():
        for value in state.values():
            assert not any(v.data_ptr() == value.data_ptr() for s in other.state.values()
                           for v in s.values()), "the loaded file is nobody's memory"  # fmt: skip


@pytest.mark.parametrize("method", VARIANTS)
def test_hyperparameters_are_in_the_groups_and_state_is_tensors(method):
    adapters = stacked(method=f"dora+{method}")
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    steps(adapters, optimizer, 1)
    assert all(isinstance(v, torch.Tensor) for s in optimizer.state.values() for v in s.values())
    rule = adapters.recipe.rule
    for group in optimizer.param_groups:
        for name in vars(rule):
            own = {"inner", "relative", "delta"} if not group["pair"] else {"inner"}
            if name not in own and (group["pair"] or name in group):
                if group["pair"] or method_name(method) != "lorarite":
                    assert group[name] == getattr(rule, name)


def method_name(method):
    return method.partition("(")[0]


@pytest.mark.parametrize("method", VARIANTS)
def test_the_optimizer_can_be_copied_and_pickled(method):
    adapters = stacked(method=method)
    rule = adapters.recipe.rule
    optimizer = rule.make(adapters.param_groups(1e-2), {})
    steps(adapters, optimizer, 2)
    both = copy.deepcopy((adapters.model, optimizer))
    other = lorica.Adapters.of(both[0])
    assert same(steps(adapters, optimizer, 2, 2), steps(other, both[1], 2, 2))
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.rule == rule and same(held(again), held(optimizer))


@pytest.mark.parametrize("word", RULES)
def test_accelerate_prepares_it(word):
    from accelerate import Accelerator

    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        adapters = stacked(method=f"dora+{word}", dtype=torch.float32)
        optimizer = lorica.optimizer(adapters, lr=1e-2)
        used = Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer
        steps(adapters, used, 3)
        results.append(adapters.state_dict())
    assert same(*results)


def test_a_gradient_scaler_sees_nothing_unusual():
    for word in RULES:
        results = []
        for scaled in (False, True):
            torch.manual_seed(0)
            adapters = stacked(method=f"dora+{word}", dtype=torch.float32)
            optimizer = lorica.optimizer(adapters, lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
            for i in range(4):
                optimizer.zero_grad()
                y = adapters.model(x).square().sum()
                scaler.scale(y).backward()
                if scaled and i == 2:  # an overflow: the scaler leaves the step out
                    next(adapters.pairs())[1].B.grad[0, 0] = torch.inf
                if scaled or i != 2:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(adapters.model.parameters(), 1.0)
                    scaler.step(optimizer)
                    scaler.update()
            results.append(adapters.state_dict())
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


def test_a_closure_is_called_with_gradients():
    adapters = stacked(method="lorarite")
    optimizer = adapters.recipe.rule.make(adapters.param_groups(1e-2), {})

    def closure():
        optimizer.zero_grad()
        loss = adapters.model(torch.ones(2, 6, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


# -- what may go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS)
def test_zero_missing_and_huge_gradients_and_empty_groups(method):
    adapters = stacked(2, method=method, dtype=torch.float32)
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    optimizer.add_param_group({"params": [], "lr": 1e-3, "weight_decay": 0.0, "pair": False})
    for by in (0.0, 1e15, 1e-25, 0.0, 1.0):
        set_gradients(adapters, by=by)
        optimizer.step()
        assert finite(adapters, optimizer)
    before = {k: v.clone() for k, v in adapters.state_dict().items()}
    state = held(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert same(adapters.state_dict(), before) and same(held(optimizer), state)


@pytest.mark.parametrize("method", VARIANTS)
def test_a_factor_without_a_gradient_rests_with_its_state(method):
    adapters = stacked(1, method=method)
    optimizer = lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1)
    pair = next(adapters.pairs())[1]
    for missing, other in ((pair.A, pair.B), (pair.B, pair.A)):
        steps(adapters, optimizer, 2)
        before, state = missing.detach().clone(), copy.deepcopy(optimizer.state[missing])
        was = other.detach().clone()
        set_gradients(adapters, 9)
        missing.grad = None
        optimizer.step()
        assert torch.equal(missing, before) and not torch.equal(other, was)
        assert same(optimizer.state[missing], state)


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("case", ["zero B", "zero both", "equal rows", "tiny", "wide rank"])
def test_singular_factors(method, case):
    r, size = (4, 3) if case == "wide rank" else (3, 6)
    A, B = torch.randn(r, size), torch.randn(5, r)
    if case == "zero B":
        B.zero_()
    elif case == "zero both":
        A.zero_(), B.zero_()
    elif case == "equal rows":
        A[1] = A[0]
        B[:, 2] = B[:, 1]
    elif case == "tiny":
        A, B = A * 1e-25, B * 1e-25
    A, B = nn.Parameter(A), nn.Parameter(B)
    rule = Recipe.parse(method).rule
    group = {
        "params": [A, B], "pair": True, "site": "s", "scale": 2.0, "ratios": [1.0, 1.0],
        "diagonal": None, "lr": 1e-2, "weight_decay": 0.1,
    }  # fmt: skip
    group = group if method_name(method) in PAIR_RULES else {**group, "pair": False}
    optimizer = rule.make([group], {})
    target = torch.randn(5, size)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = (B @ A - target).square().mean()
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
        assert A.isfinite().all() and B.isfinite().all()
    if case in ("zero B", "equal rows", "wide rank"):
        assert loss.item() < first


def test_a_diagonal_between_the_factors_counts_into_the_partner():
    """ΔW = B·diag(E)·A steps as the pair (A, B·diag(E)) does for A, (diag(E)·A, B) for B."""
    A, B, E = torch.randn(3, 6), torch.randn(5, 3), torch.tensor([[1.0], [0.0], [-2.0]])
    for word in ("riemannian", "lorarite"):
        rule = Recipe.parse(word).rule

        def stepped(A, B, gA, gB, E=None, rule=rule):
            A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
            group = {
                "params": [A, B], "pair": True, "site": "", "scale": 1.0, "ratios": [1.0, 1.0],
                "diagonal": None if E is None else [1, 0], "lr": 1e-2, "weight_decay": 0.0,
            }  # fmt: skip
            groups = [group]
            if E is not None:
                E = nn.Parameter(E.clone())
                groups.append({"params": [E], "lr": 1e-2, "weight_decay": 0.0, "pair": False})
            optimizer = rule.make(groups, {})
            A.grad, B.grad = gA.clone(), gB.clone()
            optimizer.step()
            return A.detach(), B.detach()

        gA, gB = torch.randn(3, 6), torch.randn(5, 3)
        a, b = stepped(A, B, gA, gB, E)
        clip = "" if word == "riemannian" else "(clip=0)"
        rule = Recipe.parse(word + clip).rule
        free = (a, b) if word == "riemannian" else stepped(A, B, gA, gB, E, rule)
        torch.testing.assert_close(free[0], stepped(A, B * E.T, gA, gB, rule=rule)[0])
        torch.testing.assert_close(free[1], stepped(E * A, B, gA, gB, rule=rule)[1])


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("sgd", {"betas": (0.9, 0.99)}, "`betas=.*` has no effect with the rule `sgd`"),
        ("lorarite", {"momentum": 0.9}, "`momentum=0.9` has no effect"),
        ("lorarite", {"eps": 1e-4}, "`eps=0.0001`.*write `lorarite"),
        ("riemannian", {"betas": (0.9, 1.0)}, r"two numbers in \[0, 1\)"),
        ("vectoradamw", {"eps": 0.0}, "a number above 0, e.g. 1e-8"),
        ("riemannian(inner='sgd')", {"momentum": 1.5}, r"a number in \[0, 1\), e.g. 0.9"),
    ],
)
def test_an_option_without_effect_or_out_of_range_is_refused(method, options, text):
    with pytest.raises(ValueError, match=text):
        lorica.optimizer(stacked(method=method), lr=1e-2, **options)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("riemannian(delta=-1)", "a number, at least 0, e.g. 1e-2"),
        ("riemannian(inner='lion')", "allowed: 'adamw', 'sgd'"),
        ("riemannian(relative=1)", "allowed: True, False"),
        ("lorarite(clip=-1)", "a norm, at least 0"),
        ("lorarite(skip=-0.5)", "an RMS, at least 0"),
        ("lorarite(escape='yes')", "allowed: True, False"),
        ("lorarite(betas=(0.9, 1.0))", r"two numbers in \[0, 1\)"),
        ("full+lorarite", "`lorarite` needs `pair`"),
    ],
)
def test_a_rule_checks_its_arguments(method, text):
    with pytest.raises(ValueError, match=text):
        Recipe.parse(method)


# -- moves, embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS)
def test_a_merged_pair_starts_anew(method):
    adapters = stacked(1, method=method)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    steps(adapters, optimizer, 3)
    layer = adapters.layers["0"]
    weight_edits.merge_(
        layer, optimizer, link=1, init=adapters.recipe.init,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert not any(v.any() for v in held(optimizer).values())
    start = {k: v.clone() for k, v in adapters.state_dict().items()}
    fresh = stacked(1, method=method)
    with torch.no_grad():
        for t, u in zip(fresh.trained(), adapters.trained(), strict=True):
            t.parameter.copy_(u.parameter)
    other = lorica.optimizer(fresh, lr=1e-2)
    steps(adapters, optimizer, 3)
    steps(fresh, other, 3)
    assert not same(adapters.state_dict(), start)
    for t, u in zip(fresh.trained(), adapters.trained(), strict=True):
        assert torch.equal(t.parameter, u.parameter)


@pytest.mark.parametrize("word", BESIDE)
def test_rows_can_start_anew_exactly_where_that_is_declared(word):
    adapters = stacked(1, method=word)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    steps(adapters, optimizer, 2)
    pair = next(adapters.pairs())[1]
    if "row_state" not in registry.find(word).gives:
        with pytest.raises(ValueError, match="rows cannot be reset in it"):
            dtensor_ops.zero_rows(pair.A, [1], 0, optimizer)
        return
    dtensor_ops.zero_rows(pair.A, [1], 0, optimizer)
    dtensor_ops.zero_rows(pair.B, [1], 1, optimizer)
    per_vector = "vector_step" in registry.find(word).gives
    for name, value in optimizer.state[pair.A].items():
        if value.numel() > 1:
            assert not value[1].any() and value[0].any(), name
        assert name != "step" or (value.numel() > 1) == per_vector


@pytest.mark.parametrize("word", BESIDE)
def test_a_row_without_a_gradient_stays_exactly_where_that_is_declared(word):
    """Without momentum and decay: other ranks' gradients do not reach it."""
    adapters = stacked(1, r=3, method=word)
    pair = next(adapters.pairs())[1]
    with torch.no_grad():
        pair.B.normal_(generator=torch.Generator().manual_seed(1))
    optimizer = lorica.optimizer(adapters, lr=0.1)
    set_gradients(adapters)
    pair.A.grad[1], pair.B.grad[:, 2] = 0, 0
    before = pair.A.detach().clone(), pair.B.detach().clone()
    optimizer.step()
    declared = "row_wise" in registry.find(word).gives
    assert torch.equal(pair.A[1], before[0][1]) == declared
    assert torch.equal(pair.B[:, 2], before[1][:, 2]) == declared
    assert not torch.equal(pair.A[0], before[0][0])


@pytest.mark.parametrize("word", PAIR_RULES)
def test_a_count_that_is_read_at_every_step_is_loaded_to_where_it_was_made(word):
    """Of what is in no pair on the CPU, as torch's own: on a device each would be waited for."""

    def made(device: str):
        pair, plain = ([nn.Parameter(torch.ones(2, 2, device=device))] * n for n in (2, 1))
        pair[1] = nn.Parameter(torch.ones(2, 2, device=device))
        groups = [
            {"params": pair, "pair": True, "site": "0", "scale": 1.0, "ratios": [1.0, 1.0],
             "diagonal": None, "lr": 0.1, "weight_decay": 0.0},
            {"params": plain, "lr": 0.1, "weight_decay": 0.0},
        ]  # fmt: skip
        return Recipe.parse(word).rule.make(groups, {}), pair[0], plain[0]

    optimizer, pair, plain = made("cpu")
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[plain]["step"].ndim == 0
    other, far, away = made("meta")  # stands for any device
    other.load_state_dict(optimizer.state_dict())
    assert other.state[away]["step"].device.type == "cpu" and other.state[away]["step"] == 1
    moved = [v for k, v in other.state[away].items() if k != "step"]
    moved += [*other.state[far].values()] if other.state[far] else []
    assert moved and all(v.is_meta for v in moved)


class Rounded(TorchDispatchMode):
    """Products of float32 matrices lose all but ten digits of their factors, as in TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            args = tuple(
                (a.view(torch.int32) & -(1 << 13)).view(torch.float32)
                if a.dtype is torch.float32
                else a
                for a in map(torch.Tensor.contiguous, args)
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("word", [w for w in PAIR_RULES if w != "vectoradamw"])
def test_the_algebra_of_a_pair_is_not_rounded_with_the_models_products(word):
    results = []
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.manual_seed(0)
        adapters = stacked(2, r=4, size=12, method=word, dtype=torch.float32)
        with torch.no_grad():
            for _, pair in adapters.pairs():
                pair.B.normal_(generator=torch.Generator().manual_seed(1))
        optimizer = lorica.optimizer(adapters, lr=0.1)
        try:
            torch.set_float32_matmul_precision(precision)
            with Rounded() if precision == "high" else contextlib.nullcontext():
                steps(adapters, optimizer, 3)
        finally:
            torch.set_float32_matmul_precision(before)
        results.append({n: p.clone() for n, p in adapters.state_dict().items()})
    for name, exact in results[0].items():
        torch.testing.assert_close(results[1][name], exact, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", VARIANTS)
def test_an_adapted_embedding_trains(method):
    model = llama(num_hidden_layers=1)
    adapters = lorica.attach(
        model, method, r=4, target_modules=["embed_tokens", "q_proj"], verbose=False
    )
    lr = 1e-2 if "sgd" not in method else 1e-1
    losses = train(adapters, lorica.optimizer(adapters, lr=lr), 8)
    delta = adapters.layers["model.embed_tokens"].update.weight(None)
    assert delta.abs().max() > 0 and all(torch.tensor(losses).isfinite())
