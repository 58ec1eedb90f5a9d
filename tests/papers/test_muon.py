"""Muon (Jordan 2024; arXiv 2502.16982): its equations, torch's code, and what is claimed of it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lorica
from lorica import Recipe
from lorica.methods.rules import _engine, muon
from models import gpt2, llama, train
from reference import muon as twin

SHAPES = [(12, 8), (8, 12), (9, 9), (12, 8), (5, 17)]
LR = 0.02


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(weights, step, by=1.0):
    return [by * draw(*w.shape, seed=100 * step + i).to(w.dtype) for i, w in enumerate(weights)]


def run(made, weights, steps, first=0, by=1.0):
    for step in range(first, first + steps):
        for w, g in zip(weights, gradients(weights, step, by), strict=True):
            w.grad = g
        made.step()
    return [w.detach().clone() for w in weights]


def optimizer(weights, *, decay=0.0, lr=LR, transposed=False, **arguments):
    """The rule over bare matrices, as the adapters would hand them out."""
    text = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    group = {
        "params": [nn.Parameter(w.clone()) for w in weights], "lr": lr, "weight_decay": decay,
        "matrices": True, "transposed": transposed,
    }  # fmt: skip
    made = Recipe.parse(f"full+muon({text})" if text else "full+muon").rule.build([group], {})
    return made, made.param_groups[0]["params"]


@pytest.fixture
def exact(monkeypatch):
    """The iteration in float64, so that it can be compared with equations."""
    monkeypatch.setattr(muon, "PRECISION", torch.float64)


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ["match_rms_adamw", "original"])
def test_steps_equal_the_equations_across_matrices_of_unequal_shapes(exact, name, nesterov):
    start = [draw(*s, seed=i) for i, s in enumerate(SHAPES)]
    made, weights = optimizer(start, decay=0.1, adjust_lr_fn=name, nesterov=nesterov)
    run(made, weights, 12)
    for w, t in zip(weights, twins(start, 12, name=name, nesterov=nesterov), strict=True):
        torch.testing.assert_close(w.detach(), t, rtol=0, atol=1e-9)


def twins(start, steps, **arguments):
    weights, states = [w.clone() for w in start], [{} for _ in start]
    for step in range(steps):
        weights = [
            twin.step(w, g, s, lr=LR, decay=0.1, **arguments)
            for w, g, s in zip(weights, gradients(start, step), states, strict=True)
        ]
    return weights


@pytest.mark.parametrize("ns_steps", [1, 3, 5])
def test_singular_vectors_stay_and_singular_values_go_through_the_polynomial(exact, ns_steps):
    for shape in SHAPES:
        N = draw(2, *shape)
        turned = muon.orthogonalised(N, ns_steps)
        for one, result in zip(N, turned, strict=True):
            torch.testing.assert_close(result, twin.orthogonalised(one, ns_steps))


def transposed_factor(monkeypatch):
    right = muon.adjustment
    monkeypatch.setattr(muon, "adjustment", lambda out, inner, name: right(inner, out, name))


def one_momentum_for_a_stack(monkeypatch):
    inner = muon.MatrixOptimizer._state

    def state(self, p, name, shape, like):
        first = next(q for q in self.param_groups[0]["params"] if q.shape == p.shape)
        return inner(self, first, name, shape, like)

    monkeypatch.setattr(muon.MatrixOptimizer, "_state", state)


def no_momentum(monkeypatch):
    inner = muon.MatrixOptimizer._move
    monkeypatch.setattr(
        muon.MatrixOptimizer, "_move", lambda self, p, g: inner(self, p, {**g, "momentum": 0.0})
    )


def transposed_result(monkeypatch):
    inner = muon.orthogonalised
    monkeypatch.setattr(
        muon, "orthogonalised",
        lambda N, steps: inner(N, steps) if N.shape[1] != N.shape[2] else inner(N, steps).mT,
    )  # fmt: skip


def a_step_late(monkeypatch):
    """The gradient of the step before."""
    held, inner = {}, muon.MatrixOptimizer._move

    def move(self, parameters, group):
        now = [p.grad for p in parameters]
        for p, g in zip(parameters, now, strict=True):
            p.grad = held.get(id(p), torch.zeros_like(p))
            held[id(p)] = g
        inner(self, parameters, group)

    monkeypatch.setattr(muon.MatrixOptimizer, "_move", move)


def decay_at_the_adjusted_rate(monkeypatch):
    inner = muon.MatrixOptimizer._move

    def move(self, parameters, group):
        f = muon.adjustment(*parameters[0].shape, group["adjust_lr_fn"])
        inner(self, parameters, {**group, "weight_decay": f * group["weight_decay"]})

    monkeypatch.setattr(muon.MatrixOptimizer, "_move", move)


@pytest.mark.parametrize(
    "fault",
    [transposed_factor, one_momentum_for_a_stack, no_momentum, transposed_result, a_step_late,
     decay_at_the_adjusted_rate],
)  # fmt: skip
def test_a_planted_fault_leaves_the_twins_trajectory(exact, fault, monkeypatch):
    fault(monkeypatch)
    start = [draw(*s, seed=i) for i, s in enumerate(SHAPES)]
    made, weights = optimizer(start, decay=0.1, adjust_lr_fn="original")
    run(made, weights, 12)
    want = twins(start, 12, name="original")
    gap = max((w - t).abs().max().item() for w, t in zip(weights, want, strict=True))
    assert gap > 1e-3


# -- torch's code ----------------------------------------------------------------------------------

WIDE = [(64, 32), (64, 32), (32, 64), (64, 64), (96, 64), (64, 32)]


def same_kernels() -> bool:
    """Whether a batched product sums in the order of a single one on this machine."""
    for m, n in {(min(s), max(s)) for s in WIDE}:
        X, S = draw(3, m, n).bfloat16(), draw(3, m, m).bfloat16()
        many = torch.baddbmm(X, S, X, beta=0.5), torch.baddbmm(S, S, S, alpha=2.0), X @ X.mT
        for i in range(3):
            alone = (
                torch.addmm(X[i], S[i], X[i], beta=0.5),
                torch.addmm(S[i], S[i], S[i], alpha=2.0),
                X[i] @ X[i].T,
            )
            if not all(torch.equal(a[i], b) for a, b in zip(many, alone, strict=True)):
                return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ["match_rms_adamw", "original"])
def test_it_is_torchs_muon(name, nesterov, dtype):
    """To the bit where the same sums are taken in the same order. Elsewhere one rounding of
    bfloat16 may differ, which the iteration magnifies at small singular values."""
    for shapes in (WIDE, SHAPES):
        start = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
        made, weights = optimizer(start, decay=0.1, adjust_lr_fn=name, nesterov=nesterov)
        others = [nn.Parameter(w.clone()) for w in start]
        base = torch.optim.Muon(
            others, lr=LR, weight_decay=0.1, adjust_lr_fn=name, nesterov=nesterov
        )
        run(made, weights, 8)
        run(base, others, 8)
        for w, t, first in zip(weights, others, start, strict=True):
            if shapes is WIDE and same_kernels():
                assert torch.equal(w, t)
            assert (w - t).norm() <= 0.02 * (t - first).norm()


# -- what is claimed of it -------------------------------------------------------------------------


def test_singular_values_of_a_step_are_near_one():
    """Jordan: between 0.7 and 1.2 or so, from all that are not tiny."""
    for shape in [(64, 64), (128, 32), (32, 128)]:
        U, _, Vt = torch.linalg.svd(draw(*shape), full_matrices=False)
        sigma = torch.logspace(-1.5, 0, min(shape), dtype=torch.float64)
        (turned,) = muon.orthogonalised((U * sigma) @ Vt[None], 5)
        values = torch.linalg.svdvals(turned.double())
        assert values.min() > 0.6 and values.max() < 1.25, (values.min(), values.max())


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_a_step_has_the_root_mean_square_of_adamws(shape):
    """Moonshot: 0.2·η whatever the shape."""
    start = [torch.zeros(shape)]
    moved = run(*optimizer(start, lr=1.0), 1)[0]
    assert 0.16 < moved.square().mean().sqrt() < 0.22


def test_the_size_of_a_gradient_plays_no_part():
    start = [draw(*s, seed=i) for i, s in enumerate(SHAPES)]
    for one, other in zip(
        run(*optimizer(start), 4), run(*optimizer(start), 4, by=2.0**-12), strict=True
    ):
        assert torch.equal(one, other), "powers of two round nothing"


def test_no_gradient_direction_is_preferred(exact):
    """Rotating inputs and outputs rotates the step."""
    G, (Q, _), (P, _) = draw(8, 12), torch.linalg.qr(draw(8, 8)), torch.linalg.qr(draw(12, 12))
    one, other = muon.orthogonalised(G[None], 5)[0], muon.orthogonalised((Q @ G @ P)[None], 5)[0]
    torch.testing.assert_close(Q @ one @ P, other)


def test_a_zero_gradient_is_no_step():
    start = [draw(8, 12)]
    assert torch.equal(run(*optimizer(start), 1, by=0.0)[0], start[0])


def test_the_whole_of_a_step_is_in_the_stack():
    """In parts or as a whole, whichever fits the memory."""
    start = [draw(64, 32, seed=i) for i in range(5)]
    whole = run(*optimizer(start), 3)
    held, _engine.STACKED = _engine.STACKED, 64 * 32 * 2
    try:
        for one, other in zip(whole, run(*optimizer(start), 3), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-2 * LR)
    finally:
        _engine.STACKED = held


# -- in a model ------------------------------------------------------------------------------------


def test_hidden_matrices_alone_are_orthogonalised_and_the_rest_is_torchs_adamw():
    adapters = lorica.attach(llama(num_hidden_layers=1), "full+muon(adamw_lr=5e-3)", verbose=False)
    made = lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1)
    mine = {id(p) for g in made.param_groups if "matrices" in g for p in g["params"]}
    names = {t.name for t in adapters.trained() if id(t.parameter) in mine}
    linear = {f"{n}.weight" for n, m in adapters.model.named_modules() if type(m) is nn.Linear}
    assert names == linear - {"lm_head.weight"}
    others = [t for t in adapters.trained() if id(t.parameter) not in mine]
    copies = [nn.Parameter(t.parameter.detach().clone()) for t in others]
    groups = [
        {"params": [t for t in copies if t.ndim == d], "weight_decay": decay}
        for d, decay in ((1, 0.0), (2, 0.1))
    ]
    base = torch.optim.AdamW(groups, lr=5e-3)
    for step in range(3):
        for i, t in enumerate(adapters.trained()):
            t.parameter.grad = draw(*t.parameter.shape, seed=10 * step + i).float()
        for t, other in zip(others, copies, strict=True):
            other.grad = t.parameter.grad
        made.step()
        base.step()
    assert all(torch.equal(t.parameter, c) for t, c in zip(others, copies, strict=True))


@pytest.mark.parametrize(
    ("method", "rate"),
    [("full+muon", 1e-2), ("full+muon(adjust_lr_fn='original')", 3e-4),
     ("full+muon(adjust_lr_fn='original', adamw_lr=0.0)", 0.0)],
)  # fmt: skip
def test_the_rate_of_what_adamw_moves(method, rate):
    adapters = lorica.attach(llama(num_hidden_layers=1), method, verbose=False)
    made = lorica.optimizer(adapters, lr=1e-2)
    assert {g["lr"] for g in made.param_groups if "matrices" in g} == {1e-2}
    assert {g["lr"] for g in made.param_groups if "matrices" not in g} == {rate}
    modules = adapters.param_groups(1e-2, modules_lr=0.5)
    assert {g["lr"] for g in modules if "matrices" not in g} == {0.5}, "the caller's rate wins"


def test_a_transposed_weight_is_scaled_as_the_matrix_it_stands_for(exact):
    """GPT-2 stores (in, out): its c_fc has four times as many outputs as inputs."""
    adapters = lorica.attach(
        gpt2().double(), "full+muon(adjust_lr_fn='original')", dtype=torch.float64, verbose=False
    )
    made = lorica.optimizer(adapters, lr=LR)
    weight = adapters.model.transformer.h[0].mlp.c_fc.weight
    start, G = weight.detach().clone(), draw(*weight.shape)
    assert weight.shape == (32, 128)
    weight.grad = G
    made.step()
    want = twin.step(start.T, G.T, {}, lr=LR, name="original").T
    torch.testing.assert_close(weight.detach(), want)


def test_factors_are_moved_each_on_its_own(exact):
    model = nn.Sequential(nn.Linear(7, 6).double(), nn.Linear(6, 7).double())
    adapters = lorica.attach(model, "dora+muon", r=2, verbose=False)
    made = lorica.optimizer(adapters, lr=LR)
    factors = [p for _, pair in adapters.pairs() for p in (pair.A, pair.B)]
    start, states = [p.detach().clone() for p in factors], [{} for _ in factors]
    for step in range(4):
        for i, t in enumerate(adapters.trained()):
            t.parameter.grad = draw(*t.parameter.shape, seed=10 * step + i)
        start = [
            twin.step(w, p.grad, s, lr=LR) for w, p, s in zip(start, factors, states, strict=True)
        ]
        made.step()
    for p, want in zip(factors, start, strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-9)
    moved = {id(p) for g in made.param_groups if "matrices" in g for p in g["params"]}
    assert moved == {id(p) for p in factors}, "a magnitude is no matrix"


@pytest.mark.parametrize("method", ["full+muon", "lora+muon"])
def test_it_resumes_bit_for_bit_and_lowers_the_loss(method, tmp_path):
    fields = {} if "full" in method else {"r": 4}

    def begin():
        adapters = lorica.attach(llama(), method, verbose=False, **fields)
        return adapters, lorica.optimizer(adapters, lr=3e-3, weight_decay=0.1)

    straight, made = begin()
    first = train(straight, made, 3)
    torch.save((straight.state_dict(), made.state_dict()), tmp_path / "state.pt")
    train(straight, made, 9, first=3)
    resumed, again = begin()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    train(resumed, again, 9, first=3)
    assert resumed.fingerprint() == straight.fingerprint()
    assert train(copy.deepcopy(straight), made, 1)[0] < first[0]


def test_the_state_is_half_of_adamws_for_matrices():
    sizes = {}
    for method in ("full", "full+muon"):
        adapters = lorica.attach(llama(), method, verbose=False)
        sizes[method] = adapters.summary.memory["optimizer"]
    matrices = sum(t.parameter.numel() for t in adapters.trained() if t.matrix)
    assert sizes["full"] - sizes["full+muon"] == 4 * matrices


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here")
def test_full_training_is_the_same_on_shards():
    script = Path(__file__).parents[1] / "rules" / "sharded_rules.py"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        *("--nproc-per-node=2", str(script), "full+muon"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "ok full+muon" in done.stdout.splitlines(), done.stderr[-3000:]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        ("momentum=1.0", r"a number in \[0, 1\)"),
        ("nesterov=1", "allowed: True, False"),
        ("ns_steps=0", "a whole number from 1 to 99"),
        ("ns_steps=100", "a whole number from 1 to 99"),
        ("adjust_lr_fn='none'", "allowed: 'match_rms_adamw', 'original'"),
        ("adamw_lr=-1", "a learning rate, at least 0"),
    ],
)
def test_arguments_that_make_no_sense(inside, text):
    with pytest.raises(ValueError, match=text):
        Recipe.parse(f"muon({inside})")


def test_where_there_is_no_matrix_it_is_refused():
    with pytest.raises(ValueError, match="`muon` needs `matrices`"):
        Recipe.parse("vera+muon")
    adapters = lorica.attach(llama(), "full+muon", target_modules=["embed_tokens"], verbose=False)
    with pytest.raises(ValueError, match=r"no matrix to move.*Name linear layers"):
        lorica.optimizer(adapters, lr=LR)


def test_options_of_adamw_are_refused_where_it_moves_nothing():
    adapters = lorica.attach(nn.Sequential(nn.Linear(6, 5)), "lora+muon", r=2, verbose=False)
    with pytest.raises(ValueError, match=r"`betas=.*option of what AdamW moves.*leave it out"):
        lorica.optimizer(adapters, lr=LR, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match="`momentum=0.9` has no effect"):
        lorica.optimizer(adapters, lr=LR, momentum=0.9)
