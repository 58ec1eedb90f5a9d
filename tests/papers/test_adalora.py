"""AdaLoRA, arXiv 2303.10512: a falling budget of ranks, given to the layers that need them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from lorica.methods.schedules.adalora.triplets import best, sensitivity
from lorica.training.training import Training
from models import llama, logits, train
from reference import adalora as twin

WIDTH = (5, 7, 6, 4)
TINIT, TFINAL, EVERY, STEPS = 4, 15, 3, 60
PLAN = f"tinit={TINIT}, tfinal={TFINAL}, deltaT={EVERY}"


def chain() -> nn.Sequential:
    """Three layers of doubles with tanh between."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for k, (n, m) in enumerate(zip(WIDTH, WIDTH[1:], strict=False)):
        layers += [nn.Linear(n, m, bias=False, dtype=torch.float64)]
        layers += [nn.Tanh()] if k < 2 else []
    return nn.Sequential(*layers)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(9, WIDTH[0], generator=generator, dtype=torch.float64)
    return x, torch.sin(x @ torch.ones(WIDTH[0], WIDTH[-1], dtype=torch.float64))


def begin(method: str, *, r: int = 2, steps: int = STEPS, lr: float = 0.02, **fields: Any):
    adapters = lorica.attach(chain(), method, r=r, dtype=torch.float64, verbose=False, **fields)
    return adapters, lorica.optimizer(adapters, lr=lr, total_steps=steps, seed=1)


def move(adapters: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    x, y = data(step)
    task = nn.functional.mse_loss(adapters.model(x), y)
    adapters.loss({"loss": task}).backward()
    optimizer.step()
    optimizer.zero_grad()


def diagonals(adapters: Any) -> list[torch.Tensor]:
    return [pair.E.detach().flatten() for _, pair in adapters.pairs()]


def alive(adapters: Any) -> int:
    return sum(int(E.count_nonzero()) for E in diagonals(adapters))


# -- the start -------------------------------------------------------------------------------------


def test_the_start_is_the_authors():
    adapters, _ = begin(f"adalora({PLAN}, init_r=4)")
    layer = adapters.layers["2"]
    pair = layer.update.delta.pair()
    assert pair.A.shape == (4, WIDTH[1]) and pair.B.shape == (WIDTH[2], 4)
    assert not pair.E.any() and adapters.recipe.lora_alpha == 8 and layer.site.scale == 2
    wide = lorica.attach(nn.Sequential(nn.Linear(500, 400)), "adalora", r=8, verbose=False)
    ((_, pair),) = wide.pairs()
    for p in (pair.A, pair.B):
        assert p.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(p.mean().item()) < 0.001
    x, _ = data(0)
    assert torch.equal(adapters.model(x), chain()(x))


def test_ranks_and_alpha_follow_from_r():
    def built(method: str, r: int | None = None, **fields: Any) -> dict[str, tuple[int, float]]:
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 11))
        recipe = Recipe.parse(method, **({} if r is None else {"r": r}), **fields)
        adapters = lorica.attach(model, recipe, verbose=False)
        return {n: (layer.site.r, layer.site.scale) for n, layer in adapters}

    assert built("adalora", 7) == {"0": (11, 2.0), "1": (11, 2.0)}
    assert built("adalora", 8) == {"0": (12, 2.0), "1": (11, 24 / 11)}, "at most min(in, out)"
    assert built("adalora(target_r=6)") == {"0": (9, 2.0), "1": (9, 2.0)}
    assert built("adalora(init_r=6)", 4, lora_alpha=3) == {"0": (6, 0.5), "1": (6, 0.5)}
    assert built("adalora+rslora", 6) == {"0": (9, 2.0), "1": (9, 2.0)}
    patterned = built("adalora(init_r=6)", 4, rank_pattern={"1": 2})
    assert patterned == {"0": (6, 2.0), "1": (3, 4.0)}
    with pytest.raises(ValueError, match=r"would build '1' \(11 x 40\) with 12 ranks"):
        built("adalora(init_r=12)", 8)
    with pytest.raises(ValueError, match="of which 8 are to remain; give `init_r` from 8 to 40"):
        built("adalora(init_r=6)", 8)
    with pytest.raises(ValueError, match="`r=4` beside `adalora`"):
        built("adalora(target_r=6)", 4)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "olora", "pissa"])
def test_every_start_may_stand_in_its_place(init):
    """Λ is 1 then, so that the product is what the init meant it to be."""
    plain = lorica.attach(chain(), f"svd+{init}", r=3, dtype=torch.float64, verbose=False)
    lora = lorica.attach(chain(), init, r=3, dtype=torch.float64, verbose=False)
    for (_, ours), (_, theirs) in zip(plain.pairs(), lora.pairs(), strict=True):
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)
        assert bool((ours.E == 1).all())
    adapters, optimizer = begin(f"adalora({PLAN})+{init}")
    x, _ = data(0)
    torch.testing.assert_close(adapters.model(x), chain()(x), rtol=0, atol=1e-12)
    for step in range(STEPS):
        move(adapters, optimizer, step)
    assert alive(adapters) == 2 * 3


# -- the budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [(0, 1, 1), (4, 15, 3), (10, 30, 7), (0, 20, 2)])
def test_the_budget_falls_from_the_first_to_the_last(plan):
    tinit, tfinal, every = plan
    schedule: Any = (
        Recipe.parse(f"adalora(tinit={tinit}, tfinal={tfinal}, deltaT={every})")
        .schedules[0]
        .fit(STEPS)
    )
    values = [schedule.budget(t, STEPS, 42, 28) for t in range(STEPS)]
    assert values == [twin.budget(t, STEPS, tinit, tfinal, 42, 28) for t in range(STEPS)]
    assert values == sorted(values, reverse=True)
    assert values[tinit] == 42 and values[STEPS - tfinal] == 28
    due = [t for t in range(STEPS) if schedule.due(t, STEPS)]
    assert len(due) == schedule.events(STEPS) and due[-1] == STEPS - tfinal
    assert all(t % every == 0 for t in due[:-1])


def test_the_budget_is_pefts():
    peft: Any = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    fields = {"tinit": 4, "tfinal": 15, "deltaT": 3, "total_step": 60, "target_r": 2, "init_r": 4}
    allocator = RankAllocator(nn.Linear(2, 2), peft.AdaLoraConfig(**fields), "default")
    allocator.init_bgt, allocator.target_bgt = 42, 28
    schedule: Any = Recipe.parse(f"adalora({PLAN})").schedules[0].fit(STEPS)
    for t in range(STEPS):
        theirs, masks = allocator.budget_schedule(t)
        assert schedule.budget(t, STEPS, 42, 28) == theirs
        if t < STEPS - TFINAL:
            assert schedule.due(t, STEPS) == masks


def test_what_is_left_out_is_fitted_in_the_papers_proportions():
    def fitted(steps: int, **given: int) -> tuple[int, int, int]:
        text = ", ".join(f"{k}={v}" for k, v in given.items())
        s: Any = Recipe.parse(f"adalora({text})").schedules[0].fit(steps)
        return s.tinit, s.tfinal, s.deltaT

    assert fitted(6700) == (837, 3350, 12)  # CoLA: 800, 3500, 10
    assert fitted(50520) == (6315, 25260, 94)  # SST-2: 6000, 22000, 100
    assert fitted(3) == (0, 1, 1)
    assert fitted(100, tinit=70) == (70, 15, 1)
    assert fitted(100, tfinal=90) == (2, 90, 1)
    assert fitted(100, deltaT=9) == (12, 50, 9)
    for steps in range(3, 60):
        schedule: Any = Recipe.parse("adalora").schedules[0].fit(steps)
        assert schedule.events(steps) >= 2


def test_without_a_final_phase_the_last_step_masks():
    adapters, optimizer = begin("adalora(tinit=2, tfinal=0, deltaT=4)", steps=20)
    schedule = adapters.recipe.schedules[0].fit(20)
    for step in range(20):
        move(adapters, optimizer, step)
    assert alive(adapters) == 6 and schedule.final_from(20) == 20


@pytest.mark.parametrize("steps", [20, 31])
def test_the_weights_are_what_was_promised_once_the_pattern_is_final(steps):
    adapters, optimizer = begin("adalora", steps=steps)
    final = adapters.recipe.schedules[0].fit(steps).final_from(steps)
    assert 1 < final < steps
    for done in range(1, steps + 1):
        move(adapters, optimizer, done - 1)
        masks = [pair.mask for _, pair in adapters.pairs()]
        assert (sum(int(m.sum()) for m in masks) == alive(adapters) == 6) == (done >= final)


# -- the twin, and PEFT ----------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_it_is_the_twin_over_sixty_steps(weight):
    adapters, optimizer = begin(f"adalora({PLAN}, init_r=4, orth_reg_weight={weight})")
    pairs = [pair for _, pair in adapters.pairs()]
    run = twin.Run(
        [layer.store.weight().detach() for _, layer in adapters],
        [(p.A.detach(), p.E.detach(), p.B.detach()) for p in pairs],
        pairs[0].scale, 0.02, STEPS, TINIT, TFINAL, EVERY, 2 * 3, gamma=weight,
    )  # fmt: skip
    counts = []
    for t in range(STEPS):
        run.step(*data(t))
        move(adapters, optimizer, t)
        for pair, (A, E, B) in zip(pairs, run.triplets, strict=True):
            for ours, theirs in ((pair.A, A), (pair.E, E), (pair.B, B)):
                torch.testing.assert_close(
                    ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-12, msg=f"step {t}"
                )
        if t > TINIT and t % EVERY == 0 and t < STEPS - TFINAL:
            now = twin.budget(t, STEPS, TINIT, TFINAL, 12, 6)
            counts.append(now)
            assert alive(adapters) == now
            assert optimizer.param_groups[0]["lorica"]["schedules"]["adalora"]["budget"] == now
        if t >= STEPS - TFINAL:
            assert alive(adapters) == 6
    assert run.keep is not None and len(set(counts)) > 3
    for (_, layer), keep in zip(adapters, run.keep, strict=True):
        assert layer.update.delta.mask.flatten().tolist() == [float(k) for k in keep]


class WithLoss(nn.Module):
    """What PEFT's forward takes for a model: an output with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=nn.functional.mse_loss(self.body(x), y))


@pytest.mark.parametrize("interval", [1, 3])
def test_it_is_peft_over_sixty_steps(interval):
    """Forward, penalty, and the allocator's masks after every step, in doubles."""
    from peft import AdaLoraConfig, get_peft_model

    fields: dict[str, Any] = {"init_r": 4, "tinit": TINIT, "tfinal": TFINAL, "deltaT": interval}
    config = AdaLoraConfig(
        **fields, target_r=2, total_step=STEPS, lora_alpha=5, orth_reg_weight=0.3,
        target_modules=["0", "2", "4"],
    )  # fmt: skip
    theirs: Any = get_peft_model(WithLoss(), config).double().base_model
    method = f"adalora({', '.join(f'{k}={v}' for k, v in fields.items())}, orth_reg_weight=0.3)"
    adapters, optimizer = begin(method, lora_alpha=4 * 5 / (4 + 1e-5))
    own = {n: theirs.model.body.get_submodule(n) for n in adapters.layers}
    both = [
        (ours, side["default"])
        for name, pair in adapters.pairs()
        for ours, side in ((pair.A, own[name].lora_A), (pair.B, own[name].lora_B),
                           (pair.E, own[name].lora_E))
    ]  # fmt: skip
    for ours, side in both:
        side.data.copy_(ours.data)
    base = torch.optim.AdamW([q for _, q in both], lr=0.02, weight_decay=0)
    counts = set()
    for t in range(STEPS):
        x, y = data(t)
        loss = theirs(x, y).loss
        mine = adapters.loss({"loss": nn.functional.mse_loss(adapters.model(x), y)})
        torch.testing.assert_close(mine, loss, rtol=1e-11, atol=0)
        for value, rule in ((loss, base), (mine, optimizer)):
            value.backward()
            rule.step()
        theirs.update_and_allocate(t)
        base.zero_grad()
        optimizer.zero_grad()
        for ours, side in both:
            torch.testing.assert_close(ours.data, side.data, rtol=1e-9, atol=1e-12, msg=f"{t}")
        counts.add(alive(adapters))
    assert alive(adapters) == 6 and len(counts) > 4
    for name, layer in adapters:
        kept = config.rank_pattern[f"body.{name}.lora_E.default"]  # type: ignore[index]
        assert layer.update.delta.mask.flatten().bool().tolist() == kept


# -- importance ------------------------------------------------------------------------------------


def test_a_wrongly_pruned_triplet_comes_back():
    adapters, optimizer = begin(f"adalora({PLAN}, init_r=4)")
    dead: set[tuple[int, int]] = set()
    for t in range(STEPS):
        move(adapters, optimizer, t)
        if t <= STEPS - TFINAL and t > TINIT and t % EVERY == 0:
            for k, E in enumerate(diagonals(adapters)):
                dead |= {(k, i) for i in range(4) if E[i] == 0}
    final = {(k, i) for k, E in enumerate(diagonals(adapters)) for i in range(4) if E[i] != 0}
    assert len(final) == 6 and final & dead


def test_among_equals_the_first_stay():
    scores = [torch.tensor([0.5, 0.5, 0.1]), torch.tensor([0.5, 0.9])]
    assert [k.tolist() for k in best(scores, 3)] == [[True, True, False], [False, True]]
    assert sum(int(k.sum()) for k in best([torch.zeros(4), torch.zeros(3)], 5)) == 5


@pytest.mark.parametrize("importance", ["sensitivity", "instant", "magnitude"])
def test_each_importance_picks_its_own(importance):
    adapters, optimizer = begin(
        f"adalora(tinit=1, tfinal=8, deltaT=3, importance='{importance}')", steps=12
    )
    pairs, picked = [p for _, p in adapters.pairs()], {}

    def look(*_: Any) -> None:  # after the optimizer, before the schedule
        s: Any = optimizer.param_groups[0]["lorica"]["schedules"]["adalora"]
        score = []
        for name, p in adapters.pairs():
            if importance == "magnitude":
                score.append(p.E.detach().abs().flatten())
                continue
            if importance == "instant":
                e, a, b = ((q * q.grad).abs().detach() for q in (p.E, p.A, p.B))
            else:
                now = {k: (q * q.grad).abs().detach() for k, q in
                       (("E", p.E), ("A", p.A), ("B", p.B))}  # fmt: skip
                mean = {k: 0.85 * s["mean"][name][k] + 0.15 * v for k, v in now.items()}
                e, a, b = (
                    mean[k] * (0.85 * s["spread"][name][k] + 0.15 * (now[k] - mean[k]).abs())
                    for k in "EAB"
                )
            score.append(e.flatten() + a.mean(1) + b.mean(0))
        picked["keep"] = torch.cat(score)

    hooks: Any = optimizer._optimizer_step_post_hooks
    optimizer.register_step_post_hook(look)
    hooks.move_to_end(next(reversed(hooks)), last=False)
    for t in range(4):
        move(adapters, optimizer, t)
    left = torch.cat([p.E.detach().flatten() for p in pairs]) != 0
    order = picked["keep"].argsort(descending=True)
    assert set(order[: int(left.sum())].tolist()) == set(left.nonzero().flatten().tolist())
    assert int(left.sum()) < 9


def test_no_gradient_and_no_number_count_as_no_importance():
    adapters, optimizer = begin("adalora(tinit=1, tfinal=4, deltaT=2)", steps=12)
    names = list(adapters.layers)
    for t in range(9):
        x, y = data(t)
        adapters.loss({"loss": nn.functional.mse_loss(adapters.model(x), y)}).backward()
        for p in adapters.layers[names[0]].parameters():
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.param_groups[0]["lorica"]["schedules"]["adalora"]
    assert not any(v.any() for v in state["mean"][names[0]].values())
    assert alive(adapters) == 6 and not diagonals(adapters)[0].any()
    p = nn.Parameter(torch.tensor([2.0, 3.0, -4.0, 5.0]))
    p.grad = torch.tensor([float("nan"), float("inf"), 0.5, -1.0])
    assert sensitivity([p])[0].tolist() == [0, 0, 2, 5] and p.grad.isnan().any()


def test_what_never_fires_or_has_no_effect_is_refused():
    with pytest.raises(ValueError, match="so it fires 0 times .* give at most `deltaT=40`"):
        begin("adalora(tinit=4, tfinal=15, deltaT=50)")
    for plan in ("tinit=50, tfinal=15", "tfinal=60", "tinit=59"):
        with pytest.raises(ValueError, match="for the budget to fall, and at least 2"):
            begin(f"adalora({plan})")
    with pytest.raises(ValueError, match="in 2 steps leaves 1 for the budget"):
        begin("adalora", steps=2)
    with pytest.raises(ValueError, match="give `total_steps`"):
        lorica.optimizer(lorica.attach(chain(), "adalora", r=2, verbose=False))
    with pytest.raises(ValueError, match="begins with 6 ranks, and 6 are to remain"):
        begin("adalora(init_r=2)")
    message = "has no effect here: `importance='magnitude'` keeps no averages"
    with pytest.raises(ValueError, match=message):
        Recipe.parse("adalora(importance='magnitude', beta1=0.5)")
    with pytest.raises(ValueError, match="`adalora` and `sora` both|`svd.*gated`|leave one"):
        Recipe.parse("adalora+sora")
    for given in ("beta1=1", "tinit=-1", "deltaT=0", "importance='luck'", "orth_reg_weight=-1"):
        with pytest.raises(ValueError, match="adalora"):
            Recipe.parse(f"adalora({given})")


# -- the penalty -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_the_penalty_is_the_equation(form):
    adapters = lorica.attach(
        chain(), f"svd+init.svd+orthogonality(weight=0.3, form='{form}')", r=2,
        dtype=torch.float64, verbose=False,
    )  # fmt: skip
    pairs = [(p.A, p.B) for _, p in adapters.pairs()]
    zero = torch.zeros((), dtype=torch.float64)
    for share in (1.0, 0.25):
        ours = adapters.loss({"loss": zero}, share=share)
        torch.testing.assert_close(ours, 0.3 * share * twin.penalty(pairs, form))
    with torch.no_grad():
        for A, B in pairs:
            A.copy_(torch.linalg.qr(A.T).Q.T)
            B.copy_(torch.linalg.qr(B).Q)
    value = adapters.loss({"loss": zero})
    value.backward()
    assert value.item() < 1e-12
    assert all(p.grad.isfinite().all() for pair in pairs for p in pair), "no 0/0 at its minimum"


@pytest.mark.parametrize("method", [
    "xgblora(every=2, layers=1)", "relora(every=3, rewarm=0, warm_start=3)",
])  # fmt: skip
def test_what_rests_gets_no_penalty(method):
    fields = {"r": 2} if "relora" in method else {}
    adapters = lorica.attach(
        chain(), f"{method}+orthogonality(weight=0.3)", dtype=torch.float64, verbose=False,
        **fields,
    )  # fmt: skip
    optimizer = lorica.optimizer(adapters, lr=0.02, total_steps=20, seed=1)
    counts = []
    for t in range(6):
        x, y = data(t)
        task = nn.functional.mse_loss(adapters.model(x), y)
        loss = adapters.loss({"loss": task})
        pairs = {
            name: pair for name, pair in adapters.pairs()
            if not any("delta" in path for path in adapters.layers[name].frozen_for_now)
        }  # fmt: skip
        own = twin.penalty([(p.A, p.B) for p in pairs.values()]) if pairs else 0.0
        torch.testing.assert_close(loss.detach(), task.detach() + 0.3 * own)
        loss.backward()
        for name, pair in adapters.pairs():
            assert (pair.A.grad is None) == (pair.B.grad is None) == (name not in pairs), (t, name)
        counts.append(len(pairs))
        optimizer.step()
        optimizer.zero_grad()
    assert counts == ([1] * 6 if "xgblora" in method else [0, 0, 0, 3, 3, 3])


def test_it_keeps_triplets_orthonormal():
    far = {}
    for weight in (0, 0.5):
        adapters, optimizer = begin(f"adalora({PLAN}, orth_reg_weight={weight})")
        assert len(adapters.recipe.objectives) == (weight > 0)
        for t in range(STEPS):
            move(adapters, optimizer, t)
        far[weight] = twin.penalty([(p.A, p.B) for _, p in adapters.pairs()]).item()
    assert far[0.5] < 0.3 * far[0], far


# -- what remains ----------------------------------------------------------------------------------


def trained(method: str, model: Any, steps: int = 16, **fields: Any):
    adapters = lorica.attach(model, method, r=2, verbose=False, **fields)
    optimizer = lorica.optimizer(adapters, lr=2e-2, total_steps=steps)
    train(adapters, optimizer, steps)
    return adapters


PRUNED = "adalora(init_r=4, tinit=1, tfinal=4, deltaT=2)"


def test_what_is_pruned_can_be_cut_away():
    adapters = trained(PRUNED, llama().double())
    before, ranks = logits(adapters.model), []
    for _, layer in adapters:
        delta = layer.update.delta
        keep = delta.E.flatten() != 0
        ranks.append(int(keep.sum()))
        cut = delta.scale * (delta.B[:, keep] * delta.E[keep].T) @ delta.A[keep]
        torch.testing.assert_close(cut, delta.weight(None), rtol=1e-12, atol=1e-14)
        assert layer.site.scale == 2, "s stays that of the rank it was built with"
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 2
    lorica.merge(adapters.model)
    torch.testing.assert_close(logits(adapters.model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beside", ["", "+dora", "+rslora", "+loraplus", "+lorafa", "+riemannian",
                                    "+lorarite", "+pissa", "+sgd"])  # fmt: skip
def test_it_stands_beside_other_parts(beside):
    adapters = trained(PRUNED + beside, llama(num_hidden_layers=1))
    assert alive(adapters) == 2 * len(adapters)
    for p in adapters.model.parameters():
        assert p.isfinite().all()
    moved = [not torch.equal(layer.effective()[0], layer.store.weight()) for _, layer in adapters]
    assert any(moved)


def test_a_dead_triplet_stays_dead_whatever_the_optimizer_does():
    """Its λ has no gradient once the pattern is final, and momentum alone cannot move it."""
    adapters, optimizer = begin(f"adalora({PLAN}, init_r=4)")
    for t in range(STEPS - 1):
        move(adapters, optimizer, t)
    x, y = data(0)
    nn.functional.mse_loss(adapters.model(x), y).backward()
    for _, layer in adapters:
        delta = layer.update.delta
        gone = delta.mask.flatten() == 0
        assert not delta.E.grad[gone].any()
        assert delta.E.grad[~gone].all()
        before = adapters.model(x)
        with torch.no_grad():
            delta.E[gone] = 5.0
        assert torch.equal(adapters.model(x), before)
        assert not any(n.endswith("mask") and p.requires_grad for n, p in delta.named_parameters())


@pytest.mark.parametrize("cut", [4, 9, 10, 11, 18, 20])
def test_a_resumed_run_is_the_straight_run(cut, tmp_path):
    """Maskings follow steps 3, 6, 9, 12, 15 and 18; the last is final."""
    method = "adalora(init_r=4, tinit=2, tfinal=6, deltaT=3)"

    def start():
        adapters = lorica.attach(llama(num_hidden_layers=1), method, r=2, verbose=False)
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=24, seed=3)

    adapters, optimizer = start()
    train(adapters, optimizer, cut)
    parts = {"a": adapters.state_dict(), "o": optimizer.state_dict()}
    torch.save(parts, tmp_path / "cut.pt")
    train(adapters, optimizer, 24 - cut, first=cut)
    again, resumed = start()
    parts = torch.load(tmp_path / "cut.pt", weights_only=True)
    again.load_state_dict(parts["a"])
    resumed.load_state_dict(parts["o"])
    train(again, resumed, 24 - cut, first=cut)
    assert again.fingerprint() == adapters.fingerprint()
    assert alive(adapters) == 2 * len(adapters)


@pytest.mark.parametrize("start", ["", "+olora"])
def test_restarts_beside_the_parametrisation_keep_the_function(start):
    adapters = lorica.attach(
        llama(num_hidden_layers=1).double(), f"relora(every=4, rewarm=0)+svd{start}", r=4,
        dtype=torch.float64, verbose=False,
    )  # fmt: skip
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=14)
    train(adapters, optimizer, 4)
    seen: list[torch.Tensor] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(logits(adapters.model)))
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(next(reversed(hooks)), last=False)  # look before the schedule does
    before = [p.A.detach().clone() for _, p in adapters.pairs()]
    train(adapters, optimizer, 1, first=4)
    torch.testing.assert_close(logits(adapters.model), seen[0], rtol=1e-11, atol=1e-11)
    assert not any(torch.equal(p.A, a) for (_, p), a in zip(adapters.pairs(), before, strict=True))


@pytest.mark.parametrize(
    "restart", ["cola(every=5)", "relora(every=4, rewarm=0)", "plora(every=5, momentum=0.3)"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_restart_forgets_what_the_old_vectors_were_worth(restart, first):
    own = f"adalora({PLAN})"
    adapters, optimizer = begin(f"{restart}+{own}" if first else f"{own}+{restart}")
    state = optimizer.param_groups[0]["lorica"]["schedules"]["adalora"]

    def known() -> list[bool]:
        kept = (state[name][layer] for name in ("mean", "spread") for layer in adapters.layers)
        return [any(bool(value.any()) for value in sides.values()) for sides in kept]

    for t in range(4):
        move(adapters, optimizer, t)
    assert all(known())
    move(adapters, optimizer, 4)  # and the link ends
    assert not any(known())
    for t in range(5, 8):
        move(adapters, optimizer, t)
    assert all(known())


def test_only_the_layers_that_restart_are_forgotten():
    adapters, optimizer = begin(f"adalora({PLAN})")
    for t in range(3):
        move(adapters, optimizer, t)
    own = optimizer.param_groups[0]["lorica"]
    some, *others = adapters.layers
    Training(optimizer, adapters, own).restarted([some])
    for kept in (own["schedules"]["adalora"][name] for name in ("mean", "spread")):
        assert not any(value.any() for value in kept[some].values())
        assert all(value.any() for name in others for value in kept[name].values())


# -- what it is for --------------------------------------------------------------------------------


NEEDS = (5, 1, 0)  # ranks of what three layers have to learn


def allotted(method: str, lr: float, seed: int, steps: int = 300):
    """(ranks of three layers side by side, loss at the end over that at the start)."""
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in NEEDS)
    goals = []
    for layer, need in zip(model, NEEDS, strict=True):
        change = torch.randn(24, need) @ torch.randn(need, 24) + 0.01 * torch.randn(24, 24)
        goals.append(layer.weight.detach() + change / 24)  # type: ignore[operator]
    adapters = lorica.attach(model, method, r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=lr, total_steps=steps)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 24)
        off = [(layer(x) - x @ g.T).square().mean() for layer, g in zip(model, goals, strict=True)]
        loss = torch.stack(off).sum()
        adapters.loss({"loss": loss}).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ranks = [len(p.A) if p.E is None else int(p.E.count_nonzero()) for _, p in adapters.pairs()]
    return ranks, sum(losses[-20:]) / 20 / losses[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_go_where_they_are_needed(seed):
    """At equal total rank a uniform one is too small for the first layer and idle in the last."""
    ranks, loss = allotted("adalora(init_r=6)", 3e-2, seed)
    assert ranks == [*NEEDS]
    uniform = min(allotted("lora", lr, seed)[1] for lr in (1e-2, 3e-2))
    assert loss < 0.01 * uniform, (loss, uniform)


def test_averages_choose_better_than_one_step():
    """The paper's ablation: the sensitivity of a single batch is noise in part."""
    worst = {
        how: max(allotted(f"adalora(init_r=6, importance='{how}')", 3e-2, seed)[1]
                 for seed in (0, 1))
        for how in ("sensitivity", "instant")
    }  # fmt: skip
    assert worst["sensitivity"] < 0.01 * worst["instant"], worst
