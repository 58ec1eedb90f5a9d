"""MoRA, arXiv 2405.12130: one square matrix, and its chain ReMoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chains
import lorica
from capacity import best_of_rank, recall, targets
from lorica import Recipe
from lorica.formats import restore
from lorica.methods.deltas.mora import rotated, square
from models import llama, logits, perturb, train
from reference import mora as twin

TYPES = (1, 2, 3, 4, 6)
# (in, out): square, wide, tall, odd, with r̂ above one side or both
SHAPES = [(12, 12), (16, 6), (6, 16), (7, 11), (13, 5), (3, 40), (40, 3), (5, 5), (1, 4), (9, 1)]


def one(shape: tuple[int, int], kind: int, r: int = 2, method: str = "", **fields: Any):
    """The delta of a single layer of doubles, with an M that is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, dtype=torch.float64))
    r = min(r, *shape)
    adapters = lorica.attach(model, f"mora(type={kind}){method}", r=r, verbose=False, **fields)
    perturb(adapters, 0.5)
    return adapters.layers["0"].update.delta, adapters


def shift(delta: Any) -> int:
    return delta.number() if delta.cycle[0] == 0 else 0


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_layers_train_as_the_twin(kind):
    chains.assert_trains_as(
        f"mora(type={kind})", lambda p, W: twin.delta(p["M"], kind, W.shape[1], W.shape[0]),
        lora_alpha=None,
    )  # fmt: skip


@pytest.mark.parametrize("links", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_weight_are_the_twin(shape, kind, links):
    for r in (1, 3):
        delta, _ = one(shape, kind, r)
        assert delta.width == twin.width(*shape, min(r, *shape), kind) or min(shape) == 1
        delta.restart(links, torch.Generator())
        nn.init.normal_(delta.M)
        number = delta.number()
        expected = twin.delta(delta.M.detach(), number if kind != 6 else 6, *shape, shift(delta))
        torch.testing.assert_close(delta.weight(None).detach(), expected, rtol=0, atol=1e-13)
        for lead in ((), (2,), (3, delta.width), (0,)):  # fewer tokens than r̂ and more
            x = torch.randn(*lead, shape[0], dtype=torch.float64)
            y = delta(x, None).detach()
            assert y.shape == (*lead, shape[1])
            torch.testing.assert_close(y, x @ expected.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("kind", TYPES)
def test_gradcheck(kind, tokens):
    delta, _ = one((7, 11), kind)
    assert (tokens < delta.width) == (tokens == 2)
    delta.restart(1, torch.Generator())
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, M: Tensor) -> Tensor:
        return torch.func.functional_call(delta, {"M": M}, (x, None))

    assert torch.autograd.gradcheck(product, (x, torch.randn_like(delta.M, requires_grad=True)))


@pytest.mark.parametrize("kind", TYPES)
def test_it_has_loras_number_of_parameters(kind):
    for d, r in ((64, 4), (64, 2), (96, 8), (4096, 8)):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(d, d, bias=False))
        M = (
            lorica.attach(model, f"mora(type={kind})", r=r, verbose=False)
            .layers["0"]
            .update.delta.M
        )
        assert M.numel() == twin.width(d, d, r, kind) ** 2
        assert M.numel() == pytest.approx(2 * d * r, rel=0.1)
    assert twin.width(64, 64, 4, 1) ** 2 == 529 > 2 * 64 * 4, "rounded up, above the budget"
    assert twin.width(64, 64, 4, 6) == 22 and twin.width(4096, 4096, 8, 6) == 256


@pytest.mark.parametrize("kind", TYPES)
def test_the_update_is_linear_in_the_matrix(kind):
    delta, _ = one((13, 10), kind)
    one_matrix, other = torch.randn_like(delta.M), torch.randn_like(delta.M)
    results = []
    for M in (one_matrix, other, 2 * one_matrix - 3 * other, torch.zeros_like(other)):
        delta.M.data.copy_(M)
        results.append(delta.weight(None).detach())
    torch.testing.assert_close(results[2], 2 * results[0] - 3 * results[1])
    assert not results[3].any()


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_shared_types_have_the_rank_of_their_matrix(kind):
    delta, _ = one((40, 30), kind)
    assert torch.linalg.matrix_rank(delta.M) == delta.width == 12
    assert torch.linalg.matrix_rank(delta.weight(None)) == 12, "six times the rank of LoRA"


def test_turned_blocks_stand_in_the_diagonal():
    delta, _ = one((32, 32), 6, r=1)
    M, W = delta.M.detach(), delta.weight(None).detach()
    assert delta.width == 8
    blocks = [M @ twin.rotation(b, 8) for b in range(4)]
    torch.testing.assert_close(W, torch.block_diag(*blocks))
    torch.testing.assert_close(blocks[0], M)
    for b in range(4):
        R = twin.rotation(b, 8)
        torch.testing.assert_close(R @ R.T, torch.eye(8, dtype=torch.float64))
        turned = rotated.turn_inputs(
            torch.eye(8, dtype=torch.float64).expand(b + 1, 8, 8), rotated.turning(8, b + 1, M)
        )[b]
        torch.testing.assert_close(turned.T, R)
    assert torch.linalg.matrix_rank(W) == 32


def test_a_narrow_layer_sees_a_part_of_its_inputs_and_others_after_a_restart():
    delta, _ = one((512, 128), 6)
    seen = []
    for link in range(4):
        delta.restart(link, torch.Generator())
        nn.init.normal_(delta.M)
        seen.append(delta.weight(None).any(0))
    assert delta.width == 36 and seen[0].sum() == 144
    assert torch.stack(seen).any(0).sum() > 240


# -- what it can take in ---------------------------------------------------------------------------


def span(delta: Any, links: int = 1) -> Tensor:
    """(out·in, links·r̂²): ΔW of every matrix that is 1 at one place, for each pattern in turn."""
    columns = []
    for link in range(links):
        delta.restart(link, torch.Generator())
        for k in range(delta.M.numel()):
            delta.M.data.view(-1)[k] = 1
            columns.append(delta.weight(None).detach().flatten())
            delta.M.data.view(-1)[k] = 0
    return torch.stack(columns, 1)


def test_the_capacity_table():
    """Beside LoRA's best at the same size, by the singular values: a flat spectrum is where MoRA
    wins, a decaying one where it loses."""
    expected = {  # flat, Gaussian, decaying
        "lora": (0.063, 0.207, 0.865), 1: (0.128, 0.137, 0.109), 6: (0.124, 0.113, 0.120),
    }  # fmt: skip
    bases = {k: torch.linalg.qr(span(one((64, 64), k, 4)[0])).Q for k in (1, 6)}
    for column, (name, target) in enumerate(targets().items()):
        whole = float(target.square().sum())
        part = {"lora": best_of_rank(target, 4) / whole}
        part |= {k: float((q.T @ target.flatten()).square().sum()) / whole
                 for k, q in bases.items()}  # fmt: skip
        for who, value in part.items():
            near = 0.002 if who == "lora" and name != "gaussian" else 0.025  # one draw of many
            assert value == pytest.approx(expected[who][column], abs=near), (who, name)
        assert (part[1] > 1.8 * part["lora"]) == (name == "flat")
        assert (part["lora"] > 4 * part[6]) == (name == "decaying")


def test_the_span_of_a_chain():
    """Types 1 and 2 reach 496 of 4096 dimensions at d = 64 and r = 2, all four 784; the shifts of
    type 6 reach as many as there are numbers, for no two of them touch the same block."""
    columns = span(one((64, 64), 1, 2)[0], 4)
    for links, dimensions in ((1, 256), (2, 496), (4, 784)):
        part = columns[:, : links * 256]
        assert torch.linalg.matrix_rank(part.T @ part, hermitian=True) == dimensions
    shifted = span(one((64, 64), 6, 2)[0], 4)
    torch.testing.assert_close(
        shifted.T @ shifted, 4 * torch.eye(1024, dtype=torch.float64), atol=1e-12, rtol=0
    )


def fit(method: str, target: Tensor, steps: int = 240, **fields: Any) -> float:
    """‖ΔW − target‖²/‖target‖² after training on it with Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.float64))
    nn.init.zeros_(model[0].weight)
    adapters = lorica.attach(model, method, r=2, verbose=False, **fields)
    optimizer = lorica.optimizer(adapters, lr=0.02, total_steps=steps)
    layer, loss = adapters.layers["0"], torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step % 60 / 60)
        loss = (layer.effective()[0] - target).square().sum() / target.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_on_a_flat_target_a_chain_beats_one_matrix_and_that_beats_lora():
    target = targets()["flat"]
    lora, mora = fit("lora", target), fit("mora(type=1)", target)
    chain = fit("mora(type=1)+relora(every=60, rewarm=0)", target)
    two = fit("mora(type=1, patterns=2)+relora(every=60, rewarm=0)", target)
    shifts = fit("mora+relora(every=60, rewarm=0)", target)
    assert lora > 0.96 and 0.92 < mora < 0.95  # 1 − r/d and 1 − r̂²/d² at the best
    assert shifts < chain < two < mora < lora
    assert shifts == pytest.approx(1 - 1024 / 4096, abs=0.04)


def test_memory_of_single_pairs_is_loras():
    """64 random pairs in one linear layer, r = 2: where few directions matter, sharing costs. The
    paper's gain in memory is that of a deep model."""
    lora, turned, shared = (recall(m, 64) for m in ("lora", "mora(type=6)", "mora(type=1)"))
    assert lora > 0.95 and lora > turned + 0.3 and turned > shared + 0.2


# -- ReMoRA ----------------------------------------------------------------------------------------

CHAINS = {
    "mora(type=1)": [(1, 0), (2, 0), (3, 0), (4, 0)],
    "mora(type=2, patterns=2)": [(2, 0), (1, 0)],
    "mora(type=4)": [(4, 0), (1, 0), (2, 0), (3, 0)],
    "mora": [(6, 0), (6, 1)],
}


@pytest.mark.parametrize("method", CHAINS)
def test_a_chain_is_the_twin(method):
    """Over five links: folded, zeroed, the next pattern, fresh moments and step count."""
    chain = f"{method}+relora(every=4, rewarm=0)"
    adapters, optimizer = chains.one(chain, steps=22, lora_alpha=None)
    layer = adapters.layers["0"]
    delta = layer.update.delta
    run = twin.Run(layer.store.weight().detach(), delta.M.detach(), CHAINS[method])
    for u in range(22):
        run.step(chains.gradient(run.effective(), u)[2], 0.02)
        chains.move(adapters, optimizer, u)
        if u and u % 4 == 0 and u < 21:
            before = run.effective()
            run.restart()
            assert not delta.M.any()
            torch.testing.assert_close(layer.store.weight().detach(), before)
        torch.testing.assert_close(
            chains.effective(adapters), run.effective(), rtol=1e-8, atol=1e-10
        )
        torch.testing.assert_close(delta.M.detach(), run.M, rtol=1e-7, atol=1e-10)
    assert run.links == chains.state_of(optimizer)["links"] == 5


def test_the_rate_is_low_from_the_first_step_of_a_link_on():
    """The authors' first step after a switch still has the old rate."""
    adapters, optimizer = chains.one(
        "mora(type=1)+relora(every=8, rewarm=4)", steps=20, lora_alpha=None
    )
    rates = []
    for u in range(14):
        chains.move(adapters, optimizer, u)
        rates.append(optimizer.param_groups[0]["lorica"]["rate"])
    assert rates[8:13] == pytest.approx([0, 0.005, 0.01, 0.015, 0.02])
    assert adapters.layers["0"].update.delta.number() == 2, "since the step with rate 0"


@pytest.mark.parametrize("method", ["mora(type=1)", "mora"])
def test_a_saved_chain_computes_the_same_wherever_it_is_loaded(method, tmp_path):
    """The authors' checkpoint forgets the pattern."""
    whole = Recipe.parse(f"{method}+relora(every=2, rewarm=0)", r=2)
    straight = lorica.attach(llama(num_hidden_layers=1), whole, verbose=False)
    optimizer = lorica.optimizer(straight, lr=1e-2, total_steps=9)
    train(straight, optimizer, 5)
    patterns = {n: layer.update.delta.number() for n, layer in straight}
    assert max(patterns.values()) > min(layer.update.delta.cycle[0] for _, layer in straight)
    model = straight.model
    before = logits(model)
    out = lorica.save(straight, tmp_path / "out")
    torch.save([straight.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")

    fresh = llama(num_hidden_layers=1)
    loaded = lorica.load(fresh, out, check_base=False)
    assert {n: layer.update.delta.number() for n, layer in loaded} == patterns
    assert torch.equal(logits(fresh), before)
    copied = copy.deepcopy(model)
    lorica.merge(copied)
    torch.testing.assert_close(logits(copied), before, rtol=1e-4, atol=1e-4)

    train(straight, optimizer, 4, first=5)
    adapters, states = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = lorica.attach(llama(num_hidden_layers=1), whole, verbose=False)
    logits(resumed.model)  # a forward before the load: it must not stay with what it saw
    resumed.load_state_dict(adapters)
    again = lorica.optimizer(resumed, lr=1e-2, total_steps=9)
    again.load_state_dict(states)
    train(resumed, again, 4, first=5)
    assert resumed.fingerprint() == straight.fingerprint()
    assert torch.equal(logits(resumed.model), logits(model))


def test_the_pattern_is_read_off_the_device_only_after_it_was_written(monkeypatch):
    delta, adapters = one((16, 16), 1)
    reads, read = [], square.read_full
    monkeypatch.setattr(square, "read_full", lambda t: reads.append(t) or read(t))
    x = torch.randn(2, 16, dtype=torch.float64)
    delta(x, None), delta(x, None)
    delta.restart(1, torch.Generator())
    delta(x, None)
    assert not reads and delta.number() == 2
    state = adapters.state_dict()
    state["0.update.delta.pattern"] = torch.tensor([4])
    adapters.load_state_dict(state)
    assert delta.number() == 4 and delta.number() == 4 and len(reads) == 1
    twin_delta = copy.deepcopy(delta)
    twin_delta.restart(2, torch.Generator())
    assert (twin_delta.number(), delta.number()) == (3, 4), "each has its own"


@pytest.mark.parametrize("method", ["mora(type=1)", "mora"])
def test_a_compiled_forward_follows_a_restart(method):
    torch._dynamo.reset()
    adapters, _ = chains.one(method, lora_alpha=None)
    delta = adapters.layers["0"].update.delta
    compiled = torch.compile(adapters.model, backend="eager", fullgraph=True)
    x = torch.randn(3, chains.IN, dtype=torch.float64)
    for link in range(3):
        delta.restart(link, torch.Generator())
        nn.init.normal_(delta.M)
        torch.testing.assert_close(compiled(x), adapters.model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")  # inductor
@pytest.mark.parametrize("by", ["adapters", "torch", "folder"])
@pytest.mark.parametrize("method", ["mora(type=1)", "mora"])
@pytest.mark.parametrize(
    "backend", [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_what_was_loaded_after_a_restart_is_computed_with(method, by, backend, tmp_path):
    """A forward compiled for the first pattern does not go on with it."""
    torch._dynamo.reset()
    x = torch.randn(3, chains.IN, dtype=torch.float64)
    saved, _ = chains.one(method, lora_alpha=None)
    delta: Any = saved.layers["0"].update.delta
    delta.restart(1, torch.Generator())
    nn.init.normal_(delta.M)
    expected = saved.model(x).detach()

    adapters, _ = chains.one(method, lora_alpha=None)
    run = adapters.model
    if backend is not None:
        run = torch.compile(adapters.model, backend=backend, fullgraph=True)
    assert not torch.allclose(run(x).detach(), expected)
    if by == "adapters":
        adapters.load_state_dict(saved.state_dict())
    elif by == "torch":
        adapters.model.load_state_dict(saved.model.state_dict())
    else:
        out = lorica.save(saved, tmp_path / "out")
        restore(adapters, out)
    torch.testing.assert_close(run(x).detach(), expected)


# -- company ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_is_near_the_truth(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40))
    adapters = lorica.attach(model, f"mora(type={kind})", r=2, verbose=False)
    perturb(adapters, 0.3)
    for tokens in (3, 64):
        x = torch.randn(tokens, 48)
        expected = model(x).detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.15)
        y.float().square().sum().backward()
        assert adapters.layers["0"].update.delta.M.grad.dtype == torch.float32


def test_what_means_nothing_to_one_matrix_is_refused():
    with pytest.raises(ValueError, match="`lora_alpha=8` has no effect with `mora`"):
        Recipe.parse("mora", lora_alpha=8)
    for other in ("rslora", "pissa", "loraplus", "lorarite", "cola"):
        with pytest.raises(ValueError, match=f"`{other}`"):
            Recipe.parse(f"mora+{other}")
    Recipe.parse("mora+cola(accumulate='base')+dora")


@pytest.mark.parametrize(
    "arguments", ["type=5", "type=0", "type='6'", "patterns=3", "type=1, patterns=1",
                  "type=3, patterns=2", "type=6, patterns=2", "type=True"]
)  # fmt: skip
def test_options_are_checked(arguments):
    with pytest.raises(ValueError, match="allowed"):
        Recipe.parse(f"mora({arguments})")


@pytest.mark.parametrize("kind", TYPES)
def test_every_layer_of_a_model_trains(kind):
    model = llama(num_hidden_layers=1)
    adapters = lorica.attach(model, f"mora(type={kind})", r=4, verbose=False)
    train(adapters, lorica.optimizer(adapters, lr=1e-2), 3)
    assert all(layer.update.delta.M.any() for _, layer in adapters)
