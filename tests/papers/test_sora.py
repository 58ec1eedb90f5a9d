"""SoRA, arXiv 2311.11696: gates that a soft threshold shuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from lorica.methods.schedules.sora import shrink
from models import llama, logits, train
from reference import sora as twin

OUT, IN, R, STEPS = 6, 5, 4, 60


def begin(
    method: str, sizes: tuple[tuple[int, int], ...] = ((IN, OUT),), *, steps: int = STEPS,
    lr: float = 0.02, decay: float = 0.0, **fields: Any,
):  # fmt: skip
    """Layers of these (in, out) that don't feed each other, adapted, and their optimizer."""
    torch.manual_seed(3)
    layers = (nn.Linear(*size, bias=False, dtype=torch.float64) for size in sizes)
    model = nn.Sequential(*layers)
    adapters = lorica.attach(model, method, r=R, dtype=torch.float64, verbose=False, **fields)
    return adapters, lorica.optimizer(
        adapters, lr=lr, weight_decay=decay, total_steps=steps, seed=1
    )


def data(step: int, features: int = IN, out: int = OUT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(9, features, generator=generator, dtype=torch.float64)
    return x, 0.3 * x @ torch.ones(features, out, dtype=torch.float64)


def move(adapters: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step on the sum of the layers' losses."""
    for _, layer in adapters:
        x, y = data(step, layer.in_features, layer.out_features)
        nn.functional.mse_loss(layer(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def only(adapters: Any) -> Any:
    ((_, pair),) = adapters.pairs()
    return pair


# -- the threshold ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["soft", "authors"])
def test_the_threshold_has_its_closed_form(rule):
    xi, one = 0.25, twin.soft_threshold if rule == "soft" else twin.authors_threshold
    values = [-1.0, -0.6, -0.5, -0.49, -0.3, -0.25, -0.1, 0.0, 0.2, 0.25, 0.26, 0.5, 0.51, 2.0]
    g = torch.tensor(values, dtype=torch.float64)
    expected = [one(v, xi) for v in values]
    torch.testing.assert_close(shrink(g, xi, rule).tolist(), expected, rtol=0, atol=1e-15)
    assert torch.equal(shrink(g, 0.0, rule), g)
    if rule == "soft":  # the proximal map: argmin of ½(z − x)² + ξ|z|
        z = torch.linspace(-2, 2, 40001, dtype=torch.float64)
        for x, y in zip(values, expected, strict=True):
            cost = 0.5 * (z - x) ** 2 + xi * z.abs()
            assert z[cost.argmin()].item() == pytest.approx(y, abs=1e-4)
    else:
        assert shrink(torch.tensor([0.25, 0.49, 0.5]), 0.25, rule).tolist() == [0.25, 0, 0.25]


# -- the twin --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ("threshold=0.4", {"threshold": 0.4}),
        ("threshold=0.004, scaled=False", {"threshold": 0.004, "scaled": False}),
        ("threshold=0.4, rule='authors'", {"threshold": 0.4, "authors": True}),
    ],
)
def test_it_is_the_twin_with_two_optimizers_over_sixty_steps(arguments, how):
    sizes = (IN, OUT), (4, 7), (IN, OUT)
    adapters, optimizer = begin(f"sora({arguments})", sizes, decay=0.1, lora_alpha=3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    runs = []
    for (_, layer), (_, pair) in zip(adapters, adapters.pairs(), strict=True):
        assert not pair.B.any() and pair.A.any() and len(set(pair.E.flatten().tolist())) == R
        runs.append(twin.Run(
            layer.store.weight().detach(), pair.A.detach(), pair.B.detach(),
            pair.E.detach().flatten(), 3 / R, 0.02, decay=0.1, **how,
        ))  # fmt: skip
    for t in range(STEPS):
        for size, run in zip(sizes, runs, strict=True):
            run.step(*data(t, *size), factor=1 - t / STEPS)
        move(adapters, optimizer, t)
        scheduler.step()
        for (_, pair), run in zip(adapters.pairs(), runs, strict=True):
            for ours, theirs in ((pair.A, run.A), (pair.B, run.B), (pair.E.flatten(), run.g)):
                torch.testing.assert_close(
                    ours.detach(), theirs.detach(), rtol=1e-8, atol=1e-11, msg=f"step {t}"
                )


def test_the_support_is_final_at_the_end_alone():
    schedule = Recipe.parse("sora").schedules[0]
    assert [schedule.fit(t).final_from(t) for t in (9, None)] == [9, 0]


def test_without_a_threshold_it_is_gated_training():
    """The first of two stages has none."""
    staged, one = begin("sora(stages=2, lr_scheduler_type='continued')")
    plain, other = begin("gated")
    for t in range(STEPS):
        move(staged, one, t)
        move(plain, other, t)
        same = staged.fingerprint() == plain.fingerprint()
        assert same == (t < STEPS // 2), t


def test_at_rest_the_gates_solve_the_lasso():
    """Plain gradient steps on a quadratic: |∇L| ≤ λ where a gate is 0, = −λ·sign(g) elsewhere."""
    level, lr = 0.3, 0.01
    adapters, optimizer = begin(f"sora(threshold={level})+sgd(momentum=0)", lr=lr)
    pair = only(adapters)
    with torch.no_grad():
        pair.A.normal_(generator=torch.Generator().manual_seed(1))
        pair.B.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    goal = torch.tensor([[0.5], [0.0], [-0.4], [0.02]], dtype=torch.float64)
    base = adapters.layers["0"].store.weight().detach()
    y = x @ (base + pair.scale * pair.B.detach() @ (goal * pair.A.detach())).T
    for _ in range(2000):
        nn.functional.mse_loss(adapters.model(x), y).backward()
        gradient = pair.E.grad.clone()
        pair.A.grad = pair.B.grad = None
        optimizer.step()
        optimizer.zero_grad()
    g, slope = pair.E.detach().flatten(), gradient.flatten()
    open_ = g != 0
    assert 0 < int(open_.sum()) < R
    torch.testing.assert_close(slope[open_], -level * g[open_].sign(), rtol=1e-8, atol=1e-10)
    assert bool((slope[~open_].abs() <= level).all())


def test_decay_spares_the_gates():
    adapters, _ = begin("sora")
    groups = adapters.param_groups(1e-3, 0.1)
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    pair = only(adapters)
    assert decays[id(pair.E)] == 0 and decays[id(pair.A)] == decays[id(pair.B)] == 0.1


def test_a_shut_gate_opens_again_where_a_step_is_longer_than_the_threshold():
    adapters, optimizer = begin("sora(threshold=0.4)")
    pair = only(adapters)
    for t in range(5):
        move(adapters, optimizer, t)
    with torch.no_grad():
        pair.E[1] = 0
    move(adapters, optimizer, 5)
    assert pair.E[1] != 0
    other, late = begin("sora(threshold=0.4, scaled=False)")
    assert 0 < only(other).E.abs().max() < 8 * 0.4
    for t in range(8):
        move(other, late, t)
    assert not only(other).E.any(), "0.4 a step is above every step of AdamW at 0.02"


# -- stages ----------------------------------------------------------------------------------------


def test_stages_raise_the_threshold_and_restart_the_rate():
    schedule: Any = Recipe.parse("sora(threshold=0.6, stages=4)").schedules[0].fit(10)
    seen = [schedule._stage(t, 10) for t in range(10)]
    assert [s for s, _ in seen] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert [round(p, 3) for _, p in seen] == [0, 0.333, 0.667, 0, 0.5, 0, 0.333, 0.667, 0, 0.5]
    assert [schedule._level(i) for i in range(4)] == pytest.approx([0, 0.2, 0.4, 0.6])
    adapters, optimizer = begin("sora(stages=3)", steps=9, lr=0.03)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 0.0, total_iters=9)
    rates = []
    for t in range(9):
        move(adapters, optimizer, t)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lorica"]["rate"])
    assert rates == pytest.approx([0.03, 0.02, 0.01] * 3)


@pytest.mark.parametrize("cut", [3, 7, 8, 11])
def test_a_resumed_run_is_the_straight_run(cut, tmp_path):
    def start():
        adapters = lorica.attach(
            llama(num_hidden_layers=1), "sora(threshold=3.0, stages=3)", r=4, verbose=False
        )
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=12, seed=3)

    adapters, optimizer = start()
    train(adapters, optimizer, cut)
    torch.save({"a": adapters.state_dict(), "o": optimizer.state_dict()}, tmp_path / "cut.pt")
    train(adapters, optimizer, 12 - cut, first=cut)
    again, resumed = start()
    parts = torch.load(tmp_path / "cut.pt", weights_only=True)
    again.load_state_dict(parts["a"])
    resumed.load_state_dict(parts["o"])
    train(again, resumed, 12 - cut, first=cut)
    assert again.fingerprint() == adapters.fingerprint()
    assert any(bool((p.E == 0).any()) for _, p in adapters.pairs())


# -- what remains ----------------------------------------------------------------------------------


def test_shut_ranks_can_be_cut_away():
    adapters = lorica.attach(llama().double(), "sora(threshold=4.0)", r=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=2e-2, total_steps=30)
    train(adapters, optimizer, 30)
    before, ranks = logits(adapters.model), set()
    for _, layer in adapters:
        delta = layer.update.delta
        keep = delta.gate.flatten() != 0
        ranks.add(int(keep.sum()))
        cut = delta.scale * (delta.B[:, keep] * delta.gate[keep].T) @ delta.A[keep]
        torch.testing.assert_close(cut, delta.weight(None), rtol=1e-12, atol=1e-14)
    assert min(ranks) < 8 and len(ranks) > 1, ranks
    lorica.merge(adapters.model)
    torch.testing.assert_close(logits(adapters.model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "beside", ["", "+dora", "+rslora", "+loraplus", "+riemannian", "+lorarite", "+olora", "+svd"]
)
def test_it_stands_beside_other_parts(beside):
    model = llama(num_hidden_layers=1)
    before = logits(model)
    adapters = lorica.attach(model, f"sora(threshold=2.0){beside}", r=4, verbose=False)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=12)
    train(adapters, optimizer, 12)
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(la.effective()[0], la.store.weight()) for _, la in adapters)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "olora", "pissa"])
def test_under_another_start_the_gates_begin_at_one(init):
    adapters, _ = begin(f"sora+{init}")
    pair, x = only(adapters), data(0)[0]
    assert bool((pair.E == 1).all())
    base = adapters.layers["0"].store.weight()
    torch.testing.assert_close(adapters.model(x), x @ base.T, rtol=0, atol=1e-12)


def test_what_has_no_effect_is_refused():
    for given in ("threshold=0", "threshold=-1", "stages=0", "rule='hard'", "scaled=2",
                  "lr_scheduler_type='step'"):  # fmt: skip
        with pytest.raises(ValueError, match="sora"):
            Recipe.parse(f"sora({given})")
    with pytest.raises(ValueError, match="divides the run into 7 stage"):
        begin("sora(stages=7)", steps=6)
    with pytest.raises(ValueError, match="`sora` cannot be combined with `lowrank`|leave one"):
        Recipe.parse("sora+lowrank")


# -- what it is for --------------------------------------------------------------------------------


def regression(threshold: float | None, seed: int = 0, steps: int = 1500) -> tuple[int, float]:
    """(open gates of 8, loss at the end): a planted change of rank 3 in a 24 x 24 map."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 24, bias=False))
    change = torch.randn(24, 3) @ torch.randn(3, 24) / 24**0.5
    goal = model[0].weight.detach() + change  # type: ignore[operator]
    method = "gated" if threshold is None else f"sora(threshold={threshold})"
    adapters = lorica.attach(model, method, r=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=steps)
    for _ in range(steps):
        x = torch.randn(64, 24)
        loss = nn.functional.mse_loss(model(x), x @ goal.T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return int(only(adapters).E.count_nonzero()), loss.item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_higher_threshold_leaves_fewer_ranks_down_to_those_that_are_needed(seed):
    gates, losses = zip(*(regression(level, seed, 500) for level in (None, 0.3, 1.0)), strict=True)
    assert gates[0] == 8 > gates[1] > gates[2] >= 3, gates
    assert losses[2] < 2e-3, "a rank too few would cost a hundred times that"
