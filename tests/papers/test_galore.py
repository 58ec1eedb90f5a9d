"""GaLore, arXiv 2403.03507: its equations, what follows, and what its code leaves open."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
from lorica import Recipe
from lorica.methods.rules import _engine
from lorica.methods.rules.galore import projection
from models import gpt2, llama, train
from reference import galore
from tolerance import rounding

SHAPES = {"tall": (12, 8), "wide": (8, 12), "square": (9, 9)}
TYPES = projection.PROJ_TYPES


def optimizer(method, weights, *, rank=3, lr=1e-2, decay=0.0, seed=0, **options):
    """The rule over bare matrices, as the adapters would hand them out."""
    group = {
        "params": [nn.Parameter(w.clone()) for w in weights], "lr": lr, "weight_decay": decay,
        "names": [str(i) for i in range(len(weights))], "rank": rank, "seed": seed,
    }  # fmt: skip
    made = Recipe.parse(method).rule.build([group], options)  # type: ignore[union-attr]
    return made, made.param_groups[0]["params"]


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


def held(made):
    return [
        {k: v.clone() for k, v in made.state[p].items()}
        for g in made.param_groups
        for p in g["params"]
    ]


def same(a, b):
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
               for x, y in zip(a, b, strict=True))  # fmt: skip


def text_of(**arguments):
    return f"galore({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("proj_type", TYPES)
def test_twenty_steps_equal_the_equations(proj_type, placement, spread, dtype):
    """At an ε near the gradients' size. With `full` the first moments are diagonal, and what is
    beside the diagonal is rounding: over a small ε, it would become steps of its own."""
    shapes, rank, lr, scale, eps = [*SHAPES.values(), (12, 8)], 3, 1e-2, 0.25, 0.1
    start = [0.1 * draw(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    method = text_of(
        proj_type=proj_type, eps_placement=placement, spread=spread, update_proj_gap=6,
        betas=(0.8, 0.99), eps=eps,
    )  # fmt: skip
    made, weights = optimizer(method, start, decay=0.1, rank=rank, lr=lr)
    twins, states = start, [{} for _ in start]
    largest = [g.norm().item() for g in gradients(start, 0)]
    for step in range(20):
        run(made, weights, 1, step)
        twins = [
            galore.step(
                w, g, s, lr=lr, rank=rank, gap=6, proj_type=proj_type, betas=(0.8, 0.99), eps=eps,
                scale=scale, eps_placement=placement, decay=0.1, offset=i * 6 // 4 if spread else 0,
            )
            for i, (w, g, s) in enumerate(zip(twins, gradients(weights, step), states, strict=True))
        ]  # fmt: skip
    for w, twin, first, size in zip(weights, twins, start, largest, strict=True):
        # An entry of Uᵀ G Vᵀ has m + n terms; its error over ε is one of N's, at most r times
        # which is one of U N Vᵀ. Beside that, a step rounds the product, its sum with W, the decay
        # and the sum with that.
        atol = lr * scale * rank / eps * rounding(dtype, sum(w.shape), size)
        atol += rounding(dtype, 4, twin.abs().max().item(), steps=20)
        torch.testing.assert_close(w.detach(), twin, rtol=0, atol=atol)
        assert (twin - first).abs().max() > 1e-3


def test_the_two_places_of_epsilon_differ_in_the_first_digit():
    """Where gradients are about as small as ε, as the authors' settings have it."""
    start = [draw(12, 8)]
    moved = []
    for method in ("galore", "galore(eps=1e-8, eps_placement='after')"):
        made, weights = optimizer(method, start)
        moved.append((run(made, weights, 1, by=1e-5)[0] - start[0]).norm().item())
    assert moved[0] < 0.6 * moved[1]


def test_the_rest_is_torchs_adamw_at_the_full_rate():
    adapters = lorica.attach(llama(num_hidden_layers=1), "galore(scale=0.5)", r=4, verbose=False)
    made = lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1)
    projected = {n for g in made.param_groups if "rank" in g for n in g["names"]}
    linear = {f"{n}.weight" for n, m in adapters.model.named_modules() if type(m) is nn.Linear}
    assert projected == linear - {"lm_head.weight"}
    others = [t for t in adapters.trained() if t.name not in projected]
    twins = [nn.Parameter(t.parameter.detach().clone()) for t in others]
    groups = [
        {"params": [t for t in twins if t.ndim == d], "weight_decay": decay}
        for d, decay in ((1, 0.0), (2, 0.1))
    ]
    base = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(4):
        for i, t in enumerate(adapters.trained()):
            t.parameter.grad = draw(*t.parameter.shape, seed=10 * step + i).float()
        for t, twin in zip(others, twins, strict=True):
            twin.grad = t.parameter.grad
        made.step()
        base.step()
    assert all(torch.equal(t.parameter, twin) for t, twin in zip(others, twins, strict=True))


def test_epsilon_for_all_that_trains_is_the_authors():
    """A bias that joins three steps later has a step count of its own."""
    start, twins, states = [draw(8), draw(11, 3), draw(4)], [], [{}, {}, {}]
    made = {}
    for text in ("galore(eps_for='all')", "galore(eps_for='all', eps_placement='after')", "galore"):
        weights = [nn.Parameter(w.clone()) for w in start]
        group = {"params": weights, "lr": 1e-2, "weight_decay": 0.0}
        rule = Recipe.parse(text).rule.build([group], {})
        twins = [w.clone() for w in start]
        for step in range(6):
            grads = gradients(start, step, by=1e-5)
            for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                w.grad = g if i < 2 or step >= 3 else None
                if w.grad is not None and not made:
                    twins[i] = galore.unprojected_step(twins[i], g, states[i], lr=1e-2)
            rule.step()
        if not made:
            for w, twin in zip(weights, twins, strict=True):
                torch.testing.assert_close(w.detach(), twin, rtol=1e-12, atol=1e-12)
        made[text] = torch.cat([w.detach().flatten() for w in weights])
    authors, after, plain = made.values()
    base = torch.cat([w.flatten() for w in start])
    assert (authors - plain).norm() > 0.1 * (plain - base).norm(), "that is a first digit"
    assert not torch.equal(authors, after) and not torch.equal(after, plain)


# -- oracles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["exact", "random"])
@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bases_are_orthonormal_and_the_state_is_small(shape, proj_type, svd):
    made, weights = optimizer(text_of(proj_type=proj_type, svd=svd), [draw(*shape)])
    run(made, weights, 1)
    (state,) = held(made)
    (m, n), side = shape, galore.side_of(proj_type, shape)
    small = {"left": (3, n), "right": (m, 3), "full": (3, 3)}[side]
    wanted = {"step": (), "exp_avg": small, "exp_avg_sq": small}
    for name, basis, eye in (("left", (m, 3), "T"), ("right", (3, n), "")):
        if side in (name, "full"):
            wanted[name] = basis
            P = state[name].T if eye else state[name]
            torch.testing.assert_close(P @ P.T, torch.eye(3, dtype=P.dtype))
    assert {k: tuple(v.shape) for k, v in state.items()} == wanted


def sgd_like(rank, **arguments):
    """With a huge ε Adam's step is its first moment over ε: here R/ε, so that W moves by ηα·R."""
    eps = 1e9
    return text_of(betas=(0.0, 0.9), eps=eps, eps_placement="after", **arguments), {
        "lr": 0.1 * eps,
        "rank": rank,
    }


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_gradient_within_the_rank_comes_back_as_it_was(shape, proj_type):
    method, options = sgd_like(3, proj_type=proj_type)
    made, weights = optimizer(method, [draw(*shape)], **options)
    start, G = weights[0].detach().clone(), draw(shape[0], 2) @ draw(2, shape[1], seed=1)
    weights[0].grad = G
    made.step()
    torch.testing.assert_close(weights[0].detach(), start - 0.1 * 0.25 * G, rtol=0, atol=1e-7)


@pytest.mark.parametrize("proj_type", TYPES)
def test_at_full_rank_gradient_descent_is_itself_and_adam_is_not(proj_type):
    start = [draw(*s) for s in SHAPES.values()]
    # A thin basis of the longer side spans this gradient and no other: a new one at every step.
    method, options = sgd_like(99, scale=1.0, proj_type=proj_type, update_proj_gap=1)
    made, weights = optimizer(method, start, **options)
    plain = [w - 0.1 * sum(gradients(start, t)[i] for t in range(5)) for i, w in enumerate(start)]
    for w, twin in zip(run(made, weights, 5), plain, strict=True):
        torch.testing.assert_close(w, twin, rtol=0, atol=1e-6)
    rotated = run(*optimizer(text_of(scale=1.0, proj_type=proj_type), start, rank=99), 5)
    twins = [nn.Parameter(w.clone()) for w in start]
    run(torch.optim.Adam(twins, lr=1e-2), twins, 5)
    for w, twin in zip(rotated, twins, strict=True):
        assert (w - twin).abs().max() > 1e-3, "the elementwise normalisation sees the basis"


def identity(G, r, generator=None):
    m, n = G.shape
    return {"left": torch.eye(m, dtype=G.dtype)[:, :r], "right": torch.eye(n, dtype=G.dtype)[:r]}


@pytest.mark.parametrize("proj_type", TYPES)
def test_in_the_standard_basis_it_is_adam(proj_type, monkeypatch):
    """torch's with ε after the correction; the authors' has ε before it, larger by 1/√(1−β₂ᵗ)."""
    monkeypatch.setattr(projection, "bases", identity)
    start = [draw(9, 9)]
    method = text_of(scale=1.0, proj_type=proj_type, eps=1e-3, eps_placement="after")
    made, weights = optimizer(method, start, rank=9)
    twins = [nn.Parameter(start[0].clone())]
    base = torch.optim.AdamW(twins, lr=1e-2, eps=1e-3, weight_decay=0.0)
    after = run(made, weights, 8)[0]
    torch.testing.assert_close(after, run(base, twins, 8)[0], rtol=0, atol=1e-13)

    made, weights = optimizer(text_of(scale=1.0, proj_type=proj_type, eps=1e-3), start, rank=9)
    twins = [nn.Parameter(start[0].clone())]
    base = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.0)
    for step in range(8):
        base.param_groups[0]["eps"] = 1e-3 / (1 - 0.999 ** (step + 1)) ** 0.5
        before = run(made, weights, 1, step)[0], run(base, twins, 1, step)[0]
        torch.testing.assert_close(*before, rtol=0, atol=1e-13)
    assert (before[0] - after).abs().max() > 1e-4


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_the_signs_of_the_basis_play_no_part(proj_type):
    start = [draw(12, 8), draw(8, 12, seed=1)]
    paths = []
    for flip in (False, True):
        made, weights = optimizer(text_of(proj_type=proj_type), start)
        run(made, weights, 4)
        if flip:
            for p in weights:
                own, sign = made.state[p], torch.tensor([1.0, -1.0, -1.0], dtype=p.dtype)
                if "left" in own:
                    own["left"] *= sign
                    own["exp_avg"] *= sign[:, None]
                if "right" in own:
                    own["right"] *= sign[:, None]
                    own["exp_avg"] *= sign
        paths.append(run(made, weights, 4, 4))
    for one, other in zip(*paths, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steps_of_one_gap_share_a_subspace_and_every_refresh_adds_its_rank(shape, proj_type):
    made, weights = optimizer(
        text_of(proj_type=proj_type, update_proj_gap=3, spread=False), [draw(*shape)], rank=2
    )
    start = last = weights[0].detach().clone()
    for t in range(9):
        (now,) = run(made, weights, 1, t)
        (state,) = held(made)
        for name in {"left", "right"} & state.keys():
            P, moved = state[name], now - last
            inside = P @ (P.T @ moved) if name == "left" else moved @ P.T @ P
            torch.testing.assert_close(inside, moved, rtol=0, atol=1e-14)
        rank = torch.linalg.matrix_rank(now - start, rtol=1e-9).item()
        assert rank == min(2 * (1 + t // 3), *shape)
        last = now


@pytest.mark.parametrize(
    ("shape", "standard", "reverse"),
    [("tall", "right", "left"), ("wide", "left", "right"), ("square", "right", "left")],
)
def test_std_is_the_shorter_side_named(shape, standard, reverse):
    for named, by_shape in ((standard, "std"), (reverse, "reverse_std")):
        one, other = (
            run(*optimizer(text_of(proj_type=t, update_proj_gap=2), [draw(*SHAPES[shape])]), 6)
            for t in (named, by_shape)
        )
        assert torch.equal(one[0], other[0])


def test_a_square_projection_is_on_the_side_that_was_asked_for():
    """A wide matrix on its longer side at r = m has a square projection, by whose shape alone the
    side cannot be told."""
    made, weights = optimizer("galore(proj_type='reverse_std')", [draw(8, 12)], rank=8)
    twin = galore.step(
        weights[0].detach(), gradients(weights, 0)[0], {}, lr=1e-2, rank=8, gap=200,
        proj_type="reverse_std",
    )  # fmt: skip
    torch.testing.assert_close(run(made, weights, 1)[0], twin, rtol=0, atol=1e-12)


# -- refreshes -------------------------------------------------------------------------------------


def refreshes(method, count, steps, monkeypatch):
    """Which matrices get new bases at each step."""
    at, real = [], projection.bases

    def noted(G, r, generator=None):
        at[-1].append(int(G[0, 0].item()))
        return real(G, r, generator)

    with monkeypatch.context() as patch:
        patch.setattr(projection, "bases", noted)
        made, weights = optimizer(method, [draw(5, 4, seed=i) for i in range(count)], rank=2)
        for step in range(steps):
            at.append([])
            for i, (w, g) in enumerate(zip(weights, gradients(weights, step), strict=True)):
                w.grad = g
                w.grad[0, 0] = i
            made.step()
    return at


@pytest.mark.parametrize(("count", "gap"), [(7, 3), (3, 7), (5, 5), (1, 4), (6, 1)])
def test_matrices_take_turns(count, gap, monkeypatch):
    at = refreshes(text_of(update_proj_gap=gap), count, 3 * gap + 1, monkeypatch)
    assert at[0] == list(range(count))
    assert max(map(len, at[1:])) <= -(-count // gap)
    for first in range(1, 2 * gap):
        assert sorted(sum(at[first : first + gap], [])) == list(range(count)), "once in any gap"


def test_or_all_at_once_as_in_the_authors_code(monkeypatch):
    at = refreshes("galore(update_proj_gap=4, spread=False)", 3, 10, monkeypatch)
    assert [len(some) for some in at] == [3, 0, 0, 0, 3, 0, 0, 0, 3, 0]


def test_the_order_of_the_matrices_plays_no_part():
    start = [draw(5, 4, seed=i) for i in range(3)]

    def final(order):
        group = {
            "params": [nn.Parameter(start[i].clone()) for i in order], "lr": 1e-2, "rank": 2,
            "weight_decay": 0.0, "names": [str(i) for i in order], "seed": 0,
        }  # fmt: skip
        made = Recipe.parse("galore(update_proj_gap=3, svd='random')").rule.build([group], {})
        weights = dict(zip(order, group["params"], strict=True))
        for step in range(7):
            for i, w in weights.items():
                w.grad = draw(5, 4, seed=10 * step + i)
            made.step()
        return [weights[i].detach() for i in range(3)]

    for one, other in zip(final([0, 1, 2]), final([2, 0, 1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("total", "gap"), [(1, 1), (2, 1), (5, 2), (20, 9), (401, 200), (9999, 200)]
)
def test_a_gap_left_out_is_fitted_to_two_refreshes(total, gap):
    adapters = lorica.attach(llama(num_hidden_layers=1), "galore", r=4, verbose=False)
    made = lorica.optimizer(adapters, total_steps=total)
    assert made.param_groups[0]["update_proj_gap"] == gap
    assert total < 3 or 2 * gap < total
    given = lorica.attach(
        llama(num_hidden_layers=1), "galore(update_proj_gap=1)", r=4, verbose=False
    )
    if total > 1:
        assert lorica.optimizer(given, total_steps=total).param_groups[0]["update_proj_gap"] == 1
    adapters = lorica.attach(llama(num_hidden_layers=1), "galore", r=4, verbose=False)
    assert lorica.optimizer(adapters).param_groups[0]["update_proj_gap"] == 200


def test_a_given_gap_that_never_fires_is_an_error():
    adapters = lorica.attach(
        llama(num_hidden_layers=1), "galore(update_proj_gap=50)", r=4, verbose=False
    )
    with pytest.raises(ValueError, match="set at step 0 and never again. Give a gap below 50"):
        lorica.optimizer(adapters, total_steps=50)


# -- what may go wrong -----------------------------------------------------------------------------


def test_a_decomposition_that_fails_leaves_the_old_subspace_and_says_so(monkeypatch, caplog):
    start = [draw(12, 8), draw(12, 8, seed=1)]
    made, weights = optimizer("galore(update_proj_gap=2, spread=False)", start)
    real = torch.linalg.svd

    def apart_from_size(one, other):
        return (one / one.norm() - other / other.norm()).norm()

    def failing(G, full_matrices=True):
        if apart_from_size(G, gradients(start, 2)[1]) < 1e-12:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(G, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    run(made, weights, 2)
    before = held(made)
    with caplog.at_level(logging.WARNING, logger="lorica"):
        run(made, weights, 1, 2)
    assert "1: no singular vectors at step 2, the old subspace stays" in caplog.text
    assert "0: " not in caplog.text
    after = held(made)
    assert not torch.equal(after[0]["right"], before[0]["right"])
    assert torch.equal(after[1]["right"], before[1]["right"]) and after[1]["step"] == 3
    run(made, weights, 2, 3)
    assert not torch.equal(held(made)[1]["right"], before[1]["right"]), "the next one succeeds"


def test_without_a_first_basis_a_matrix_waits_for_one(monkeypatch, caplog):
    start = [draw(12, 8), draw(12, 8, seed=1)]
    made, weights = optimizer("galore", start)

    def failing(G, full_matrices=True):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="lorica"):
        patch.setattr(torch.linalg, "svd", failing)
        assert same([{"w": w} for w in run(made, weights, 1)], [{"w": w} for w in start])
    assert "0: no singular vectors at step 0, no step here" in caplog.text
    assert not any(v.any() for s in held(made) for v in s.values())
    late = run(made, weights, 2, 1)
    fresh, others = optimizer("galore", start)
    for one, other in zip(late, run(fresh, others, 2, 1), strict=True):
        assert torch.equal(one, other)


def test_a_step_without_any_gradient_is_none_and_the_refresh_is_made_up_for():
    """As after one that was left out as a whole."""
    start = [draw(12, 8), draw(12, 8, seed=1)]
    made, weights = optimizer("galore(update_proj_gap=2, spread=False)", start)
    run(made, weights, 2)
    before, kept = held(made), [w.detach().clone() for w in weights]
    made.zero_grad()
    made.step()
    assert same(held(made), before) and all(map(torch.equal, weights, kept))
    run(made, weights, 1, 3)
    assert not torch.equal(held(made)[1]["right"], before[1]["right"])
    assert all(w.isfinite().all() for w in weights)


def test_a_gradient_of_zeros_spans_nothing():
    """The checkpoint API steps an optimizer once with zero gradients, to learn what its state is
    made of; the first real gradient still gives the first basis."""
    start = [draw(12, 8)]
    made, weights = optimizer("galore(update_proj_gap=2)", start, decay=0.1)
    weights[0].grad = torch.zeros_like(weights[0])
    made.step()
    assert torch.equal(weights[0], start[0]) and not any(v.any() for v in held(made)[0].values())
    late = run(made, weights, 2)
    fresh, others = optimizer("galore(update_proj_gap=2)", start, decay=0.1)
    assert torch.equal(late[0], run(fresh, others, 2)[0])
    basis = held(made)[0]["right"]
    weights[0].grad = torch.zeros_like(weights[0])
    made.step()
    assert torch.equal(held(made)[0]["right"], basis) and held(made)[0]["step"] == 3


@pytest.mark.parametrize("svd", ["exact", "random"])
def test_signs_of_the_library_do_not_count(monkeypatch, svd):
    """Another library may return any pair of singular vectors negated."""
    real = torch.linalg.svd

    def negated(G, full_matrices=True, **options):
        U, S, V = real(G, full_matrices=full_matrices, **options)
        signs = torch.tensor([-1.0, 1.0], dtype=V.dtype).repeat(len(V))[: len(V)]
        return U * signs, S, V * signs[:, None]

    found = []
    for other in (False, True):
        with monkeypatch.context() as patch:
            if other:
                patch.setattr(torch.linalg, "svd", negated)
            made, weights = optimizer(text_of(svd=svd, update_proj_gap=1), [draw(9, 7)])
            for step in range(3):
                weights[0].grad = draw(9, 7, seed=step)
                made.step()
        found.append(weights[0].detach().clone())
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("svd", ["exact", "random"])
def test_huge_and_tiny_gradients(svd):
    made, weights = optimizer(text_of(svd=svd, update_proj_gap=1), [draw(12, 8).float()])
    for step, by in enumerate((1e15, 1e-30, 1.0)):
        run(made, weights, 1, step, by)
        (state,) = held(made)
        torch.testing.assert_close(state["right"] @ state["right"].T, torch.eye(3))
        assert weights[0].isfinite().all()


# -- the range finder ------------------------------------------------------------------------------


def decaying(m, n, *, ratio=0.8):
    U, V = torch.linalg.qr(draw(m, n))[0], torch.linalg.qr(draw(n, n, seed=1))[0]
    return (U * ratio ** torch.arange(n, dtype=torch.float64)) @ V


def apart(one, other):
    """Sine of the largest angle between two row spaces."""
    return torch.linalg.matrix_norm(one - one @ other.T @ other, 2).item()


def test_a_sketch_finds_the_leading_subspace():
    for dtype in (torch.float64, torch.float32):
        G = decaying(60, 40).to(dtype)
        exact = projection.bases(G, 6)
        found = projection.bases(G, 6, torch.Generator().manual_seed(0))
        for side in ("left", "right"):
            a, b = exact[side], found[side]
            assert (apart(a.T, b.T) if side == "left" else apart(a, b)) < 1e-3
            assert a.dtype == b.dtype == dtype
    whole = projection.bases(G, 38, torch.Generator().manual_seed(0))
    assert apart(projection.bases(G, 38)["right"], whole["right"]) < 1e-2, "r + 8 > min(m, n)"


def test_a_sketch_is_drawn_by_seed_step_and_name():
    start = [draw(30, 20), draw(30, 20)]

    def first(seed, names=("a", "b"), steps=1):
        made, weights = optimizer("galore(svd='random', update_proj_gap=1)", start, seed=seed)
        made.param_groups[0]["names"] = list(names)
        for _ in range(steps):
            for w in weights:
                w.grad = draw(30, 20, seed=9)
            torch.rand(3)  # of the global generator, which plays no part
            made.step()
        return [s["right"] for s in held(made)]

    one, again = first(0), first(0)
    assert all(map(torch.equal, one, again))
    others = [one[1], first(1)[0], first(0, ("c", "d"))[0], first(0, steps=2)[0]]
    assert all(not torch.equal(one[0], other) for other in others)


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["exact", "random"])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_a_cut_anywhere_around_the_refreshes_changes_no_bit(proj_type, spread, svd, tmp_path):
    method = text_of(proj_type=proj_type, spread=spread, svd=svd, update_proj_gap=3)
    start = [draw(12, 8), draw(8, 12, seed=1), draw(12, 8, seed=2)]
    made, weights = optimizer(method, start, decay=0.1)
    saved = []
    for step in range(16):
        saved.append(([w.detach().clone() for w in weights], copy.deepcopy(made.state_dict())))
        run(made, weights, 1, step)
    for cut in range(7, 10):  # two refreshes before and two after
        torch.save(saved[cut], tmp_path / "run.pt")
        values, state = torch.load(tmp_path / "run.pt", weights_only=True)
        other, resumed = optimizer(method, values, decay=0.1)
        other.load_state_dict(state)
        assert all(s["step"].device.type == "cpu" for s in other.state.values())
        ends = run(other, resumed, 16 - cut, cut)
        assert all(torch.equal(a, b) for a, b in zip(ends, weights, strict=True))
        assert same(held(other), held(made))


def test_resumed_in_a_model_bit_for_bit(tmp_path):
    def fresh():
        adapters = lorica.attach(llama(num_hidden_layers=1), "galore", r=4, verbose=False)
        return adapters, lorica.optimizer(adapters, lr=1e-2, weight_decay=0.1, total_steps=9)

    straight, made = fresh()
    train(straight, made, 5)
    torch.save((straight.state_dict(), made.state_dict()), tmp_path / "run.pt")
    values, saved = torch.load(tmp_path / "run.pt", weights_only=True)
    train(straight, made, 4, first=5)
    resumed, other = fresh()
    resumed.load_state_dict(values)
    other.load_state_dict(saved)
    train(resumed, other, 4, first=5)
    assert resumed.fingerprint() == straight.fingerprint()


def test_it_can_be_copied_and_pickled():
    made, weights = optimizer("galore(update_proj_gap=2)", [draw(12, 8)], decay=0.1)
    run(made, weights, 3)
    other, again = copy.deepcopy((made, weights))
    assert torch.equal(run(other, again, 3, 3)[0], run(made, weights, 3, 3)[0])
    assert same(held(pickle.loads(pickle.dumps(made))), held(made))


def test_narrow_weights_have_a_wide_state():
    made, weights = optimizer("galore(update_proj_gap=2)", [draw(64, 32).bfloat16()], rank=4)
    run(made, weights, 5)
    (state,) = held(made)
    assert {v.dtype for v in state.values()} == {torch.float32}
    torch.testing.assert_close(state["right"] @ state["right"].T, torch.eye(4))
    assert weights[0].dtype == torch.bfloat16


@pytest.mark.parametrize("proj_type", TYPES)
def test_the_state_has_the_declared_size(proj_type):
    adapters = lorica.attach(llama(), text_of(proj_type=proj_type), r=5, verbose=False)
    made = lorica.optimizer(adapters, lr=1e-3)
    train(adapters, made, 1)
    size = sum(v.numel() for s in made.state.values() for v in s.values() if v.numel() > 1)
    assert size == adapters.recipe.rule.state_elements(adapters)
    assert adapters.summary.memory["optimizer"] == 4 * size
    m, n = max(SHAPES["tall"]), min(SHAPES["tall"])
    short, long = (
        projection.shapes((m, n), {"rank": 3, "proj_type": t}) for t in ("std", "reverse_std")
    )
    count = [sum(torch.Size(s).numel() for s in own.values() if s) for own in (short, long)]
    assert count == [n * 3 + 2 * m * 3, m * 3 + 2 * n * 3]


def test_the_size_of_the_stacks_plays_no_part(monkeypatch):
    start = [draw(*s, seed=i) for i, s in enumerate([(12, 8)] * 5 + [(8, 12)] * 2)]
    results = []
    for limit in (1 << 22, 1, 200):
        monkeypatch.setattr(_engine, "STACKED", limit)
        results.append(run(*optimizer("galore(update_proj_gap=3)", start, decay=0.1), 7))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_between_refreshes_more_matrices_are_no_more_calls():
    calls = []
    for count in (2, 9):
        made, weights = optimizer("galore(spread=False)", [draw(12, 8)] * count)
        run(made, weights, 2)
        with _Count() as counted:
            made.step()
        calls.append(counted.calls)
    assert calls[0] == calls[1]


# -- the paper's claim -----------------------------------------------------------------------------


def student(gap, *, steps=2000, size=64, rank=8):
    """Regression on a teacher that is far from the start at any low rank: the loss at the end, and
    the least that a change of that rank could reach."""
    torch.manual_seed(0)
    teacher = torch.randn(size, size) / size**0.5
    W = nn.Linear(size, size, bias=False).weight.detach().clone()
    lost = torch.linalg.svdvals(teacher - W)[rank:].square().sum().item() / size
    method = text_of(update_proj_gap=gap, scale=1.0)
    made, (w,) = optimizer(method, [W], rank=rank)
    warm = torch.optim.lr_scheduler.LinearLR(made, 1 / 50, 1.0, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps - 50)
    rates = torch.optim.lr_scheduler.SequentialLR(made, [warm, cosine], [50])
    for _ in range(steps):
        x = torch.randn(256, size)
        off = x @ (w - teacher).T
        made.zero_grad()
        off.square().mean().backward()
        made.step()
        rates.step()
    return (w - teacher).square().sum().item() / size, lost


def test_changing_subspaces_reach_what_no_single_one_can():
    loss, floor = student(50)
    assert loss < 1e-4 < 0.5 < floor
    stuck, floor = student(10**9)
    assert stuck > floor


# -- models and options ----------------------------------------------------------------------------


def test_a_layer_stored_as_in_by_out_is_projected_as_stored():
    model = gpt2(n_layer=1)
    adapters = lorica.attach(model, "galore(proj_type='left')", r=4, verbose=False)
    made = lorica.optimizer(adapters, lr=1e-3)
    train(adapters, made, 1)
    stored = {t.name: t.parameter for t in adapters.trained() if t.role == "weight"}
    p = stored["transformer.h.0.mlp.c_fc.weight"]
    assert tuple(made.state[p]["left"].shape) == (model.config.n_embd, 4)


def test_betas_and_eps_are_the_callers_unless_the_word_has_its_own():
    adapters = lorica.attach(llama(num_hidden_layers=1), "galore(eps=1e-5)", r=4, verbose=False)
    made = lorica.optimizer(adapters, betas=(0.7, 0.8), eps=1e-4)
    for group in made.param_groups:
        assert (group["betas"], group["eps"]) == ((0.7, 0.8), 1e-5 if "rank" in group else 1e-4)
    adapters = lorica.attach(llama(num_hidden_layers=1), "galore", r=4, verbose=False)
    made = lorica.optimizer(adapters)
    assert {g["eps"] for g in made.param_groups} == {1e-6, 1e-8}
    with pytest.raises(ValueError, match="`momentum=0.9` has no effect with the rule `galore`"):
        lorica.optimizer(adapters, momentum=0.9)


@pytest.mark.parametrize(
    ("method", "fields", "text"),
    [
        ("galore(proj_type='both')", {}, "allowed: 'std', 'reverse_std', 'left', 'right', 'full'"),
        ("galore(svd='fast')", {}, "allowed: 'exact', 'random'"),
        ("galore(eps_placement='inside')", {}, "allowed: 'before', 'after'"),
        ("galore(spread='yes')", {}, "allowed: True, False"),
        ("galore(scale=0)", {}, "a number above 0, e.g. 0.25"),
        ("galore(update_proj_gap=0)", {}, "whole optimizer steps, at least 1, e.g. 200"),
        ("galore(update_proj_gap=1.5)", {}, "whole optimizer steps, at least 1"),
        ("galore(update_proj_gap=True)", {}, "whole optimizer steps, at least 1"),
        ("galore(eps=0)", {}, "a number above 0, e.g. 1e-8"),
        ("galore(betas=(0.9, 1.0))", {}, r"two numbers in \[0, 1\)"),
        ("galore", {"lora_alpha": 16}, "`lora_alpha=16` has no effect"),
        ("galore", {"rank_pattern": {"q_proj": 2}}, "has no effect"),
        ("lowrank+galore", {}, "`galore` fills the axis `delta` with `full`, and `lowrank`"),
        ("dora+galore", {}, "`dora` cannot be combined with `galore`"),
        ("lorarite+galore", {}, "both choose the axis `rule`; name one"),
    ],
)
def test_what_makes_no_sense_is_refused(method, fields, text):
    with pytest.raises(ValueError, match=text):
        Recipe.parse(method, **fields)


def test_the_defaults_are_the_papers():
    recipe = Recipe.parse("galore")
    assert (recipe.delta.name, recipe.r, recipe.lora_alpha) == ("full", 128, None)
    assert recipe.learning_rate == (0.01, "galore") and recipe.filled["r"] == (128, "galore")
    assert recipe.rule.scale == 0.25 and recipe.text() == "galore"


def test_a_rank_that_leaves_nothing_out_names_the_layers():
    with pytest.raises(ValueError, match=r"`r=16` is not below .*k_proj \(16 x 32\).*`r=15`, or"):
        lorica.attach(
            llama(num_hidden_layers=1), "galore", r=16, target_modules=["k_proj"], verbose=False
        )


def test_a_model_without_a_matrix_to_project_is_refused():
    adapters = lorica.attach(
        llama(num_hidden_layers=1), "galore", r=4, target_modules=["norm"], verbose=False
    )
    with pytest.raises(ValueError, match="has nothing to project.*Name linear layers"):
        lorica.optimizer(adapters)


def test_names_of_the_trainers_say_why_they_are_not_this_rule():
    from transformers.training_args import OptimizerNames

    rule = Recipe.parse("galore").rule
    theirs = {o.value for o in OptimizerNames if o.value.startswith("galore_")}
    assert theirs == set(rule.trainer_refusals) and not theirs & rule.trainer_names
    for name, reason in rule.trainer_refusals.items():
        assert ("clipped" in reason) == name.endswith("layerwise") and "leave `optim` out" in reason
