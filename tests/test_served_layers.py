"""Which modules are served, decided by what they compute, and what an embedding adds to that."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers.models.bart.modeling_bart import (
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import lorica
from lorica.model.bases.base import base_for
from models import perturb

SCALED = {
    "gemma": lambda: Gemma3TextScaledWordEmbedding(16, 8, 0, 2.83),
    "bart": lambda: BartScaledWordEmbedding(16, 8, 0, 8**0.5),
}


class Renamed(nn.Linear):
    """Its forward is inherited."""


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class InFloat32(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


class Quantised(nn.Linear):
    """Falls back to a plain product where its weight is plain, as quantisers do."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("make", [
    lambda: Renamed(4, 6),
    lambda: FalconLinear(4, 6),
    lambda: FalconLinear(4, 6, bias=False),
    lambda: BartScaledWordEmbedding(16, 8, 0, 1.0),
    *SCALED.values(),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_is_served_where_it_computes_the_same(make, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    lookup = isinstance(model[0], nn.Embedding)
    x = torch.arange(16) if lookup else torch.randn(5, 4, dtype=dtype)
    before = model(x)
    adapters = lorica.attach(model, "lora", r=2, target_modules=["0"], verbose=False)
    near = 1e-6 if dtype is torch.float32 else 0.02  # Falcon rounds before it adds the bias
    torch.testing.assert_close(model(x), before, rtol=near, atol=near)
    perturb(adapters, 0.3)
    adapted = model(x)
    assert not torch.allclose(adapted, before, atol=0.1)
    lorica.merge(model)
    within = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(model(x), adapted, rtol=within, atol=within)


@pytest.mark.parametrize("module", [
    Doubled(4, 6), InFloat32(4, 6), Quantised(4, 6), spectral_norm(nn.Linear(4, 4)),
    BartLearnedPositionalEmbedding(16, 8), OPTLearnedPositionalEmbedding(16, 8),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_a_subclass_that_computes_something_else_is_not_served(module):
    assert base_for(module) is None


def test_a_router_is_not_served():
    class Config:
        hidden_size, num_local_experts, num_experts_per_tok = 4, 6, 2

    assert base_for(Llama4Router(Config())) is None


def test_a_constant_without_a_value_yet_is_read_when_there_is_one():
    """On the meta device the buffer that holds it is empty."""
    with torch.device("meta"):
        model = nn.Sequential(SCALED["gemma"]())
    adapters = lorica.attach(model, "lora", r=2, target_modules=["0"], verbose=False)
    model.to_empty(device="cpu")
    layer = adapters.layers["0"]
    with torch.no_grad():
        layer.base.weight.normal_()
        layer.base.embed_scale.fill_(3.0)
        for p in layer.update.parameters():
            p.zero_()
    torch.testing.assert_close(model(torch.arange(16)), 3 * layer.base.weight)


@pytest.mark.parametrize("method", ["lora", "dora", "olora", "miss", "tt", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_row_of_the_padding_does_not_train(method, dropout):
    torch.manual_seed(0)
    ids = torch.arange(16)
    model = nn.Sequential(nn.Embedding(16, 16, padding_idx=3))
    before = model(ids)
    adapters = lorica.attach(
        model, method, r=4, target_modules=["0"], lora_dropout=dropout, verbose=False
    )
    torch.testing.assert_close(model(ids), before)
    optimizer = lorica.optimizer(adapters, lr=0.1, total_steps=3)
    for _ in range(3):
        (model(ids) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    adapted = model(ids)
    assert not adapted[3].any() and (adapted - before)[4:].abs().max() > 0.1
    lorica.merge(model)
    torch.testing.assert_close(model(ids), adapted)
    assert not model(ids)[3].any()


class WithRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.router = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.wide(x) * self.router(x).softmax(-1)[..., :1]


def test_all_linear_leaves_out_and_lists_what_is_too_thin():
    adapters = lorica.attach(WithRouter(), "lora", r=4, verbose=False)
    assert list(adapters.layers) == ["wide"]
    assert adapters.summary.left_out == {"router": "too thin for r=4, at most 2 fits"}
    assert "router.weight (" in str(adapters.summary) and "too thin for r=4" in str(
        adapters.summary
    )
    assert "router.weight" in adapters.summary.unadapted
    adapters = lorica.attach(WithRouter(), "galore", r=4, verbose=False)
    assert adapters.direct["router.weight"] == "module", "it trains without a projection"
    adapters = lorica.attach(WithRouter(), "lora", r=4, rank_pattern={"router": 2}, verbose=False)
    assert list(adapters.layers) == ["wide", "router"]


@pytest.mark.parametrize("fields", [
    {"target_modules": ["wide", "router"]}, {"rank_pattern": {"router": 3}}, {"r": 9},
])  # fmt: skip
def test_a_layer_that_was_named_is_not_left_out(fields):
    model = WithRouter()
    with pytest.raises(ValueError, match="larger than min"):
        lorica.attach(model, "lora", **{"r": 4, **fields}, verbose=False)
    assert type(model.router) is nn.Linear


def test_what_was_left_out_is_left_out_again_on_loading(tmp_path):
    model = WithRouter()
    adapters = lorica.attach(model, "lora", r=4, verbose=False)
    perturb(adapters)
    x = torch.randn(3, 8)
    y = model(x)
    lorica.save(adapters, tmp_path / "out")
    lorica.detach(model)
    loaded = lorica.load(model, tmp_path / "out", verbose=False)
    assert list(loaded.layers) == ["wide"]
    assert torch.equal(model(x), y)
