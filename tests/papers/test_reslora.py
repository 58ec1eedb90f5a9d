"""ResLoRA, arXiv 2402.18039: shortcuts between adapters of consecutive layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica import Recipe
from lorica.methods.deltas.reslora import approximated
from models import batch, llama, logits, perturb, train
from reference import reslora as twin

N, D = 5, 6
METHODS = {
    "block": [0, 1, 2, 4, -1],
    "middle": [0, 1, 2, -1],
    "input": [None],
}
CASES = [(s, p) for s, ps in METHODS.items() for p in ps]


class Chain(nn.Module):
    """Layers of one kind, in blocks, with a nonlinearity between."""

    def __init__(self, widths: tuple[int, ...] = (D,) * (N + 1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(i, o, bias=False) for i, o in zip(widths, widths[1:], strict=False)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": m}) for m in layers).double()

    def forward(self, x: Tensor) -> Tensor:
        for n, b in enumerate(self.blocks):
            x = b["q"](x if n == 0 else torch.tanh(x))
        return x


def word(shortcut: str, P: int | None) -> str:
    more = "" if P is None else f", pre_num={P}"
    return f"reslora(shortcut='{shortcut}'{more})"


def one(shortcut: str = "block", P: int | None = None, method: str = "", **fields: Any):
    model = Chain()
    adapters = lorica.attach(model, word(shortcut, P) + method, r=2, verbose=False, **fields)
    perturb(adapters, 0.5)
    return model, adapters


def parts(adapters: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], float]:
    layers = [layer for _, layer in adapters]
    W = [layer.store.weight().detach() for layer in layers]
    A = [layer.update.delta.A.detach() for layer in layers]
    B = [layer.update.delta.B.detach() for layer in layers]
    return W, A, B, layers[0].site.scale


def x_of(seed: int = 1, tokens: int = 4) -> Tensor:
    return torch.randn(
        tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


# -- the equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shortcut", "P"), CASES)
def test_forward_and_gradients_equal_the_twin(shortcut, P):
    model, adapters = one(shortcut, P)
    W, A, B, s = parts(adapters)
    leaves = [t.clone().requires_grad_() for t in (*A, *B)]
    x = x_of()
    expected = twin.chain(x, W, leaves[:N], leaves[N:], s, shortcut, P or 0)[-1][1]
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    own = [getattr(layer.update.delta, side) for side in "AB" for _, layer in adapters]
    for mine, theirs in zip(own, leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("P", METHODS["block"])
def test_the_blocks_weight_is_the_sum_of_the_linked_products(P):
    model, adapters = one("block", P)
    _, A, B, s = parts(adapters)
    for n, (_, layer) in enumerate(adapters):
        expected = twin.block(A, B, s, n, P)
        torch.testing.assert_close(layer.update.weight(layer.store).detach(), expected)
        far = n if P == -1 else min(P, n)
        assert layer.update.factors().A.shape == ((far + 1) * 2, D)
    x = x_of()
    before = model(x)
    lorica.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shortcut", METHODS)
def test_zeros_in_b_are_the_base_and_training_begins_there(shortcut):
    model = Chain()
    before = model(x_of())
    adapters = lorica.attach(model, word(shortcut, None), r=2, verbose=False)
    torch.testing.assert_close(model(x_of()), before, rtol=0, atol=1e-14)
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x_of()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_no_shortcut_is_lora_bit_for_bit(shortcut):
    runs = []
    for method in (word(shortcut, 0) + "+reference", "lora+reference"):
        model = llama()
        adapters = lorica.attach(model, method, r=4, seed=3, verbose=False)
        losses = train(adapters, lorica.optimizer(adapters, lr=1e-2), 4)
        runs.append((losses, adapters.state_dict(), logits(model)))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][2], runs[1][2])
    assert all(torch.equal(v, runs[1][1][n]) for n, v in runs[0][1].items())


def test_the_first_input_shortcut_is_lora_of_twice_the_scale():
    _, adapters = one("input")
    W, A, B, s = parts(adapters)
    delta, x = adapters.layers["blocks.0.q"].update.delta, x_of()
    torch.testing.assert_close(delta(x, None).detach(), 2 * s * (x @ A[0].T) @ B[0].T)


# -- the links -------------------------------------------------------------------------------------


def test_links_are_between_equal_kinds_and_sizes():
    adapters = lorica.attach(llama(num_hidden_layers=3), "reslora(pre_num=1)", r=2, verbose=False)
    for name, layer in adapters:
        number = int(name.split(".")[2])
        linked = [m.site.name for m in layer.update.delta.earlier]
        assert linked == [name.replace(f".{number}.", f".{number - 1}.", 1)] * (number > 0)
    adapters = lorica.attach(Chain((D, D, D, 8, 8, 8)), "reslora", r=2, verbose=False)
    assert [len(x.update.delta.earlier) for _, x in adapters] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("shortcut", METHODS)
def test_a_layer_owns_its_parameters_alone(shortcut):
    model, adapters = one(shortcut)
    assert len(model.state_dict()) == 3 * N and len(adapters.trained()) == 2 * N
    assert adapters.summary.trainable == N * 2 * 2 * D
    other = copy.deepcopy(model)
    first, second = adapters, lorica.Adapters.of(other)
    x = x_of()
    before = model(x).detach()
    assert torch.equal(other(x), before)
    for name, layer in second:
        for mine, theirs in zip(
            layer.update.delta.earlier, first.layers[name].update.delta.earlier, strict=True
        ):
            assert mine is second.layers[mine.site.name].update.delta and mine is not theirs
    perturb(second, 0.5)
    assert torch.equal(model(x), before) and not torch.allclose(other(x), before)
    fresh = Chain()
    again = lorica.attach(fresh, first.recipe, verbose=False)
    again.load_state_dict(first.state_dict())
    assert torch.equal(fresh(x), before)
    lorica.detach(model)
    assert not [n for n in model.state_dict() if "delta" in n]
    assert torch.equal(model(x), Chain()(x))


@pytest.mark.parametrize("shortcut", ["block", "input", "middle"])
def test_saved_and_loaded(shortcut, tmp_path):
    model, again = llama(), llama()
    adapters = lorica.attach(model, word(shortcut, None), r=2, verbose=False)
    perturb(adapters, 0.2)
    loaded = lorica.load(again, lorica.save(adapters, tmp_path / "out"))
    assert loaded.fingerprint() == adapters.fingerprint()
    assert torch.equal(logits(again), logits(model))


def test_peft_computes_the_same_from_its_files(tmp_path):
    peft: Any = pytest.importorskip("peft")
    model: Any = Chain().float()
    base, x = copy.deepcopy(model), x_of().float()
    adapters = lorica.attach(model, "reslora(pre_num=1)+dora", r=2, verbose=False)
    perturb(adapters, 0.3)
    theirs = peft.PeftModel.from_pretrained(base, lorica.save(adapters, tmp_path / "out"))
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    assert theirs.peft_config["default"].r == 4 and not torch.allclose(model(x), Chain().float()(x))


# -- inputs of earlier layers ----------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_nothing_outlives_a_forward(shortcut):
    model, adapters = one(shortcut)
    model(x_of())
    assert all(layer.update.delta.left == () for _, layer in adapters)
    with pytest.raises(ValueError, match=r"'blocks.1.q' adds what 'blocks.0.q' computed"):
        adapters.layers["blocks.1.q"](x_of())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shortcut", METHODS)
def test_checkpoints_are_exact_or_refused(shortcut, reentrant):
    grads = []
    for on in (False, True):
        model: Any = llama(num_hidden_layers=3).train()
        adapters = lorica.attach(model, word(shortcut, None), r=2, verbose=False)
        perturb(adapters, 0.2)
        if on:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**batch(model)).loss
        if on and shortcut != "block":
            with pytest.raises(ValueError, match="Gradient checkpointing causes this"):
                loss.backward()
            return
        loss.backward()
        grads.append([t.parameter.grad for t in adapters.trained()])
    for one_, other in zip(*grads, strict=True):
        torch.testing.assert_close(one_, other)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_one_checkpoint_around_all_of_them_is_exact(shortcut):
    model, adapters = one(shortcut)
    x, grads = x_of().requires_grad_(), []
    for forward in (
        model,
        lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
    ):
        forward(x).square().sum().backward()
        grads.append([t.parameter.grad.clone() for t in adapters.trained()])
        model.zero_grad()
    copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("shortcut", METHODS)
def test_a_cache_changes_nothing(shortcut):
    model: Any = llama(num_hidden_layers=3)
    perturb(lorica.attach(model, word(shortcut, None), r=2, verbose=False), 0.2)
    prompt = {"input_ids": batch(model)["input_ids"], "max_new_tokens": 6, "do_sample": False}
    prompt["pad_token_id"] = 0
    assert torch.equal(
        model.generate(**prompt, use_cache=True), model.generate(**prompt, use_cache=False)
    )


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shortcut", "by"),
    [("input", "inputs"), ("input", "weights"), ("middle", "inputs"), ("middle", "projections")],
)
def test_an_approximate_merge_is_the_twins(shortcut, by):
    model, adapters = one(shortcut, None if shortcut == "input" else 2)
    W, A, B, s = parts(adapters)
    P = 1 if shortcut == "input" else 2
    seen = [twin.chain(x_of(i), W, A, B, s, shortcut, P) for i in range(3)]
    xs = [[x for x, _ in run] for run in seen]
    plain, errors = [], []
    for n in range(N):
        alpha = twin.alphas(by, n, P, xs, W, A, B, s)
        if shortcut == "input":
            delta = (1 + (alpha[0] if n else 1.0)) * s * B[n] @ A[n]
        elif by == "projections":
            delta = (1 + sum(alpha)) * s * B[n] @ A[n]
        else:
            delta = s * B[n] @ (A[n] + sum(a * A[n - k] for k, a in enumerate(alpha, 1)))
        plain.append(W[n] + delta)
        exact = torch.cat([run[n][1] - run[n][0] @ W[n].T for run in seen])
        near = torch.cat([run[n][0] @ delta.T for run in seen])
        errors.append(float((exact - near).norm() / exact.norm()))
    exact = model(x_of())
    adapters = lorica.Adapters.of(model)
    with approximated(adapters, [{"x": x_of(i)} for i in range(3)], by=by) as lost:
        lorica.merge(model)
    for n, b in enumerate(model.blocks):
        assert type(b["q"]) is nn.Linear
        torch.testing.assert_close(b["q"].weight.detach(), plain[n], rtol=1e-6, atol=1e-6)
    assert [*lost.values()] == pytest.approx(errors, rel=1e-5, abs=1e-6)
    assert errors[0] < 1e-9 and min(errors[1:]) > 0.05
    assert not torch.allclose(model(x_of()), exact, rtol=0.01), "an approximation it is"


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_what_needs_a_weight_is_refused(shortcut):
    with pytest.raises(ValueError, match="`dora` needs `weight`"):
        Recipe.parse(word(shortcut, None) + "+dora")
    model, adapters = one(shortcut)
    with pytest.raises(ValueError, match=r"no ΔW.*approximated"):
        lorica.merge(model)
    assert len(lorica.Adapters.of(model)) == N
    with pytest.raises(ValueError, match="allowed: 'inputs'"):
        approximated(adapters, [], by="norms").__enter__()
    with pytest.raises(ValueError, match="none gives 'blocks.0.q' an input"):
        approximated(adapters, []).__enter__()
    with pytest.raises(ValueError, match=r"Type `lorica.merge\(model\)`"):
        approximated(one("block")[1], []).__enter__()


# -- claims and company ----------------------------------------------------------------------------


def test_early_layers_get_larger_gradients():
    """Each B collects gradients from up to P + 1 sites, at B = 0, where A has none."""
    norms = {}
    for method in ("lora", "reslora(pre_num=2)"):
        model = llama(num_hidden_layers=6).train()
        adapters = lorica.attach(model, method, r=2, target_modules=["q_proj", "v_proj"],
                                 verbose=False)  # fmt: skip
        model(**batch(model)).loss.backward()
        early = [t.parameter.grad for t in adapters.trained() if t.role == "B"][:4]
        norms[method] = float(torch.stack([g.norm() for g in early]).norm())
    assert norms["reslora(pre_num=2)"] > 1.05 * norms["lora"], norms


def test_a_pair_it_is_not():
    for other in ("pissa", "olora", "lorarite", "riemannian", "raclora"):
        with pytest.raises(
            ValueError, match=f"`{other}` cannot be combined with `reslora`.*`pair`"
        ):
            Recipe.parse(f"reslora+{other}")


def test_an_update_that_others_share_is_not_put_away_alone():
    _, adapters = one("block", 1)
    with pytest.raises(ValueError, match="cannot restart alone"):
        adapters.layers["blocks.0.q"].update.delta.restart(1, torch.Generator())


def test_arguments_are_checked():
    for text in ("shortcut='bs'", "pre_num=-2", "pre_num=True", "pre_num='2'"):
        with pytest.raises(ValueError, match="allowed|whole number"):
            Recipe.parse(f"reslora({text})")
    with pytest.raises(
        ValueError, match=r"pre_num=2\)`: it has no effect here: `shortcut='input'`"
    ):
        Recipe.parse("reslora(shortcut='input', pre_num=2)")
    model = Chain()
    with pytest.raises(ValueError, match="linked layers need one rank"):
        lorica.attach(model, word("middle", 1), r=2, rank_pattern={"blocks.2.q": 3}, verbose=False)
    assert type(model.blocks[0]["q"]) is nn.Linear
    adapters = lorica.attach(
        model, word("block", 1), r=2, rank_pattern={"blocks.2.q": 3}, verbose=False
    )
    assert [x.update.factors().A.shape[0] for _, x in adapters] == [2, 4, 5, 5, 4]
