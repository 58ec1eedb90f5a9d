"""Tensors that all layers share, and starts that are made from data, with methods of the tests'
own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica import Recipe
from lorica.interfaces import BaseLike, Pair, Site
from lorica.methods.deltas.base import AbstractDelta, DeltaChoice
from lorica.methods.inits.base import AbstractInit
from lorica.methods.optional import SharesTensors, StartsFromData
from lorica.tensors.dtensor_ops import draw
from lorica.tensors.linalg import sketched_svd
from models import llama


def adder(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a layer's inputs, over all tokens, to `total` (in,)."""

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        total.add_(args[0].flatten(0, -2).sum(0))

    return add


class RowsOfOne(AbstractDelta):
    """ΔW = diag(b) S with S (most out, most in) of the whole model."""

    roles: ClassVar[dict[str, str]] = {"b": "B"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.b = nn.Parameter(torch.zeros(site.out_features, 1, dtype=site.dtype))

    def weight(self, base: BaseLike) -> Tensor:
        return self.b * self.read_shared("S")[: self.site.out_features, : self.site.in_features]

    def forward(self, x: Tensor, base: BaseLike) -> Tensor:
        return x @ self.weight(base).to(x.dtype).T

    def restart(self, link: int, generator: torch.Generator) -> None:
        self.b.data.zero_()


@dataclass(frozen=True, kw_only=True)
class Shared(DeltaChoice, SharesTensors):
    gives: ClassVar[frozenset[str]] = frozenset({"weight", "wrapped"})

    def most_r(self, in_features: int, out_features: int) -> int | None:
        return None

    def build(self, site: Site) -> AbstractDelta:
        return RowsOfOne(site)

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        size = max(s.out_features for s in sites), max(s.in_features for s in sites)
        return {"S": draw(size, generator)}


@dataclass(frozen=True, kw_only=True)
class FromInputs(StartsFromData, AbstractInit):
    """A's first row is the mean input, B is 0."""

    gives: ClassVar[frozenset[str]] = frozenset({"zero_start"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"restarts"})
    batches: int = 2

    def observe(
        self, model: nn.Module, layers: Mapping[str, BaseLike], sites: Mapping[str, Site],
        data: Any,
    ) -> Mapping[str, Any]:  # fmt: skip
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        sums = {name: torch.zeros(site.in_features) for name, site in sites.items()}
        for name, layer in layers.items():
            layer.module.register_forward_pre_hook(adder(sums[name]))
        for batch in data:
            model(**batch)
        for layer in layers.values():
            layer.module._forward_pre_hooks.clear()
        return sums

    def fill_from(self, seen: Any, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        pair.A.zero_()
        pair.A[0] = seen
        pair.B.zero_()


@dataclass(frozen=True, kw_only=True)
class ByVector(FromInputs):
    withdraws: ClassVar[frozenset[str]] = frozenset({"restarts", "lookup"})


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(61, (count, 2, 7), generator=generator)
    return [{"input_ids": i, "labels": i} for i in ids]


def test_one_tensor_is_shared_by_all_layers_and_saved_once():
    model = llama()
    adapters = lorica.attach(model, Recipe(delta=Shared(), r=500), verbose=False)
    held = {id(layer.update.delta.read_shared("S")) for _, layer in adapters}
    assert len(held) == 1 and len(adapters) == 14
    assert not any("S" in n.split(".") for n in model.state_dict()), "outside of the module tree"
    state = adapters.state_dict()
    assert [n for n in state if n.endswith(".S")] == ["shared.S"]
    frozen = state["shared.S"].numel()
    assert adapters.summary.frozen["frozen factors"] == {"tensors": 1, "elements": frozen}
    trained = sum(layer.out_features for _, layer in adapters)
    assert adapters.summary.trainable == trained

    other = lorica.attach(llama(), Recipe(delta=Shared(), r=500, seed=1), verbose=False)
    assert not torch.equal(other.state_dict()["shared.S"], state["shared.S"]), "another seed"
    with torch.no_grad():
        for _, layer in adapters:
            layer.update.delta.b.normal_()
    other.load_state_dict(adapters.state_dict())
    ids = batches(1)[0]["input_ids"]
    torch.testing.assert_close(other.model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert other.fingerprint() == adapters.fingerprint()
    assert other.hash_base() == adapters.hash_base(), "what is shared is no part of the base"
    lorica.detach(model)
    torch.testing.assert_close(model(ids).logits, llama()(ids).logits, rtol=0, atol=0)


def test_what_is_shared_follows_a_layers_dtype_a_copy_and_a_load():
    model = llama()
    adapters = lorica.attach(model, Recipe(delta=Shared(), r=500), verbose=False)
    delta = adapters.layers["model.layers.0.self_attn.q_proj"].update.delta
    own = delta.read_shared("S")
    twin = copy.deepcopy(model).double()
    other = lorica.Adapters.of(twin)
    with torch.inference_mode():
        twin(batches(1)[0]["input_ids"])
    twin(**batches(1)[0]).loss.backward()
    held = {id(layer.update.delta.read_shared("S")) for _, layer in other}
    assert len(held) == 1 and not held & {id(own)}
    other_delta = other.layers["model.layers.0.self_attn.q_proj"].update.delta
    assert torch.equal(other_delta.read_shared("S"), own.double())
    state = adapters.state_dict()
    other.load_state_dict({n: 2 * t for n, t in state.items()})
    assert torch.equal(other_delta.read_shared("S"), 2 * own.double()), "a copy made before a load"
    assert torch.equal(delta.read_shared("S"), own)


def test_a_start_is_made_from_the_first_batches_and_needs_none_when_it_is_loaded():
    model = llama()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    adapters = lorica.attach(
        model, Recipe(init=FromInputs(), r=2), data=iter(batches(9)), verbose=False
    )
    assert model.training
    plain, sums = llama(), torch.zeros(32)
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(adder(sums))
    for batch in batches(9)[:2]:
        plain(**batch)
    pair = adapters.layers["model.layers.0.self_attn.q_proj"].update.delta.pair()
    torch.testing.assert_close(pair.A[0].detach(), sums)
    state = adapters.state_dict()
    lorica.detach(model)
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    again = lorica.attach(llama(), Recipe(init=FromInputs(), r=2), initialise=False, verbose=False)
    again.load_state_dict(state)


def test_a_model_without_data_of_its_own_needs_no_batches():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    adapters = lorica.attach(model, Recipe(init=FromInputs(), r=2), verbose=False)
    assert adapters.summary.trainable == 2 * (8 + 8)


def test_an_init_that_reads_input_vectors_refuses_embeddings():
    with pytest.raises(ValueError, match="`test_shared_and_data` needs an input vector"):
        recipe = Recipe(init=ByVector(), r=2, target_modules=["embed_tokens"])
        lorica.attach(llama(), recipe, data=batches(2), verbose=False)


@pytest.mark.parametrize("niter", [0, 3])
def test_a_sketched_svd_is_exact_at_full_width_and_near_where_values_fall(niter):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(9, 7, generator=generator) * torch.tensor(0.1) ** torch.arange(7.0)
    for k in (7, 5):
        U, S, Vh = sketched_svd(X, torch.randn(7, k, generator=generator), niter)
        want = torch.linalg.svdvals(X)[:k]
        torch.testing.assert_close(S[:3], want[:3], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(U.T @ U, torch.eye(k), rtol=0, atol=1e-5)
        if k == 7:
            torch.testing.assert_close(U * S @ Vh, X, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("recipe", "data", "part"), [
    (Recipe(init=FromInputs(), r=2), None, r"starts from 2 batches .* data=batches"),
    (Recipe(init=FromInputs(), r=2), batches(1), r"2 batches, and `data` holds 1"),
    (Recipe.parse("lora", r=2), batches(1), "`data` has no effect with `lora`"),
])  # fmt: skip
def test_data_where_none_is_wanted_and_the_reverse(recipe, data, part):
    model = llama()
    with pytest.raises(ValueError, match=part):
        lorica.attach(model, recipe, data=data, verbose=False)
    assert type(model.lm_head) is nn.Linear and model.model.norm.weight.requires_grad


@pytest.mark.parametrize("method", ["cola", "relora", "xgblora"])
def test_a_start_from_data_cannot_be_made_again(method):
    with pytest.raises(ValueError, match=f"`{method}` needs `restarts`"):
        Recipe(init=FromInputs(), schedules=Recipe.parse(method).schedules, r=1)


def test_ranks_of_a_file_come_before_the_recipes():
    names = [n for n, _ in lorica.attach(llama(), "lora", r=2, verbose=False)]
    ranks = {n: (1 + i % 3, 6.0) for i, n in enumerate(names)}
    adapters = lorica.attach(llama(), "lora", r=2, ranks=ranks, verbose=False)
    got = {n: (layer.site.r, layer.site.scale) for n, layer in adapters}
    assert got == {n: (r, 6.0 / r) for n, (r, _) in ranks.items()}


def test_ranks_have_to_name_every_target():
    with pytest.raises(ValueError, match=r"nothing for the target '.*k_proj' \(13 such.*exclude"):
        ranks = {"model.layers.0.self_attn.q_proj": (2, 2.0)}
        lorica.attach(llama(), "lora", r=2, ranks=ranks, verbose=False)
