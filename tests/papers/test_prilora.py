"""PRILoRA, arXiv 2401.11316: ranks that grow with depth, and a pruned A."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from lorica.methods.ranks.linear import block_of
from lorica.methods.schedules.prilora import pruned
from models import batch, llama, perturb
from reference import prilora as twin

OUT, IN, R, STEPS = 6, 7, 4, 30


def begin(method: str, *, steps: int = STEPS, decay: float = 0.0, **fields: Any):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    fields = {"r": R, **fields}
    adapters = lorica.attach(model, method, dtype=torch.float64, verbose=False, **fields)
    return adapters, lorica.optimizer(
        adapters, lr=0.02, weight_decay=decay, total_steps=steps, seed=1
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    x = x * torch.logspace(-1, 0.5, IN, dtype=torch.float64)
    return x, 0.3 * x @ torch.ones(IN, OUT, dtype=torch.float64)


def move(adapters: Any, optimizer: torch.optim.Optimizer, step: int, parts: int = 1) -> None:
    for x, y in zip(*(t.chunk(parts) for t in data(step)), strict=True):
        (nn.functional.mse_loss(adapters.model(x), y) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def only(adapters: Any) -> Any:
    ((_, pair),) = adapters.pairs()
    return pair


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return optimizer.param_groups[0]["lorica"]["schedules"]["prilora"]["norms"]


def drive(adapters: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A plain loop in training mode."""
    model = adapters.model.train()
    for t in steps:
        inputs = batch(model, seed=100 + t)
        adapters.loss(model(**inputs), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- ranks by depth --------------------------------------------------------------------------------


def given(blocks: int, r: int, arguments: str = "", word: str = "linear") -> list[int]:
    recipe = Recipe.parse(f"{word}({arguments})", r=r)
    names = [f"model.layers.{i}.{n}" for i in range(blocks) for n in ("q_proj", "mlp.up_proj")]
    ranks = [r for r, _ in recipe.rank.assign(names, recipe).values()]
    assert ranks[::2] == ranks[1::2], "all modules of a block share a rank"
    return ranks[::2]


def test_the_papers_ranks():
    assert given(12, 8) == given(12, 8, word="prilora") == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert given(6, 4) == [2, 3, 4, 4, 5, 6]
    assert given(12, 8, "first=12") == given(12, 8)[::-1] == given(12, 8, "last=4", "prilora")
    assert given(1, 8) == [8] and given(3, 1) == [1, 1, 1] and given(4, 8, "first=8") == [8] * 4


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 12, 31, 32])
@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 16])
def test_the_sum_is_the_budget_and_each_rank_is_near_the_line(blocks, r):
    for first in {max(1, (r + 1) // 2), 1, r, 2 * r - 1}:
        ranks = given(blocks, r, f"first={first}")
        assert sum(ranks) == blocks * r and min(ranks) >= 1
        steps = [b - a for a, b in pairwise(ranks)]
        assert all(s >= 0 for s in steps) if first <= r else all(s <= 0 for s in steps)
        line = twin.line(first, 2 * r - first, blocks) if blocks > 1 else [r]
        assert all(abs(a - b) <= 1 for a, b in zip(ranks, line, strict=True))
        off = sum(abs(a - b) > 0.5 + 1e-9 for a, b in zip(ranks, line, strict=True))
        assert off <= abs(sum(int(x + 0.5) for x in line) - blocks * r)


def test_what_is_no_block_has_the_mean():
    recipe = Recipe.parse("linear", r=8)
    names = ["embed.proj", "h.0.q", "h.0.k", "h.1.q", "h.2.q", "head"]
    assert [r for r, _ in recipe.rank.assign(names, recipe).values()] == [8, 4, 4, 8, 12, 8]
    assert block_of("encoder.block.3.layer.0.q") == "encoder.block.3"
    assert block_of("0") == "0" and block_of("conv1d.proj") is None


@pytest.mark.parametrize("word", ["", "+rslora"])
def test_the_scale_is_that_of_the_mean_or_the_layers_own(word):
    for scale in ("mean", "own"):
        method = f"linear(scale='{scale}'){word}"
        adapters = lorica.attach(llama(), method, r=8, lora_alpha=16, verbose=False)
        for _, layer in adapters:
            r = 8 if scale == "mean" else layer.site.r
            assert layer.site.scale == pytest.approx(16 / (r**0.5 if word else r), rel=1e-12)
        assert {layer.site.r for _, layer in adapters} == {4, 12}


# -- pruning ---------------------------------------------------------------------------------------


def test_it_is_the_twin():
    adapters, optimizer = begin("prilora(every=7, fraction=0.4, beta=0.8)", decay=0.1, lora_alpha=3)
    pair = only(adapters)
    run = twin.Run(
        adapters.layers["0"].store.weight().detach(), pair.A.detach(), pair.B.detach(),
        pair.scale, lr=0.02, every=7, fraction=0.4, beta=0.8, last=STEPS,
    )  # fmt: skip
    for t in range(STEPS):
        run.step(*data(t))
        move(adapters, optimizer, t, parts=3)  # micro-batches of one update
        for ours, theirs in ((pair.A, run.A), (pair.B, run.B)):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11, msg=f"step {t}")
        torch.testing.assert_close(state_of(optimizer)["0"].double(), run.X, rtol=1e-5, atol=0)
        zeros = (pair.A == 0).sum(1)
        due = t + 1 in (7, 14, 21, 28, STEPS)
        assert bool((zeros == (round(0.4 * IN) if due else 0)).all()), "and they grow back"


def test_a_pruning_takes_the_smallest_products_of_each_row():
    A = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 1.0, -0.1, 0.2]])
    norms = torch.tensor([1.0, 0.1, 0.01, 10.0])
    assert pruned(A, norms, 0.5).tolist() == [[1, 0, 0, 0.5], [4, 0, 0, pytest.approx(0.2)]]
    wide = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    for fraction in (0.1, 0.5, 0.9):
        zeros = (pruned(wide, torch.rand(33) + 0.1, fraction) == 0).sum(1)
        assert zeros.unique().numel() == 1 and abs(zeros[0].item() - 33 * fraction) < 1
        torch.testing.assert_close(
            pruned(wide, norms.repeat(9)[:33], fraction),
            twin.prune(wide, norms.repeat(9)[:33], fraction),
        )


def test_a_pruning_changes_the_weight_by_what_it_takes_and_no_moment():
    adapters, optimizer = begin("prilora(every=5)+sgd(momentum=0.9)", steps=20)
    pair, schedule = only(adapters), adapters.recipe.schedules[0]
    for t in range(4):
        move(adapters, optimizer, t)
    seen, original = [], type(schedule).after_step

    def watched(self: Any, state: Any, training: Any) -> None:
        def now() -> tuple:
            moments = {k: v.clone() for k, v in optimizer.state[pair.A].items()}
            return adapters.layers["0"].effective()[0], pair.A.detach().clone(), moments

        seen.append(now())
        original(self, state, training)
        seen.append(now())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(schedule), "after_step", watched)
        move(adapters, optimizer, 4)
    (before, A, moments), (after, sparse, same) = seen
    assert bool((sparse[sparse != 0] == A[sparse != 0]).all()) and (sparse == 0).sum() == 4 * R
    change = -pair.scale * pair.B.detach() @ (A - sparse)
    torch.testing.assert_close(after - before, change, rtol=1e-10, atol=1e-14)
    assert all(torch.equal(v, same[k]) for k, v in moments.items()) and change.any()


def test_without_pruning_and_with_one_rank_it_is_lora():
    results = []
    for method in ("lora", "linear(first=4, last=4)", "prilora(every=9, first=4, last=4)"):
        adapters = lorica.attach(llama(), method, r=4, verbose=False)
        drive(adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=10), range(8))
        results.append(adapters.state_dict())
    for other in results[1:]:
        assert all(torch.equal(v, other[n]) for n, v in results[0].items())


# -- what it looks at ------------------------------------------------------------------------------


def test_the_norms_leave_padding_and_evaluation_out():
    adapters = lorica.attach(llama(), "prilora(beta=0.75)", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=10)
    perturb(adapters)
    model, inputs = adapters.model.train(), batch(adapters.model)
    keep = torch.ones_like(inputs["input_ids"])
    keep[0, 4:] = 0
    inputs["attention_mask"] = keep
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in adapters:

        def note(_: Any, args: tuple, name: str = name) -> None:
            seen[name] = args[0].detach()

        hooks.append(layer.register_forward_pre_hook(note))
    model(**inputs).loss.backward()
    first = {name: x.flatten(0, 1).tolist() for name, x in seen.items()}
    for hook in hooks:
        hook.remove()
    model.eval()(**batch(model, seed=9))
    optimizer.step()
    assert not adapters.hooks.input_squares, "what was counted is not counted again"
    kept = keep.flatten().bool().tolist()
    for name, X in state_of(optimizer).items():
        expected = 0.25 * torch.tensor(twin.norms(first[name], kept))
        torch.testing.assert_close(X, expected, rtol=1e-5, atol=1e-7)
    held = {n: X.clone() for n, X in state_of(optimizer).items()}
    model.train()(**batch(model, seed=9)).loss.backward()
    adapters.hooks.input_squares.pop("model.layers.0.mlp.up_proj")  # an expert without a token
    optimizer.step()
    same = [n for n, X in state_of(optimizer).items() if torch.equal(X, held[n])]
    assert same == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("cut", [3, 4, 8, 9])
@pytest.mark.parametrize("beside", ["", "+adalora", "+loraplus"])
def test_a_resumed_run_is_the_straight_run(cut, beside, tmp_path):
    if beside and cut != 9:
        return

    def start():
        adapters = lorica.attach(llama(), f"prilora(every=4){beside}", r=4, verbose=False)
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=12, seed=3)

    adapters, optimizer = start()
    drive(adapters, optimizer, range(cut))
    torch.save({"a": adapters.state_dict(), "o": optimizer.state_dict()}, tmp_path / "cut.pt")
    drive(adapters, optimizer, range(cut, 12))
    again, resumed = start()
    parts = torch.load(tmp_path / "cut.pt", weights_only=True)
    again.load_state_dict(parts["a"])
    resumed.load_state_dict(parts["o"])
    drive(again, resumed, range(cut, 12))
    assert again.fingerprint() == adapters.fingerprint()
    assert all(torch.equal(X, state_of(resumed)[n]) for n, X in state_of(optimizer).items())
    forgetful, late = start()  # the norms decide: without them another run
    forgetful.load_state_dict(parts["a"])
    late.load_state_dict(parts["o"])
    for X in state_of(late).values():
        X.copy_(torch.arange(len(X)) % 2)
    drive(forgetful, late, range(cut, 12))
    assert forgetful.fingerprint() != adapters.fingerprint()


def test_in_evaluation_mode_the_weights_alone_decide():
    adapters, optimizer = begin("prilora(every=2)", steps=20)
    adapters.model.eval()
    move(adapters, optimizer, 0)
    move(adapters, optimizer, 1)
    assert not state_of(optimizer)["0"].any()
    assert bool(((only(adapters).A == 0).sum(1) == 4).all())


# -- when, and what is refused ---------------------------------------------------------------------


def test_the_interval_is_fitted_where_forty_would_be_too_long():
    schedule = Recipe.parse("prilora").schedules[0]
    every = [schedule.fit(t).every for t in (None, 1, 2, 30, 79, 80, 1000)]
    assert every == [40, 1, 1, 15, 39, 40, 40]
    assert schedule.fit(100).plan(100) == "every=40, 3 prunings of 50 % of A"
    assert schedule.fit(100).final_from(100) == 100, "A fills up again after all but the last"
    with pytest.raises(ValueError, match=r"prune 0 times within 39 steps.*at most 39"):
        Recipe.parse("prilora(every=40)").schedules[0].fit(39)


def test_what_has_no_effect_is_refused():
    for text in ("prilora(every=0)", "prilora(fraction=0)", "prilora(fraction=1)",
                 "prilora(beta=1)", "prilora(beta=-0.1)"):  # fmt: skip
        with pytest.raises(ValueError, match="prilora"):
            Recipe.parse(text)
    for text in ("linear(first=0)", "linear(last=1.5)", "linear(scale='max')",
                 "prilora(first=True)"):  # fmt: skip
        with pytest.raises(ValueError, match="linear"):
            Recipe.parse(text)
    with pytest.raises(ValueError, match="the mean, 7.5, is the recipe's `r`"):
        Recipe.parse("prilora(first=4, last=11)")
    with pytest.raises(ValueError, match="defined for rank 8 alone"):
        Recipe.parse("prilora(first=4, last=12)", r=16)
    assert Recipe.parse("prilora(first=4, last=12)").r == 8
    with pytest.raises(ValueError, match="would leave the other end -4"):
        begin("linear(last=12)")
    with pytest.raises(ValueError, match="leave one of the two out"):
        Recipe.parse("prilora(first=4)+uniform")
    assert Recipe.parse("prilora+uniform").rank.name == "uniform"
    with pytest.raises(ValueError, match=r"`prilora` takes parts of A away .* `lorafa` freezes A"):
        Recipe.parse("prilora+lorafa")  # each pruning would be for good, until nothing is left
    with pytest.raises(ValueError, match="less than one entry of a row of A"):
        begin("prilora(fraction=0.05)")


@pytest.mark.parametrize("beside", ["+dora", "+rslora", "+olora", "+sora", "+lorarite", "+rmlora"])
def test_it_stands_beside_other_parts(beside):
    adapters = lorica.attach(llama(), f"prilora(every=3){beside}", r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=7)
    drive(adapters, optimizer, range(7))
    assert all(p.isfinite().all() for p in adapters.model.parameters())
    assert all(bool(((p.A == 0).sum(1) == p.A.shape[1] // 2).all()) for _, p in adapters.pairs())


# -- what it is for --------------------------------------------------------------------------------


class Deep(nn.Module):
    """Six residual layers; what is to be learnt grows with depth."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def error(method: str, seed: int, steps: int = 500) -> float:
    """Validation error at mean rank 4, after a change whose size and rank grow with depth."""
    torch.manual_seed(seed)
    model, goal = Deep(), Deep()
    goal.load_state_dict(model.state_dict())
    with torch.no_grad():
        for i, layer in enumerate(goal.layers):
            rank = 2 + 2 * i
            change = torch.randn(40, rank) @ torch.randn(rank, 40) / 40
            layer.weight.add_(0.08 * (i + 1) * change)  # type: ignore[operator]
    sizes = torch.logspace(-1.0, 0.5, 40)
    adapters = lorica.attach(model, method, r=4, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=3e-3, total_steps=steps)
    for _ in range(steps):
        x = torch.randn(64, 40) * sizes
        nn.functional.mse_loss(model(x), goal(x).detach()).backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(2000, 40) * sizes
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), goal(x)).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_more_rank_where_more_is_to_be_learnt_and_pruning_costs_something(seed):
    methods = ("lora", "linear", "linear(first=6)", "prilora")
    flat, growing, falling, sparse = (error(m, seed) for m in methods)
    assert growing < flat < falling
    assert growing < sparse
