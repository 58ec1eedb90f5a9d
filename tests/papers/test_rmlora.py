"""RM-LoRA, arXiv 2407.12074: gradients for some ranks, and a penalty for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica import Recipe
from lorica.tensors.dtensor_ops import seeded
from models import llama, train
from reference import adalora as adalora_twin
from reference import rmlora as twin

OUT, IN, R, STEPS = 6, 5, 4, 40


def begin(method: str, *, lr: float = 0.02, decay: float = 0.0, **fields: Any):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=torch.float64))
    fields = {"r": R, **fields}
    adapters = lorica.attach(model, method, dtype=torch.float64, verbose=False, **fields)
    return adapters, lorica.optimizer(
        adapters, lr=lr, weight_decay=decay, total_steps=STEPS, seed=1
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, 0.3 * x @ torch.ones(IN, OUT, dtype=torch.float64)


def move(adapters: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    x, y = data(step)
    adapters.loss({"loss": nn.functional.mse_loss(adapters.model(x), y)}).backward()
    optimizer.step()


def only(adapters: Any) -> Any:
    ((_, pair),) = adapters.pairs()
    return pair


def sets(step: int, k: int, *, columns: str = "same") -> tuple[list[int], list[int]]:
    """(rows, columns) with a gradient, from the seed, the step and the layer's name."""
    if step == 0:
        return [*range(R)], [*range(R)]
    generator = seeded(f"1/{step}/0")
    rows = torch.randperm(R, generator=generator)[R - k :].tolist()
    if columns == "same":
        return rows, rows
    return rows, torch.randperm(R, generator=generator)[R - k :].tolist()


@pytest.mark.parametrize("rule", ["adamw", "sgd(momentum=0)"])
@pytest.mark.parametrize("columns", ["same", "independent"])
@pytest.mark.parametrize("strict", [False, True])
def test_it_is_the_twin(rule, columns, strict):
    text = f"rmlora(k=3, gamma=0.2, columns='{columns}', strict={strict})+{rule}"
    adapters, optimizer = begin(text, decay=0.1, lora_alpha=3)
    pair = only(adapters)
    run = twin.Run(
        adapters.layers["0"].store.weight().detach(), pair.A.detach(), pair.B.detach(),
        pair.scale, gamma=0.2, lr=0.02, adam=rule == "adamw", strict=strict, decay=0.1,
    )  # fmt: skip
    for t in range(STEPS):
        run.step(*data(t), *sets(t, 3, columns=columns))
        move(adapters, optimizer, t)
        optimizer.zero_grad()
        for ours, theirs in ((pair.A, run.A), (pair.B, run.B)):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11, msg=f"step {t}")


def test_the_penalty_is_adaloras_on_the_same_tensors():
    adapters, _ = begin("rmlora(gamma=0.3)")
    pair = only(adapters)
    with torch.no_grad():
        pair.B.normal_(generator=torch.Generator().manual_seed(2))
    ours = adapters.loss({"loss": torch.zeros((), dtype=torch.float64)})
    A, B = pair.A.detach(), pair.B.detach()
    torch.testing.assert_close(ours, twin.penalty(A, B, 0.3))
    torch.testing.assert_close(ours, 0.3 * adalora_twin.penalty([(A, B)]))
    with torch.no_grad():
        pair.B.zero_()
    adapters.loss({"loss": torch.zeros((), dtype=torch.float64)}).backward()
    assert not pair.B.grad.any() and pair.A.grad.any(), "at B = 0 it acts on A alone"


@pytest.mark.parametrize("columns", ["same", "independent"])
def test_masked_ranks_have_no_gradient_and_the_sets_are_drawn_anew(columns):
    adapters, optimizer = begin(f"rmlora(columns='{columns}')+sgd(momentum=0)")
    pair, drawn = only(adapters), []
    for t in range(STEPS):
        before = pair.A.detach().clone(), pair.B.detach().clone()
        move(adapters, optimizer, t)
        if t == 0:
            optimizer.zero_grad()
            continue
        rows = pair.A.grad.any(1), pair.B.grad.any(0)
        moved = (pair.A != before[0]).any(1), (pair.B != before[1]).any(0)
        assert all(int(r.sum()) == R // 2 for r in rows)
        assert all(torch.equal(r, m) for r, m in zip(rows, moved, strict=True)), "plain steps"
        drawn.append(tuple(tuple(r.nonzero().flatten().tolist()) for r in rows))
        optimizer.zero_grad()
    assert all(a == b for a, b in drawn) == (columns == "same")
    assert len({a for a, _ in drawn}) == 6, "all sets of 2 of 4 ranks come up"


def test_masked_is_not_frozen_under_adam_unless_strict():
    for strict in (False, True):
        adapters, optimizer = begin(f"rmlora(strict={strict})", decay=0.1)
        pair, still = only(adapters), []
        for t in range(6):
            state = {k: v.clone() for k, v in optimizer.state[pair.A].items()}
            before = pair.A.detach().clone()
            move(adapters, optimizer, t)
            masked = ~pair.A.grad.any(1)
            if t > 0:
                now = optimizer.state[pair.A]
                same = [torch.equal(pair.A[masked], before[masked])]
                same += [torch.equal(now[k][masked], v[masked]) for k, v in state.items() if v.ndim]
                still += same
                assert masked.sum() == 2 and not torch.equal(pair.A[~masked], before[~masked])
            optimizer.zero_grad()
        assert all(still) if strict else not any(still)


class Two(nn.Module):
    """Two layers side by side, which do not see one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(IN, OUT, bias=False)
        self.b = nn.Linear(IN, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).square().sum() + self.b(x).square().sum()


def test_a_layer_of_k_ranks_without_a_penalty_is_lora():
    results = []
    for method in ("lora", "rmlora(k=2, gamma=0)"):
        adapters = lorica.attach(Two(), method, r=4, rank_pattern={"a": 2}, verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=9)
        for t in range(9):
            adapters.model(data(t)[0].float()).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({n: p.detach().clone() for n, p in adapters.state_dict().items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]) == name.startswith("a."), name


def test_only_the_factors_are_masked():
    adapters = lorica.attach(
        llama(num_hidden_layers=1), "rmlora(k=1)+dora", r=4, modules_to_save=["lm_head"],
        verbose=False,
    )  # fmt: skip
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=4)
    factors = {id(p) for _, pair in adapters.pairs() for p in (pair.A, pair.B)}
    free = [t.parameter for t in adapters.trained() if id(t.parameter) not in factors]
    assert len(free) > len(adapters.layers), "magnitudes and the head"
    for t in range(4):
        before = [p.detach().clone() for p in free]
        train(adapters, optimizer, 1, first=t)
        assert all(bool((p != b).any()) for p, b in zip(free, before, strict=True))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("beside", ["", "+dora", "+svd", "+lorafa", "+vectoradamw", "+riemannian"])
def test_it_resumes_beside_other_parts(beside, strict, tmp_path):
    if beside == "+riemannian" and not strict:
        return  # refused

    def start():
        adapters = lorica.attach(
            llama(num_hidden_layers=1), f"rmlora(strict={strict}){beside}", r=4, verbose=False
        )
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=6, seed=3)

    adapters, optimizer = start()
    train(adapters, optimizer, 3)
    torch.save({"a": adapters.state_dict(), "o": optimizer.state_dict()}, tmp_path / "cut.pt")
    train(adapters, optimizer, 3, first=3)
    again, resumed = start()
    parts = torch.load(tmp_path / "cut.pt", weights_only=True)
    again.load_state_dict(parts["a"])
    resumed.load_state_dict(parts["o"])
    train(again, resumed, 3, first=3)
    assert again.fingerprint() == adapters.fingerprint()


def test_what_has_no_effect_is_refused():
    for given in ("k=0", "k=1.5", "gamma=-1", "gamma=True", "columns='both'", "strict='yes'"):
        with pytest.raises(ValueError, match="rmlora"):
            Recipe.parse(f"rmlora({given})")
    with pytest.raises(ValueError, match="masks nothing: no layer has more than 4 ranks"):
        begin("rmlora(k=4)")
    with pytest.raises(ValueError, match="masks nothing"):
        begin("rmlora(gamma=0)", r=1)
    begin("rmlora", r=1)  # the penalty is left
    with pytest.raises(ValueError, match="`rmlora` needs `row_state`"):
        Recipe.parse("rmlora+lorarite")
    with pytest.raises(ValueError, match="`rmlora` needs `row_wise`"):
        Recipe.parse("rmlora+riemannian")  # one rank's gradient would move the others


def test_strict_holds_masked_ranks_under_a_rule_that_mixes_them():
    adapters, optimizer = begin("rmlora(k=1, strict=True)+riemannian(inner='sgd')", decay=0.1)
    pair = only(adapters)
    for t in range(5):
        before = pair.A.detach().clone(), pair.B.detach().clone()
        move(adapters, optimizer, t)
        moved = (pair.A != before[0]).any(1), (pair.B != before[1]).any(0)
        assert t == 0 or all(int(m.sum()) == 1 for m in moved)
        optimizer.zero_grad()


# -- what it is for --------------------------------------------------------------------------------


def spectrum(method: str, seed: int) -> tuple[float, float]:
    """(effective rank of ΔW, validation loss): a target of rank 16 with a falling spectrum."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    left, right = (torch.linalg.qr(torch.randn(32, 16))[0] for _ in range(2))
    change = left @ torch.diag(3 * 0.8 ** torch.arange(16)) @ right.T
    goal = model[0].weight.detach() + change  # type: ignore[operator]
    adapters = lorica.attach(model, method, r=8, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=600)
    for _ in range(600):
        x = torch.randn(64, 32)
        adapters.loss({"loss": nn.functional.mse_loss(model(x), x @ goal.T)}).backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = adapters.layers["0"].update.weight(adapters.layers["0"].store).detach()
    share = torch.linalg.svdvals(delta)[:8]
    share = share / share.sum()
    x = torch.randn(1000, 32)
    return (
        torch.exp(-(share * share.log()).sum()).item(),
        nn.functional.mse_loss(model(x), x @ goal.T).item(),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_the_penalty_raises_the_rank_and_the_mask_does_not(seed):
    plain, masked, both = (
        spectrum(m, seed) for m in ("lora", "rmlora(gamma=0)", "rmlora(gamma=0.1)")
    )
    assert both[0] > plain[0] + 0.2 and abs(masked[0] - plain[0]) < 0.2
    assert both[1] > plain[1], "and the loss pays for it, at this scale"
