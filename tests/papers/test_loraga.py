"""LoRA-GA: a start from the gradient's singular vectors, anchored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from walk import Chain

import lorica
from lorica.methods.inits import loraga
from models import batch, bert, gpt2, llama, logits, qwen2, t5
from reference import loraga as twin

SHAPES = {"a": (9, 7), "b": (7, 8), "c": (8, 6)}
R, S = 2, 16 / 2**0.5


def chain() -> Chain:
    torch.manual_seed(0)
    wide = {"bias": False, "dtype": torch.float64}
    return Chain(**{n: nn.Linear(*shape, **wide) for n, shape in SHAPES.items()})


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach().clone() for m in model.children()]


def data(model: Chain, count: int = 8, first: int = 0) -> list[dict[str, Tensor]]:
    return [model.batch(seed) for seed in range(first, first + count)]


def flat(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    return [b["x"].flatten(0, 1) for b in batches]


def effective(adapters: Any) -> list[Tensor]:
    return [layer.effective()[0].detach() for _, layer in adapters]


def trajectory(method: str = "loraga(niter=0)+sgd(momentum=0)", steps: int = 4, lr: float = 1e-5):
    model = chain()
    seen, learnt = data(model), data(model, steps, first=20)
    adapters = lorica.attach(model, method, r=R, data=seen, dtype=torch.float64, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=lr)
    like = [(p.B.detach().clone(), p.A.detach().clone()) for _, p in adapters.pairs()]
    out = []
    for one in learnt:
        adapters.loss(model(**one), one).backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(effective(adapters))
    start = weights(chain())
    return out, twin.run(start, flat(seen), flat(learnt), r=R, s=S, lr=lr, like=like)


def equal(one, other) -> None:
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_layers_of_unequal_shapes_train_as_the_twin_does():
    ours, theirs = trajectory()
    equal(ours, theirs)
    moved = [(a - b).norm() for a, b in zip(ours[-1], weights(chain()), strict=True)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("fault", ["scale", "factor", "halves", "sum"])
def test_a_planted_fault_shows(fault, monkeypatch):
    """The comparison above notices the wrong constant, one factor without it, swapped halves, and a
    gradient of one batch only."""
    Method = loraga.Loraga
    factors, observe, halves = Method._factors, Method.observe, Method._halves
    if fault == "scale":
        wrong = lambda *args: tuple(1.1 * f for f in factors(*args))  # noqa: E731
        monkeypatch.setattr(Method, "_factors", wrong)
    elif fault == "factor":
        wrong = lambda *args: (factors(*args)[0], 1.0)  # noqa: E731
        monkeypatch.setattr(Method, "_factors", wrong)
    elif fault == "halves":
        wrong = lambda *args: halves(*args)[::-1]  # noqa: E731
        monkeypatch.setattr(Method, "_halves", wrong)
    else:
        wrong = lambda self, m, la, si, da: observe(self, m, la, si, da[:1])  # noqa: E731
        monkeypatch.setattr(Method, "observe", wrong)
    with pytest.raises(AssertionError):
        equal(*trajectory())


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_step_is_the_gradients_best_approximation_of_rank_2r(direction):
    """Theorem 3.1: ΔW = −η s² c² G₂ᵣ, whichever half each factor has, up to a term in η²."""
    model = chain()
    seen, lr = data(model), 1e-8
    method = f"loraga(niter=0, direction={direction!r})+sgd(momentum=0)"
    adapters = lorica.attach(model, method, r=R, data=seen, dtype=torch.float64, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=lr)
    for one in seen:
        (model(**one)["loss"] / len(seen)).backward()
    optimizer.step()
    G = twin.mean_gradients(weights(chain()), flat(seen))
    for new, old, g in zip(effective(adapters), weights(chain()), G, strict=True):
        c2 = len(g) ** 0.5 / 16
        got, want = (new - old) / -lr, S**2 * c2 * twin.best(g, 2 * R)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.norm()))
        assert (want - S**2 * c2 * g).norm() > 1e-3 * want.norm(), "rank 2r is not all of it"


def test_no_other_start_of_this_rank_follows_the_gradient_as_closely():
    """‖G Aᵀ A + B Bᵀ G − ζG‖ over ζ: rank 2r leaves least, and random orthonormal factors more."""
    G = twin.mean_gradients(weights(chain()), flat(data(chain())))[0]

    def left(B: Tensor, A: Tensor) -> float:
        step = G @ A.T @ A + B @ B.T @ G
        zeta = (step * G).sum() / step.square().sum()
        return float((zeta * step - G).norm())

    def unit(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, R, dtype=torch.float64))[0]

    torch.manual_seed(0)
    mine = left(*twin.start(G, R))
    assert mine == pytest.approx(float((twin.best(G, 2 * R) - G).norm()))
    others = [left(unit(G.shape[0]), unit(G.shape[1]).T) for _ in range(50)]
    assert min(others) > mine


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, qwen2])
def test_the_function_is_kept_and_the_start_is_of_the_gradient(make):
    """All kinds of layers, the transposed among them: A₀ holds right vectors of the gradient."""
    model = make().double()
    before, seen = logits(model), [batch(model, seed=s) for s in range(2)]
    adapters = lorica.attach(
        model, "loraga(batches=2, niter=0)", r=3, data=seen, dtype=torch.float64, verbose=False
    )
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-9)
    plain = make().double()
    for one in seen:
        (plain(**one).loss / 2).backward()
    for name, layer in adapters:
        g = plain.get_submodule(name).weight.grad
        g = g.T if layer.store.transposed else g
        pair = layer.update.delta.pair()
        U, _, Vh = torch.linalg.svd(g)
        c = len(g) ** 0.25 / 4
        want = c**2 * Vh[:3].T @ Vh[:3]
        torch.testing.assert_close((pair.A.T @ pair.A).detach(), want, rtol=0, atol=1e-8)
        want = c**2 * U[:, 3:6] @ U[:, 3:6].T
        torch.testing.assert_close((pair.B @ pair.B.T).detach(), want, rtol=0, atol=1e-8)


def test_a_shared_weight_counts_where_the_target_uses_it():
    """An embedding whose table is the head's, too: the head's part of the gradient is not ΔW's."""
    model, kept = qwen2(), qwen2(tie_word_embeddings=False)
    kept.load_state_dict({**model.state_dict()})
    seen = [batch(model)]
    pairs = []
    for one in (model, kept):
        adapters = lorica.attach(
            one, "loraga(batches=1)", r=2, data=seen, verbose=False, target_modules=["embed_tokens"]
        )
        pairs.append(next(iter(adapters))[1].update.delta.pair())
    torch.testing.assert_close(*(p.A.T @ p.A for p in pairs), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*(p.B @ p.B.T for p in pairs), rtol=1e-3, atol=1e-4)


def test_small_layers_share_the_components_they_lack():
    """Of 4 components A has the first 3, and B the last and A's two largest."""
    model = Chain(a=nn.Linear(5, 4, bias=False, dtype=torch.float64))
    U, _, Vh = torch.linalg.svd(twin.mean_gradients(weights(model), flat(data(model)))[0])
    adapters = lorica.attach(
        model, "loraga(niter=0)", r=3, data=data(model), dtype=torch.float64, verbose=False
    )
    pair = adapters.layers["a"].update.delta.pair()
    c2, of_B = 4**0.5 / 16, U[:, [3, 0, 1]]
    torch.testing.assert_close((pair.A.T @ pair.A).detach(), c2 * Vh[:3].T @ Vh[:3])
    torch.testing.assert_close((pair.B @ pair.B.T).detach(), c2 * of_B @ of_B.T)


def grams(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (AᵀA, BBᵀ)}, which do not depend on signs."""
    return {n: ((A.T @ A).detach(), (B @ B.T).detach()) for n, A, B in pairs}


def of(adapters: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return grams((n, p.A, p.B) for n, p in adapters.pairs())


def test_few_gradients_are_held_at_once_and_the_start_is_the_same(monkeypatch):
    seen = [batch(llama(), seed=s) for s in range(2)]
    starts = []
    for held in (loraga.HELD, 2000):
        monkeypatch.setattr(loraga, "HELD", held)
        most, found = 0, loraga.gradients

        def counted(model, layers, data, found=found):
            nonlocal most
            out = found(model, layers, data)
            most = max(most, sum(g.numel() for g in out.values()))
            return out

        monkeypatch.setattr(loraga, "gradients", counted)
        method = "loraga(batches=2)"
        starts.append(of(lorica.attach(llama(), method, r=4, data=seen, verbose=False)))
        assert most <= max(held, 32 * 48)
        monkeypatch.setattr(loraga, "gradients", found)
    for name, want in starts[0].items():
        torch.testing.assert_close(starts[1][name], want, rtol=1e-4, atol=1e-4)


# -- the other scales, and PEFT's form -------------------------------------------------------------


@pytest.mark.parametrize(("scale", "stated"), [
    ("unit", lambda W, s, out: 1.0),
    ("gd_scale", lambda W, s, out: 1 / s**2),
    ("weight_svd", lambda W, s, out: float((torch.linalg.svdvals(W)[:R] / s).sqrt().mean()) ** 2),
    ("stable", lambda W, s, out: out**0.5 / 16),
    ("stable', stable_gamma='64", lambda W, s, out: out**0.5 / 64),
])  # fmt: skip
def test_each_scale_is_the_authors(scale, stated):
    text = f"loraga(niter=0, scale={scale!r})".replace('"', "'").replace("'64'", "64")
    adapters = lorica.attach(
        chain(), text, r=R, data=data(chain()), dtype=torch.float64, verbose=False
    )
    for (_, layer), W in zip(adapters, weights(chain()), strict=True):
        pair = layer.update.delta.pair()
        size = stated(W, layer.site.scale, len(W)) ** 0.5
        for p in (pair.A.T, pair.B):
            torch.testing.assert_close(p.detach().norm(dim=0), torch.full((R,), size).double())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore::FutureWarning")
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_pefts_form_equals_peft_on_the_same_batches(direction, scale):
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    seen, r = [batch(llama(), seed=s) for s in range(2)], 8
    ours = lorica.attach(
        llama(), f"loraga(batches=2, peft=True, direction={direction!r}, scale={scale!r})",
        r=r, data=seen, verbose=False,
    )  # fmt: skip
    base = llama()
    config = LoraConfig(
        r=r, lora_alpha=16, use_rslora=True, target_modules="all-linear",
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
    )  # fmt: skip
    config.target_modules = {n.rsplit(".", 1)[-1] for n, _ in ours}

    def train_step() -> None:
        for one in seen:
            base(**one).loss.backward()

    torch.manual_seed(0)  # PEFT's SVDs are sketches that nothing seeds, that of W with r columns
    preprocess_loraga(base, config, train_step)
    theirs = get_peft_model(base, config)
    layers = {n: theirs.base_model.model.get_submodule(n) for n, _ in ours}
    want = grams(
        (n, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for n, layer in layers.items()
    )
    for name, layer in ours:
        assert layers[name].scaling["default"] == pytest.approx(layer.site.scale)
        for got, expected in zip(of(ours)[name], want[name], strict=True):
            close = 2e-2 if scale == "weight_svd" else 2e-3
            torch.testing.assert_close(
                got, expected, rtol=0, atol=close * float(expected.abs().max())
            )


# -- what is refused -------------------------------------------------------------------------------


def test_batches_without_a_loss_a_layer_outside_of_it_and_a_loss_that_is_nan():
    one = batch(llama())
    with pytest.raises(ValueError, match=r"gives no loss for a batch of input_ids.*add the labels"):
        unlabelled = [{"input_ids": one["input_ids"]}]
        lorica.attach(llama(), "loraga(batches=1)", r=2, data=unlabelled, verbose=False)
    model = llama()
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"does not depend on 'unused' \(1 such.*exclude_modules"):
        where = {"target_modules": ["q_proj", "unused"]}
        lorica.attach(model, "loraga(batches=1)", r=2, data=[one], verbose=False, **where)
    hidden = {**one, "labels": torch.full_like(one["labels"], -100)}
    with pytest.raises(ValueError, match=r"loss of batch 0 is nan.*-100"):
        lorica.attach(llama(), "loraga(batches=1)", r=2, data=[hidden], verbose=False)


@pytest.mark.parametrize(("text", "part"), [
    ("loraga(batches=0)", "at least 1"),
    ("loraga(direction='AB')", "allowed: 'ArB2r'"),
    ("loraga(scale='gd')", "allowed: 'stable'"),
    ("loraga(stable_gamma=0)", "above 0"),
    ("loraga(scale='unit', stable_gamma=2)", "no effect"),
    ("loraga(niter=-1)", "0 is the exact SVD"),
    ("loraga+relora", "needs `restarts`"),
])  # fmt: skip
def test_values_and_company_that_are_refused(text, part):
    with pytest.raises(ValueError, match=part):
        lorica.Recipe.parse(text)


def test_saved_and_loaded_it_needs_no_data(tmp_path):
    model = llama()
    adapters = lorica.attach(model, "loraga(batches=1)", r=2, data=[batch(model)], verbose=False)
    said = logits(model)
    lorica.save(adapters, tmp_path / "out")
    fresh = llama()
    assert lorica.load(fresh, tmp_path / "out").fingerprint() == adapters.fingerprint()
    torch.testing.assert_close(logits(fresh), said)
