"""Which modules are adapted, and every way in which that can go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorica
from lorica.model.heads import head_names
from lorica.model.targets import find, matches
from models import bert, gpt2, llama, logits, perturb, qwen2, t5

NONE = {"exclude_modules": None, "layers_to_transform": None, "modules_to_save": ()}


def names(model, **fields) -> list[str]:
    return list(find(model, **{"target_modules": "all-linear", **NONE, **fields}).layers)


def leaves(model, **fields) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n in names(model, **fields)}


@pytest.mark.parametrize(("make", "expected"), [
    (llama, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    (gpt2, {"c_attn", "c_proj", "c_fc"}),
    (t5, {"q", "k", "v", "o", "wi", "wo"}),
    (bert, {"query", "key", "value", "dense"}),
])  # fmt: skip
def test_all_linear_is_every_linear_layer_but_the_head(make, expected):
    model = make()
    assert leaves(model) == expected
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    heads = head_names(model)
    rest = set(linear) - set(names(model))
    assert rest and all(any(n == h or n.startswith(h + ".") for h in heads) for n in rest)


def test_a_plain_module_has_no_head():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert names(model) == ["0", "2"] and head_names(model) == set()


def test_names_match_whole_components():
    assert matches("q_proj", "a.q_proj") and matches("a.q_proj", "a.q_proj")
    assert not matches("proj", "a.q_proj") and not matches("q_proj", "a.q_proj.b")
    model = llama()
    assert names(model, target_modules=("q_proj",)) == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    assert len(names(model, target_modules=("0.self_attn.q_proj",))) == 1
    assert names(model, target_modules=("lm_head",)) == ["lm_head"], "asked for by name"


def test_one_string_is_a_regular_expression_for_whole_paths():
    model = llama()
    got = names(model, target_modules=r".*layers\.1\..*(q|v)_proj")
    assert got == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_exclude_and_layers():
    model = llama(num_hidden_layers=3)
    assert "q_proj" not in leaves(model, exclude_modules=("q_proj",))
    assert leaves(model, exclude_modules=r".*mlp.*") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    picked = names(model, layers_to_transform=(0, 2))
    assert {n.split(".")[2] for n in picked} == {"0", "2"} and len(picked) == 14


@pytest.mark.parametrize(("fields", "parts"), [
    ({"target_modules": ["q_prj"]}, ["`target_modules`: 'q_prj'", "did you mean 'q_proj'?",
                                     "Modules there end in:", "v_proj"]),
    ({"target_modules": ["q_proj", "xyz"]}, ["'xyz' matches no module"]),
    ({"target_modules": "q_proj"}, ["regular expression for whole paths", "given as a list"]),
    ({"target_modules": "("}, ["is no regular expression", "written as a list"]),
    ({"target_modules": ["norm"]}, ["'model.norm'", "cannot be adapted", "LlamaRMSNorm",
                                    "Allowed: nn.Linear"]),
    ({"target_modules": []}, ["no module", "target_modules"]),
    ({"exclude_modules": ["nothing"]}, ["`exclude_modules`: 'nothing' matches no module of the"
                                        " model"]),
    ({"exclude_modules": ["lm_haed"]}, ["did you mean 'lm_head'?"]),
    ({"exclude_modules": r".*"}, ["no module is left to adapt after `exclude_modules`"]),
    ({"layers_to_transform": [7]}, ["no target module in block 7", "blocks: [0, 1]"]),
    ({"rank_pattern": {"proj": 2}}, ["`rank_pattern` has 'proj'", "matches none of the 14",
                                     "whole components of it", "q_proj"]),
    ({"alpha_pattern": {"lm_head": 2}}, ["`alpha_pattern` has 'lm_head'"]),
    ({"modules_to_save": ["headd"]}, ["`modules_to_save`: 'headd'", "did you mean"]),
    ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
     ["both a target and within `modules_to_save`", "train twice"]),
    ({"r": 33}, ["`r=33` is larger than min(in, out) of 14 layer(s)", "(32 x 32)",
                 "Give at most `r=16`", "`rank_pattern`"]),
])  # fmt: skip
def test_errors(fields, parts):
    model = llama()
    with pytest.raises(ValueError) as caught:
        lorica.attach(model, "lora", verbose=False, **{"r": 4, **fields})
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("excluded", [["lm_head"], ["embed_tokens", "q_proj"], ".*lm_head"])
def test_a_module_may_be_excluded_that_nothing_would_adapt(excluded):
    """What was asked for holds: the head has no adapter."""
    found = names(llama(), exclude_modules=excluded)
    assert found and not any("lm_head" in n or "embed_tokens" in n for n in found)
    fields = {"target_modules": ["v_proj"], "exclude_modules": excluded}
    if "embed_tokens" not in excluded:
        assert all(n.endswith("v_proj") for n in names(llama(), **fields))
    else:  # a single layer, which most likely means another one
        with pytest.raises(ValueError, match=r"'embed_tokens' has no effect, since `target_mod"):
            names(llama(), **fields)
    assert names(llama(), target_modules=["up_proj"], exclude_modules=["self_attn"])


def test_torchs_attention_is_refused():
    """It reads its projections' weights directly, past any adapter."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    assert names(model) == ["b"]
    for targets in (["out_proj"], ["a"], r"a\..*"):
        with pytest.raises(ValueError, match="cannot be adapted.*(MultiheadAttention)"):
            lorica.attach(model, "lora", r=2, target_modules=targets, verbose=False)


def test_torchs_encoder_layer_never_bypasses_an_adapter():
    """Its fast path in evaluation reads `linear1.weight` directly: refused, or right."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 16)
    try:
        adapters = lorica.attach(
            model, "lora", r=2, target_modules=["linear1", "linear2"], verbose=False
        )
    except ValueError as error:
        assert "TransformerEncoderLayer" in str(error)
        with pytest.raises(ValueError):
            lorica.attach(model, "lora", r=2, verbose=False)
        return
    perturb(adapters, 0.5)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model.train()(x).detach(), rtol=1e-4, atol=1e-4)


def test_an_embedding_that_renormalises_is_refused():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="'0' cannot be adapted: its `max_norm` rewrites"):
        lorica.attach(model, "lora", r=2, target_modules=["0"], verbose=False)


def test_no_linear_layer_at_all():
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="finds no linear layer.*Embedding.*LayerNorm"):
        lorica.attach(model, "lora", r=2, verbose=False)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


def test_a_module_under_two_names_is_adapted_under_both_or_refused():
    torch.manual_seed(0)
    model = Twice()
    plain = model.a
    try:
        adapters = lorica.attach(model, "lora", r=2, verbose=False)
    except ValueError as error:
        assert "'a'" in str(error) and "'b'" in str(error)
        assert model.a is model.b is plain
        return
    assert model.a is model.b, "one of the two calls would go past the adapter"
    perturb(adapters, 0.5)
    x = torch.randn(2, 4)
    adapted = model(x)
    lorica.merge(model)
    assert model.a is model.b is plain
    torch.testing.assert_close(model(x), adapted)


def test_tied_weights_are_named():
    found = find(qwen2(), target_modules=("embed_tokens",), **NONE)
    assert found.tied == {"model.embed_tokens": "lm_head"}
    assert not find(llama(), target_modules=("embed_tokens",), **NONE).tied
    found = find(t5(), target_modules=("lm_head",), **NONE)
    assert found.tied["lm_head"] in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")


def test_what_is_left_out_is_listed_with_its_size():
    model = llama()
    left = find(model, target_modules=("q_proj",), **NONE).unadapted
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.ndim >= 2}
    expected = {n: s for n, s in sizes.items() if not n.endswith("q_proj.weight")}
    assert left == expected


def test_a_target_that_no_forward_reaches_is_found_out():
    """T5's `shared` is a name only: encoder and decoder have embeddings of their own."""
    model = t5()
    adapters = lorica.attach(model, "lora", r=2, target_modules=["shared"], verbose=False)
    before = logits(model)
    perturb(adapters, 0.5)
    if torch.equal(logits(model), before):
        from models import batch

        optimizer = lorica.optimizer(adapters, lr=1e-3)
        inputs = {k: v for k, v in batch(model).items()}
        head = nn.Parameter(torch.zeros(()))
        with pytest.raises(ValueError, match="had no gradient in 10 steps.*shared"):
            for _ in range(10):
                (model(**inputs).loss + head).backward()
                optimizer.step()


@pytest.mark.parametrize(("fields", "said"), [
    ({"target_modules": ("q_proj", "lm_head"), "layers_to_transform": (1,)},
     "'lm_head' has no effect, since `layers_to_transform`"),
    ({"target_modules": ("q_proj", "k_proj"), "exclude_modules": ("k_proj",)},
     "'k_proj' has no effect, since `exclude_modules`"),
    ({"target_modules": ("q_proj", "0.mlp.up_proj"), "layers_to_transform": (1,)},
     "'0.mlp.up_proj' has no effect"),
    ({"target_modules": ("q_proj", "mlp")}, "holds some; name those: .*up_proj"),
    ({"exclude_modules": ("0.mlp",), "layers_to_transform": (1,)},
     "'0.mlp' has no effect, since `layers_to_transform`"),
    ({"target_modules": ("q_proj", "up_proj"), "exclude_modules": ("0.mlp", "v_proj")},
     "'v_proj' has no effect, since `target_modules` names nothing"),
    ({"exclude_modules": ("0",), "layers_to_transform": (0, 1)}, "no target module in block 0"),
])  # fmt: skip
def test_every_name_has_an_effect_under_all_options_together(fields, said):
    with pytest.raises(ValueError, match=said):
        names(llama(), **fields)


def test_a_pattern_that_an_earlier_one_takes_every_layer_from_is_an_error():
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj.*Put the narrower"):
        lorica.attach(llama(), "lora", rank_pattern={"q_proj": 4, "0.self_attn.q_proj": 8})
    patterns = {"0.self_attn.q_proj": 8, "q_proj": 4}
    adapters = lorica.attach(llama(), "lora", rank_pattern=patterns, verbose=False)
    ranks = [adapters.layers[f"model.layers.{i}.self_attn.q_proj"].site.r for i in (0, 1)]
    assert ranks == [8, 4]


def test_an_excluded_name_means_all_that_is_below_it():
    left = names(llama(), exclude_modules=("mlp", "0"))
    assert left == [f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"]
