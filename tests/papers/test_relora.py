"""ReLoRA, arXiv 2307.05695: rank beyond r by restarts, at a jagged rate."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

import chains
import lorica
from chains import IN, OUT, R, gradient, move
from lorica import Recipe
from lorica.methods.schedules.relora.jagged import jagged, prune_state
from models import llama, logits, train
from reference import relora as twin

STEPS = 60
one = functools.partial(chains.one, steps=STEPS)


# -- the rate --------------------------------------------------------------------------------------


def test_the_jagged_cosine_has_the_authors_values():
    curve = {"steps": 20000, "warmup": 500, "floor": 0.1, "cycle": 5000, "rewarm": 100}
    expected = {
        0: 0.0, 250: 0.5, 500: 1.0, 4999: 0.886878, 5000: 0.0, 5001: 0.008820, 5050: 0.440989,
        5100: 0.881979, 10000: 0.0, 10100: 0.560874, 19999: 0.100000,
    }  # fmt: skip
    for u, value in expected.items():
        assert jagged(u, **curve) == pytest.approx(value, abs=5e-7)
    for u in range(0, 20000, 7):
        assert jagged(u, **curve) == pytest.approx(twin.jagged(u, 20000, 500, 5000, 100, 0.1))


def rates(method: str, steps: int, **fields) -> list[float]:
    adapters, optimizer = one(method, steps=steps, lr=1.0, **fields)
    out = []
    for step in range(steps):
        move(adapters, optimizer, step)
        out.append(optimizer.param_groups[0]["lorica"]["rate"])
        assert optimizer.param_groups[0]["lr"] == 1.0, "for the step alone"
    return out


def test_the_rate_of_each_step_is_the_curves():
    method = "relora(every=10, rewarm=3, lr_scheduler_type='jagged_cosine', warmup_steps=4)"
    assert rates(method, 40) == pytest.approx(
        [twin.jagged(u, 40, 4, 10, 3, 0.1) for u in range(40)]
    )


def test_the_ramp_multiplies_any_schedulers_rate():
    flat = rates("relora(every=10, rewarm=4)", 30)
    assert flat == [1.0] * 10 + [0, 0.25, 0.5, 0.75] + [1.0] * 6 + [0, 0.25, 0.5, 0.75] + [1.0] * 6
    after = rates("relora(every=10, rewarm=4, warm_start=3)", 20)
    assert after == [1.0] * 3 + [0, 0.25, 0.5, 0.75] + [1.0] * 6 + [0, 0.25, 0.5, 0.75] + [1.0] * 3


# -- the twin --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("jaggedly", "cycle"), [(False, 20), (True, 20), (False, 15), (True, 30),
                                                 (False, 8)])  # fmt: skip
def test_it_is_the_twin_over_sixty_steps(jaggedly, cycle):
    """A reset has its own period: it may fall on a merge, on some of them, or beside all."""
    curve = "lr_scheduler_type='jagged_cosine', warmup_steps=5" if jaggedly else "warm_start=0"
    adapters, optimizer = one(f"relora(every=20, cycle={cycle}, rewarm=4, {curve})")
    layer = adapters.layers["0"]
    pair = next(adapters.pairs())[1]
    run = twin.Run(layer.store.weight().detach(), pair.A.detach(), pair.scale)
    for u in range(STEPS):
        if jaggedly:
            factor = twin.jagged(u, STEPS, 5, cycle, 4, 0.1)
        else:
            factor = u % cycle / 4 if u >= cycle and u % cycle < 4 else 1.0
        run.step(gradient(run.effective(), u)[2], 0.02 * factor)
        move(adapters, optimizer, u)
        if twin.after(u, 20, STEPS):
            run.restart(pair.A.detach())
            assert not pair.B.any()
        if twin.after(u, cycle, STEPS):
            run.reset()
        torch.testing.assert_close(
            layer.effective()[0].detach(), run.effective(), rtol=1e-9, atol=1e-11
        )
        torch.testing.assert_close(pair.B.detach(), run.B, rtol=1e-8, atol=1e-11)
    assert optimizer.param_groups[0]["lorica"]["schedules"]["relora"]["links"] == 2


def test_a_merge_is_the_one_that_peft_makes():
    peft: Any = pytest.importorskip("peft")
    adapters, optimizer = one("relora(every=5, rewarm=0)", steps=10)
    layer = adapters.layers["0"]
    theirs: Any = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    theirs[0].weight.data.copy_(layer.store.weight())
    wrapped = peft.get_peft_model(
        theirs,
        peft.LoraConfig(r=R, lora_alpha=3, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    own = wrapped.base_model.model[0]
    pair = next(adapters.pairs())[1]
    own.lora_A["default"].weight.data.copy_(pair.A)
    base = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], lr=0.02, weight_decay=0
    )
    for step in range(6):
        x, y, _ = gradient(torch.zeros(OUT, IN, dtype=torch.float64), step)
        nn.functional.mse_loss(wrapped(x), y).backward()
        base.step()
        base.zero_grad()
        move(adapters, optimizer, step)
    merged = wrapped.merge_and_unload()[0].weight
    torch.testing.assert_close(
        layer.store.weight().detach(), merged.detach(), rtol=1e-9, atol=1e-11
    )


# -- the optimizer's memory ------------------------------------------------------------------------


def test_after_a_zero_reset_the_first_step_is_as_long_as_ever():
    """With the step count kept it would be (1 − β₁)/√(1 − β₂) = 3.16 times as long."""
    adapters, optimizer = one("relora(every=30, rewarm=0)", lr=1e-3)
    for step in range(31):
        move(adapters, optimizer, step)
    pair = next(adapters.pairs())[1]
    assert all(not v.any() for p in (pair.A, pair.B) for v in optimizer.state[p].values())
    before = pair.B.detach().clone()
    move(adapters, optimizer, 31)
    torch.testing.assert_close((pair.B - before).abs().max().item(), 1e-3, rtol=1e-3, atol=0)


@pytest.mark.parametrize("masks", ["shared", "separate"])
def test_magnitude_pruning_keeps_the_largest_and_the_step_count(masks):
    method = f"relora(every=30, rewarm=0, reset='magnitude', prune_ratio=0.5, masks='{masks}')"
    adapters, optimizer = one(method)
    for step in range(30):
        move(adapters, optimizer, step)
    # The thirty-first step as it is without a restart gives the moments before pruning.
    plain = copy.deepcopy(adapters.state_dict()), copy.deepcopy(optimizer.state_dict())
    move(adapters, optimizer, 30)
    other, unpruned = one("relora(every=50, rewarm=0, reset='magnitude', prune_ratio=0.5)")
    other.load_state_dict(plain[0])
    plain[1]["param_groups"][0]["lorica"] = unpruned.param_groups[0]["lorica"]
    unpruned.load_state_dict(plain[1])
    move(other, unpruned, 30)
    for p, q in zip(optimizer.state, unpruned.state, strict=True):
        ours, before = optimizer.state[p], unpruned.state[q]
        names = ["exp_avg", "exp_avg_sq"]
        if masks == "shared":
            expected = twin.keep_largest([before[n] for n in names], 0.5)
        else:
            expected = [twin.keep_largest([before[n]], 0.5)[0] for n in names]
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(ours[name], value)
            assert int((ours[name] != 0).sum()) == p.numel() - round(0.5 * p.numel())
        assert ours["step"] == 31


def test_random_pruning_keeps_its_share_and_ties_keep_nothing():
    shape, generator = torch.Size((200, 300)), torch.Generator().manual_seed(0)
    state = {
        "exp_avg": torch.randn(shape),
        "exp_avg_sq": torch.rand(shape),
        "step": torch.tensor(3.0),
    }
    prune_state(state, shape, "random", 0.9, shared=True, generator=generator)
    kept = (state["exp_avg"] != 0).float().mean().item()
    assert kept == pytest.approx(0.1, abs=0.01) and state["step"] == 3
    assert torch.equal(state["exp_avg"] != 0, state["exp_avg_sq"] != 0)
    equal = {"exp_avg": torch.ones(4, 5)}
    prune_state(equal, torch.Size((4, 5)), "magnitude", 0.5, shared=True, generator=generator)
    assert not equal["exp_avg"].any()


def test_a_reset_may_come_less_often_than_a_merge():
    adapters, optimizer = one("relora(every=4, cycle=8, rewarm=2)", steps=20)
    (_, pair), counts = next(adapters.pairs()), []
    for step in range(20):
        move(adapters, optimizer, step)
        counts.append(int(optimizer.state[pair.A]["step"]))
    assert counts[4] == 5 and counts[8] == 0 and counts[12] == 4 and counts[16] == 0
    assert optimizer.param_groups[0]["lorica"]["schedules"]["relora"]["links"] == 4


@pytest.mark.parametrize(("every", "cycle", "warm"), [(4, 6, 0), (6, 4, 0), (4, 3, 5), (7, 7, 0)])
def test_resets_and_merges_fall_where_each_has_its_period(every, cycle, warm):
    """At the steps that have rate 0, whether a merge is due there or not."""
    T = 27
    method = f"relora(every={every}, cycle={cycle}, rewarm=1, warm_start={warm})"
    adapters, optimizer = one(method, steps=T)
    pair, own = next(adapters.pairs())[1], optimizer.param_groups[0]["lorica"]
    resets, merges, rested, links = [], [], [], 0
    for step in range(T):
        move(adapters, optimizer, step)
        state = optimizer.state.get(pair.A, {})
        if state and step >= warm and not state["step"]:
            assert not any(v.any() for p in (pair.A, pair.B) for v in optimizer.state[p].values())
            resets.append(step - warm)
        if own["schedules"]["relora"]["links"] > links:
            links += 1
            merges.append(step - warm)
        if own["rate"] == 0:
            rested.append(step - warm)
    assert merges == [u for u in range(T - warm) if twin.after(u, every, T - warm)]
    assert resets == [u for u in range(T - warm) if twin.after(u, cycle, T - warm)]
    assert [u for u in rested if 0 < u < T - warm - 1] == resets


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random"])
def test_resets_without_merges_resume_to_the_bit(reset):
    method = f"relora(every=4, cycle=3, rewarm=1, reset='{reset}')"
    straight, ends = one(method, steps=14), []
    saved = []
    for step in range(14):
        saved.append(copy.deepcopy([part.state_dict() for part in straight]))
        move(*straight, step)
    for cut in range(1, 14):
        resumed = one(method, steps=14)
        for part, state in zip(resumed, copy.deepcopy(saved[cut]), strict=True):
            part.load_state_dict(state)
        for step in range(cut, 14):
            move(*resumed, step)
        ends.append(resumed)
    for adapters, optimizer in ends:
        for name, value in straight[0].state_dict().items():
            assert torch.equal(adapters.state_dict()[name], value), name
        moments = straight[1].state_dict()["state"]
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(v, moments[i][k]) for k, v in state.items())


# -- what it is for --------------------------------------------------------------------------------


def test_the_rank_of_what_was_learnt_exceeds_r():
    adapters, optimizer = one("relora(every=12, rewarm=0)")
    layer = adapters.layers["0"]
    start = layer.effective()[0].detach()
    ranks = []
    for step in range(STEPS):
        move(adapters, optimizer, step)
        if step in (10, 20, 35):
            change = layer.effective()[0].detach() - start
            ranks.append(int((torch.linalg.svdvals(change) > 1e-9).sum()))
    assert ranks == [R, 2 * R, min(IN, 3 * R)]


def student(method: str, lr: float, steps: int = 1500) -> tuple[float, float]:
    """(mean loss of the last 100 steps, floor of any one rank-8 update) on a 64 x 64 teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 64, generator=generator) / 8
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 64, bias=False))
    gap = torch.linalg.svdvals(teacher - model[0].weight.detach())
    adapters = lorica.attach(model, method, r=8, lora_alpha=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=lr, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        x = torch.randn(256, 64, generator=generator)
        loss = nn.functional.mse_loss(model(x), x @ teacher.T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return sum(losses[-100:]) / 100, float(gap[8:].square().sum() / 64)


def test_restarts_pass_the_floor_of_one_low_rank_update():
    lora, floor = student("lora", 0.02)
    relora, _ = student("relora(every=187, rewarm=20)", 0.02)
    assert lora > 0.99 * floor and relora < 0.05 * floor, (lora, relora, floor)


# -- the warm start --------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["", "+dora+olora"])
def test_in_the_warm_start_the_base_trains_and_the_adapters_rest(beside):
    method = f"relora(every=3, warm_start=4, rewarm=0){beside}"
    adapters = lorica.attach(
        llama(num_hidden_layers=1), method, r=4, train_rest=True, verbose=False
    )
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=14)
    layer = next(iter(adapters.layers.values()))
    (_, pair), weight = next(adapters.pairs()), layer.store.parameter
    for step in range(14):
        A, B, W = (t.detach().clone() for t in (pair.A, pair.B, weight))
        train(adapters, optimizer, 1, first=step)
        warm = step < 4
        assert (weight in optimizer.state) == (step < 3)
        moved = not torch.equal(pair.A, A) or not torch.equal(pair.B, B)
        assert moved if not warm or step == 3 else not moved
        assert torch.equal(weight, W) == (not warm and step - 4 not in (3, 6)), step
    assert int(optimizer.state[pair.A]["step"]) == 3  # the last restart came after step 10


def test_the_warm_start_of_a_plain_update_is_full_training():
    steps = 4
    warm = lorica.attach(llama(), f"relora(every=3, warm_start={steps}, rewarm=0)", r=4,
                         train_rest=True, verbose=False)  # fmt: skip
    full = lorica.attach(llama(), "full", verbose=False)
    for adapters in (warm, full):
        adapters.model.train()
        train(adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=14), steps)
    torch.testing.assert_close(logits(warm.model), logits(full.model), rtol=1e-4, atol=1e-4)


def test_the_end_of_the_warm_start_keeps_the_function():
    adapters = lorica.attach(llama().double(), "relora(every=3, warm_start=2, rewarm=0)+dora+pissa",
                             r=4, dtype=torch.float64, verbose=False)  # fmt: skip
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=14)
    train(adapters, optimizer, 1)
    seen = []
    schedule: Any = optimizer._optimizer_step_post_hooks
    optimizer.register_step_post_hook(lambda *_: seen.append(logits(adapters.model)))
    schedule.move_to_end(next(iter(schedule)))  # look before the schedule does, too
    train(adapters, optimizer, 1, first=1)
    torch.testing.assert_close(logits(adapters.model), seen[0], rtol=1e-12, atol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "message"), [
    ("relora(every=0)", "at least 1"),
    ("relora(reset='some')", "'zero', 'random', 'magnitude'"),
    ("relora(prune_ratio=0.5)", "no effect"),
    ("relora(min_lr_ratio=0.5)", "no effect"),
    ("relora(reset='random', prune_ratio=1.5)", r"\[0, 1\]"),
    ("relora(warm_start=-1)", "at least 0"),
])  # fmt: skip
def test_arguments_out_of_range(method, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(method)


@pytest.mark.parametrize(("method", "steps", "message"), [
    ("relora(every=19)", 20, r"would restart 0 times in 20 steps; give at most 18"),
    ("relora", None, "cannot be fitted"),
    ("relora", 3, "too few"),
    ("relora(every=4, cycle=19)", 20, r"would reset 0 times in 20 steps; give at most 18, or"),
    ("relora(every=4, cycle=12, warm_start=7)", 20, r"would reset 0 times in 20 .* at most 11, or"),
    ("relora(every=1)", 2, "would restart 0 times in 2 steps; train for at least 3 steps$"),
    ("relora(every=4, rewarm=4)", 20, "does not end within"),
    ("relora(every=4, lr_scheduler_type='jagged_cosine')", None, "curve over the whole run"),
])  # fmt: skip
def test_a_run_that_it_does_not_fit(method, steps, message):
    with pytest.raises(ValueError, match=message):
        one(method, steps=steps)


@pytest.mark.parametrize(("given", "also"), [
    ("every=1", ""), ("every=30", ""), ("every=1000", " and leave `every` out"), ("", ""),
])  # fmt: skip
def test_a_warm_start_that_leaves_no_room_is_named_and_its_bound_is_right(given, also):
    """What is told to be typed has to run, and one step more must not."""
    with pytest.raises(ValueError, match="`warm_start=500` leaves no room") as told:
        one(f"relora(warm_start=500{given and ', ' + given})", steps=400)
    found = re.search(r"at most (\d+) steps( and leave `every` out)?$", str(told.value))
    assert found is not None, told.value
    assert (found[2] or "") == also
    most, kept = int(found[1]), "" if also else given and ", " + given
    one(f"relora(warm_start={most}{kept})", steps=400)
    with pytest.raises(ValueError, match="times in 400 steps|too few"):
        one(f"relora(warm_start={most + 1}{kept})", steps=400)


def test_a_bound_of_the_interval_is_right_and_leaving_it_out_too():
    for warm in (0, 350, 396, 397):
        with pytest.raises(ValueError, match="give at most") as told:
            one(f"relora(warm_start={warm}, every=399)", steps=400)
        bound = re.search(r"give at most (\d+)(.*)$", str(told.value))
        assert bound is not None
        one(f"relora(warm_start={warm}, every={bound[1]})", steps=400)
        if bound[2]:
            one(f"relora(warm_start={warm})", steps=400)


def test_left_out_the_interval_is_fitted_to_the_run(caplog):
    caplog.set_level("INFO", logger="lorica")
    one("relora", steps=1000)
    assert "relora: every=250, 3 restarts, cycle=250, 3 resets" in caplog.text
    one("relora(every=100, cycle=150, warm_start=200)", steps=1000)
    assert "relora: every=100, 7 restarts, cycle=150, 5 resets" in caplog.text
