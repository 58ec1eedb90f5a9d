"""EVA: a start from the principal directions of the inputs, and ranks by explained variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from walk import Chain

import lorica
from lorica.methods.inits import eva
from models import batch, gpt2, llama, t5
from reference import eva as twin

SHAPES = {"a": (8, 7), "b": (7, 6), "c": (6, 8)}
BEND = {"a": 0.9, "b": 0.3, "c": 1.0}  # how the singular values of a layer's weight fall
R, S = 2, 2.0


def chain() -> Chain:
    """Layers whose inputs vary in some directions more than in others: the third's most, the
    second's least."""
    torch.manual_seed(0)
    wide = {"bias": False, "dtype": torch.float64}
    model = Chain(**{n: nn.Linear(*shape, **wide) for n, shape in SHAPES.items()})
    with torch.no_grad():
        for name, layer in model.named_children():
            U, _, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(U * BEND[name] ** torch.arange(U.shape[1]) @ Vh)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach().clone() for m in model.children()]


def data(model: Chain, count: int = 32, first: int = 0) -> list[dict[str, Tensor]]:
    batches = [model.batch(seed) for seed in range(first, first + count)]
    falling = 0.8 ** torch.arange(SHAPES["a"][0])
    return [{**b, "x": b["x"] * falling.to(b["x"])} for b in batches]


def flat(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    return [b["x"].flatten(0, 1) for b in batches]


def attached(model: Any, method: str, seen: Any, r: int = R, **options: Any) -> Any:
    return lorica.attach(model, method, r=r, data=seen, verbose=False, **options)


def trajectory(method: str, rho: float, *, whiten: bool = False, steps: int = 4, lr: float = 1e-3):
    """With τ = 1 nothing converges early: all batches are read, and all of k components kept."""
    model = chain()
    seen, learnt = data(model), data(model, steps, first=50)
    adapters = attached(model, f"{method}+sgd(momentum=0)", seen, dtype=torch.float64)
    optimizer = lorica.optimizer(adapters, lr=lr)
    out = []
    for one in learnt:
        adapters.loss(model(**one), one).backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append([layer.effective()[0].detach() for _, layer in adapters])
    want = twin.run(
        weights(chain()), flat(seen), flat(learnt), r=R, rho=rho, s=S, lr=lr, whiten=whiten
    )
    return out, want


def equal(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


CASES = {  # ρ = 4: every component of every layer is kept, so that nothing is cut away
    "eva(rho=4, tau=1)": {"rho": 4},
    "eva(rho=4, tau=1, whiten=True)": {"rho": 4, "whiten": True},
}


@pytest.mark.parametrize("method", CASES)
def test_layers_of_unequal_shapes_train_as_the_twin_does(method):
    ours, theirs = trajectory(method, **CASES[method])
    equal(ours, theirs)
    for a, b in zip(ours[-1], weights(chain()), strict=True):
        assert (a - b).norm() > 1e-3


@pytest.mark.parametrize("fault", ["scale", "factor", "mean", "ranks", "one batch"])
def test_a_planted_fault_shows(fault, monkeypatch):
    """The comparison notices rows of another length, the wrong components, inputs that are not
    centred, ranks that nothing moved, and batches that were not read."""
    Method, fill, joined, observe = eva.Eva, eva.Eva.fill_from, eva.joined, eva.Eva.observe

    def filled(self, seen, weight, pair, generator):
        fill(self, seen, weight, pair, generator)
        if fault == "scale":
            pair.A.mul_(1.1)
        else:
            pair.A.copy_(seen.Vh[-len(pair.A) :])

    def uncentred(X):
        return eva._Part(X, 0 * X[0], X.new_tensor(float(len(X))), X.square().sum())

    if fault in ("scale", "factor"):
        monkeypatch.setattr(Method, "fill_from", filled)
    elif fault == "mean":
        monkeypatch.setattr(eva, "part_of", uncentred)
    elif fault == "ranks":
        monkeypatch.setattr(eva, "shares", lambda ratios, n: dict.fromkeys(ratios, R))
    else:
        once = lambda self, m, la, si, da: observe(self, m, la, si, da[:1])  # noqa: E731
        monkeypatch.setattr(Method, "observe", once)
    assert joined is eva.joined
    with pytest.raises(AssertionError):
        equal(*trajectory("eva(rho=4, tau=1)", rho=4))


def test_the_start_captures_more_of_the_inputs_than_any_other_of_its_rank():
    """‖X Aᵀ‖ is largest for the principal directions: what the paper's title means."""
    model = chain()
    seen = data(model)
    adapters = attached(model, "eva(rho=1)", seen)
    torch.manual_seed(0)
    for X, (_, layer) in zip(twin.inputs(weights(chain()), flat(seen)), adapters, strict=True):
        X, A = X - X.mean(0), layer.update.delta.A.detach().double()
        torch.testing.assert_close(A @ A.T, torch.eye(R).double(), rtol=0, atol=1e-6)
        mine = (X @ A.T).square().sum()
        for _ in range(50):
            other = torch.linalg.qr(torch.randn(X.shape[1], R).double())[0]
            assert (X @ other).square().sum() < mine


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
def test_ranks_sum_to_the_budget_lie_below_the_cap_and_keep_the_scale(rho):
    adapters = attached(chain(), f"eva(rho={rho})", data(chain()))
    ranks = [layer.site.r for _, layer in adapters]
    assert sum(ranks) == 3 * R and max(ranks) <= round(rho * R) and min(ranks) >= 1
    assert (ranks == [R] * 3) == (rho == 1)
    assert {layer.site.scale for _, layer in adapters} == {S}
    rooted = attached(chain(), f"eva(rho={rho})+rslora", data(chain()))
    assert len({round(layer.site.scale, 9) for _, layer in rooted}) == 1


def test_the_spread_of_ranks_follows_the_variance():
    """A layer whose inputs vary in one direction needs one rank, one of even inputs needs more."""
    torch.manual_seed(0)
    thin = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        thin.weight.copy_(torch.outer(torch.randn(8), torch.randn(8)) + 1e-3 * thin.weight)
    model = Chain(a=thin, b=nn.Linear(8, 8, bias=False))
    adapters = attached(model, "eva", [model.batch(seed) for seed in range(32)], r=3)
    assert adapters.layers["b"].site.r == 1 and adapters.layers["a"].site.r == 5


def test_reading_ends_once_the_components_have_converged():
    """Batches of one distribution: few are needed at τ = 0.9, all at τ = 1; layers that converged
    are not read again, and the start is nearly that of all batches."""
    calls: dict[str, int] = {}
    starts = {}
    for tau in (0.9, 1.0):
        model = chain()
        forward = model.forward

        def counted(*args, tau=tau, forward=forward, **kwargs):
            calls[tau] = calls.get(tau, 0) + 1
            return forward(*args, **kwargs)

        model.forward = counted
        adapters = attached(model, f"eva(rho=1, tau={tau})", data(model))
        starts[tau] = [layer.update.delta.A.detach() for _, layer in adapters]
    assert 2 <= calls[0.9] < 10 and calls[1.0] == 32
    for early, late in zip(starts[0.9][1:], starts[1.0][1:], strict=True):
        assert (early @ late.T).diagonal().abs().min() > 0.9


def test_layers_that_read_the_same_input_share_one_svd(monkeypatch):
    model, found = llama(), []
    update = eva._Reader._update
    monkeypatch.setattr(
        eva._Reader, "_update", lambda self, n, X: (found.append(n), update(self, n, X))
    )
    one = batch(model, size=8)
    adapters = attached(model, "eva(batches=1)", [one], r=4)
    assert [n.rsplit(".", 1)[-1] for n in found] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ] * 2
    A = {n.rsplit(".", 1)[-1]: layer.update.delta.A for n, layer in adapters}
    least = min(map(len, (A["q_proj"], A["k_proj"], A["v_proj"])))
    torch.testing.assert_close(A["q_proj"][:least], A["k_proj"][:least], rtol=0, atol=0)
    torch.testing.assert_close(A["q_proj"][:least], A["v_proj"][:least], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["label", "padding"])
def test_positions_that_do_not_count_have_no_part(how):
    """A batch with strange tokens that are hidden gives the start of the batch without them."""

    def start(seen, method="eva(batches=1, rho=1)"):
        adapters = attached(llama(), method, [seen], r=3)
        return [(layer.update.delta.A.T @ layer.update.delta.A).detach() for _, layer in adapters]

    short = batch(llama(), size=6, length=5)
    extra = torch.full((6, 2), 7)
    long = {"input_ids": torch.cat([short["input_ids"], extra], 1)}
    if how == "label":
        long["labels"] = torch.cat([short["labels"], torch.full((6, 2), -100)], 1)
    else:
        long["attention_mask"] = (torch.arange(7) < 5).long().expand(6, 7)
    for got, want in zip(start(long), start(short), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    if how == "label":
        seen = start(long, "eva(batches=1, rho=1, use_label_mask=False)")
        assert (seen[0] - start(short)[0]).abs().max() > 1e-2


def test_the_two_sides_of_an_encoder_decoder_have_their_own_positions():
    """Labels of the decoder's length say nothing of the encoder's inputs."""

    def start(hide: bool):
        one = batch(t5(), size=6)
        labels = one["labels"][:, :4].clone()
        if hide:
            labels[:, 2:] = -100
        seen = {**one, "attention_mask": torch.ones_like(one["input_ids"]), "labels": labels}
        adapters = attached(t5(), "eva(batches=1, rho=1)", [seen], r=3)
        return {n: layer.update.delta.A.detach() for n, layer in adapters}

    first, second = start(False), start(True)
    for name in first:
        same = torch.equal(first[name], second[name])
        reads_encoder = name.startswith("encoder") or name.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        assert same == reads_encoder, name


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:lora with eva initialization")
@pytest.mark.parametrize(("make", "options"), [
    (llama, {}), (llama, {"rho": 1.0}), (gpt2, {}), (gpt2, {"rho": 1.0}),
    (gpt2, {"whiten": True}),  # PEFT whitens again for each layer that shares an input, as llama's
])  # fmt: skip
def test_start_and_ranks_equal_pefts_on_the_same_batches(make, options):
    """Of two batches, after which any cosine is enough here; layers of equal inputs may swap ranks,
    and signs are free. (PEFT takes a component whose sign has changed for one that moved.)"""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    small = {"intermediate_size": 32} if make is llama else {"n_inner": 32}
    r = 16 if options.get("rho") == 1 else 8  # PEFT's sketch of 2ρr columns is exact then
    seen = [batch(make(), seed=s, size=16, length=20) for s in range(2)]
    given = "".join(f", {k}={v}" for k, v in options.items())
    ours = attached(make(**small), f"eva(batches=2, tau=1e-9{given})", seen, r=r)
    names = {n.rsplit(".", 1)[-1] for n, _ in ours}
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=names, init_lora_weights="eva",
        eva_config=EvaConfig(**options), fan_in_fan_out=make is gpt2,
    )  # fmt: skip
    config.eva_config.tau = -1.0
    theirs: Any = get_peft_model(make(**small), config)
    initialize_lora_eva_weights(theirs, seen, show_progress_bar=False)
    ranks: dict[str, list[list[int]]] = {}
    for name, layer in ours:
        other = theirs.base_model.model.get_submodule(name)
        A, B = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight
        mine, k = layer.update.delta.A.detach(), min(len(A), layer.site.r)
        size = mine[:k].norm(dim=1) * A[:k].norm(dim=1)
        assert ((mine[:k] * A[:k]).sum(1).abs() / size).min() > 0.999, name
        torch.testing.assert_close(mine[:k].norm(dim=1), A[:k].norm(dim=1), rtol=1e-3, atol=0)
        assert not B.any() and not layer.update.delta.B.any()
        assert other.scaling["default"] == pytest.approx(layer.site.scale)
        group = name.rsplit(".", 1)[0] + (
            "q" if name[-6:] in {"q_proj", "k_proj", "v_proj"} else name
        )
        group = "gate" + name[:15] if "gate_proj" in name or "up_proj" in name else group
        pairs = ranks.setdefault(group, [[], []])
        pairs[0].append(layer.site.r)
        pairs[1].append(len(A))
    for group, (mine, other) in ranks.items():
        assert sorted(mine) == sorted(other), (group, ranks)


@pytest.mark.parametrize("k", [5, 8])
def test_the_incremental_svd_equals_pefts(k):
    """Over many batches, cut to k of 10 components after each, with a mean that moves."""
    from peft.utils.incremental_pca import IncrementalPCA

    generator = torch.Generator().manual_seed(0)
    pca, found = IncrementalPCA(n_components=k), None
    for i in range(12):
        X = torch.randn(9 + i, 10, generator=generator, dtype=torch.float64)
        X = X * 0.8 ** torch.arange(10) + 0.3 * i
        pca.partial_fit(X)
        parts = [eva.part_of(X)]
        found = eva.joined(parts if found is None else [eva.part_again(found), *parts], k)
        torch.testing.assert_close(found.S, pca.singular_values_)
        torch.testing.assert_close(
            (found.Vh * pca.components_).sum(1).abs(), torch.ones(k).double()
        )
        torch.testing.assert_close(
            torch.tensor(found.ratios).double(), pca.explained_variance_ratio_, check_dtype=False
        )


def test_parts_of_several_processes_make_what_one_would_have_read():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 3
    one = eva.joined([eva.part_of(X)], 6)
    several = [eva.part_again(eva.joined([eva.part_of(x)], 6)) for x in X.split([7, 20, 13])]
    both = eva.joined(several, 6)
    for field in ("S", "mean", "count", "total"):
        torch.testing.assert_close(getattr(both, field), getattr(one, field))
    torch.testing.assert_close((both.Vh * one.Vh).sum(1).abs(), torch.ones(6).double())


# -- what is refused -------------------------------------------------------------------------------


def test_layers_without_inputs_few_inputs_and_inputs_that_are_not_finite():
    model = llama()
    one = batch(model)
    model.unused = nn.Linear(4, 4)
    where = {"target_modules": ["q_proj", "unused"]}
    with pytest.raises(ValueError, match=r"reaches 'unused' and counts.*exclude_modules"):
        attached(model, "eva(batches=1)", [one], **where)
    hidden = {**one, "labels": torch.full_like(one["labels"], -100)}
    with pytest.raises(ValueError, match="no position of `data` reaches .*labels of -100"):
        attached(llama(), "eva(batches=1)", [hidden])
    with pytest.raises(ValueError, match=r"14 positions .*`r=15` needs at least 15; give longer"):
        attached(llama(), "eva(batches=1)", [one], r=15)
    broken = llama()
    broken.model.embed_tokens.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        attached(broken, "eva(batches=1)", [one])
    with pytest.raises(ValueError, match="`eva` needs an input vector"):
        attached(llama(), "eva(batches=1)", [one], target_modules=["embed_tokens"])


@pytest.mark.parametrize(("text", "part"), [
    ("eva(rho=0.5)", "at least 1"),
    ("eva(tau=0)", "cosine above 0"),
    ("eva(tau=1.5)", "at most 1"),
    ("eva(batches=0)", "at least 1"),
    ("eva(whiten=2)", "allowed: True, False"),
    ("eva+uniform", "leave one of the two out"),
    ("rank.eva", "needs `input_components`"),
    ("eva+relora", "needs `restarts`"),
])  # fmt: skip
def test_values_and_company_that_are_refused(text, part):
    with pytest.raises(ValueError, match=part):
        lorica.Recipe.parse(text)
