"""MiSS: shards that share a row; its form that PEFT calls mini; PEFT's own type for all three."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import Tensor, nn

import chains
import lorica
import models
from lorica.formats import export, inspect
from models import llama, logits, perturb
from reference import miss as twin

# (out, in, r): r divides out or doesn't
SHAPES = [(7, 5, 3), (8, 6, 4), (5, 9, 4), (5, 7, 5), (3, 3, 1), (11, 8, 2)]


def layer(method="miss", shape=(7, 5, 3), moved=True, **fields):
    torch.manual_seed(0)
    out, features, r = shape
    model = nn.Sequential(nn.Linear(features, out, dtype=torch.float64))
    adapters = lorica.attach(model, method, r=r, verbose=False, **fields)
    if moved:
        perturb(adapters, 0.7)
    return model, adapters.layers["0"]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_twin(shape):
    model, one = layer(shape=shape)
    out, features, r = shape
    delta, x = one.update.delta, torch.randn(4, features, dtype=torch.float64)
    assert delta.D.shape == (r, features)
    weight = twin.weight(delta.D, out)
    torch.testing.assert_close(delta(x, one.store), x @ weight.T)
    torch.testing.assert_close(delta.weight(one.store), weight)
    torch.testing.assert_close(delta.factors().weight(), weight)
    torch.testing.assert_close(model(x), one.base(x) + x @ weight.T)
    rows = [weight[o].detach() for o in range(out)]
    assert len({tuple(row.tolist()) for row in rows}) == r, "as many different rows as shards"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [1, 2, 3])
def test_the_mini_form_equals_the_twin(shape, q):
    model, one = layer(f"miss(mini_r={q})", shape)
    out, features, r = shape
    delta, x = one.update.delta, torch.randn(2, 3, features, dtype=torch.float64)
    assert delta.D.shape == (r, q)
    weight = twin.mini_weight(delta.D, features, out)
    torch.testing.assert_close(delta(x, one.store), x @ weight.T)
    torch.testing.assert_close(delta.weight(one.store), weight)
    factors = delta.factors()
    torch.testing.assert_close(factors.weight(), weight)
    assert factors.A.shape[0] == min(r, q), "no more than its rank"
    torch.testing.assert_close(model(x), one.base(x) + x @ weight.T)


@pytest.mark.parametrize(
    ("method", "weight"),
    [
        ("miss", lambda p, W: twin.weight(p["D"], W.shape[0])),
        ("miss(mini_r=2)", lambda p, W: twin.mini_weight(p["D"], W.shape[1], W.shape[0])),
    ],
)
def test_layers_train_as_the_twin(method, weight):
    chains.assert_trains_as(method, weight, lora_alpha=None)


def test_the_widest_mini_form_is_the_block_sum():
    _, mini = layer("miss(mini_r=7)")
    _, sums = layer("bone")
    with torch.no_grad():
        sums.update.delta.D.copy_(mini.update.delta.D)
    assert torch.equal(mini.effective()[0], sums.effective()[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_gradient_is_the_weights_summed_over_a_shard(shape):
    model, one = layer(shape=shape, moved=False)
    x = torch.randn(6, shape[1], dtype=torch.float64)
    y = model(x)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    torch.testing.assert_close(one.update.delta.D.grad, twin.gradient(dy.T @ x, shape[2]))


@pytest.mark.parametrize("method", ["miss", "miss(mini_r=3)"])
def test_gradients_pass_gradcheck(method):
    _, one = layer(method)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x, D):
        return torch.func.functional_call(one.update.delta, {"D": D}, (x, one.store))

    assert torch.autograd.gradcheck(forward, (x, one.update.delta.D))


@pytest.mark.parametrize("method", ["miss", "miss(mini_r=3)"])
def test_a_token_id_is_a_one_hot(method):
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(7, 5, dtype=torch.float64)})
    adapters = lorica.attach(model, method, r=2, target_modules=["table"], verbose=False)
    perturb(adapters, 0.7)
    delta, ids = adapters.layers["table"].update.delta, torch.tensor([[0, 3, 6], [5, 1, 2]])
    expected = nn.functional.one_hot(ids, 7).double() @ delta.weight(None).T
    torch.testing.assert_close(delta(ids, None), expected)
    torch.testing.assert_close(model["table"](ids), model["table"].base(ids) + expected)


@pytest.mark.parametrize("q", [0, -1, True, 2.0, "all"])
def test_the_width_is_a_whole_number(q):
    with pytest.raises(ValueError, match="a whole number of at least 1"):
        lorica.Recipe.parse(f"miss(mini_r={q!r})")


def test_a_width_above_the_outputs_is_refused():
    model = nn.ModuleDict({"p": nn.Linear(8, 6)})
    with pytest.raises(ValueError, match=r"larger than the 6 outputs of 'p'; give at most"):
        lorica.attach(model, "miss(mini_r=7)", r=2, verbose=False)
    assert type(model["p"]) is nn.Linear
    with pytest.raises(ValueError, match="`lora_alpha=8` has no effect"):
        lorica.Recipe.parse("miss(mini_r=4)", lora_alpha=8)


# -- what it can express ---------------------------------------------------------------------------


def captured(method: str, r: int, target: Tensor) -> float:
    """The best share of ‖ΔW*‖² within reach of an update that is linear in its one parameter."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.float64))
    nn.init.normal_(model[0].weight, std=64**-0.5)
    one = lorica.attach(model, method, r=r, verbose=False).layers["0"]
    (p,) = one.update.delta.parameters()
    assert p.numel() == 512
    basis = torch.eye(512, dtype=torch.float64).view(512, *p.shape)
    columns = []
    with torch.no_grad():
        for direction in basis:
            p.copy_(direction)
            columns.append(one.update.delta.weight(one.store).flatten())
    q, _ = torch.linalg.qr(torch.stack(columns, 1))
    return float((q.T @ target.flatten()).square().sum() / target.square().sum())


def targets() -> dict[str, Tensor]:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in "uv")
    decay = torch.exp(-torch.arange(64, dtype=torch.float64) / 4)
    return {
        "flat": u,
        "gaussian": torch.randn(64, 64, dtype=torch.float64),
        "decaying": u * decay @ v,
    }


def test_equal_parameters_reach_as_much_of_any_target_without_structure():
    """About 512/64² of each, whatever its spectrum; LoRA of as many reaches r/d of a flat spectrum
    and most of a decaying one."""
    for name, target in targets().items():
        s = torch.linalg.svdvals(target).square()
        lora = float(s[:4].sum() / s.sum())
        shares = {m: captured(m, 8, target) for m in ("bone", "miss", "bat")}
        for method, share in shares.items():
            assert 0.08 < share < 0.19, (name, method, share)
            assert (share > lora) == (name == "flat"), (name, method, share, lora)
        if name == "flat":
            assert lora == pytest.approx(4 / 64)
            assert shares["bone"] == pytest.approx(2 * lora), "r/d of an orthogonal target, exactly"
            assert shares["miss"] == pytest.approx(2 * lora)


# -- PEFT ------------------------------------------------------------------------------------------

# method -> PEFT's modes (`init_weights`, `mini_r`) that compute it, and targets where they do
MODES = {"bone": (True, 1), "miss(mini_r=8)": ("mini", 8), "bat": ("bat", 1)}
ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).detach().abs().max()) <= 1e-5 * max(1.0, float(a.detach().abs().max()))


def peft_made(base: nn.Module, folder=None, **fields):
    """A MISS adapter that PEFT made, moved off its start and saved."""
    from peft import MissConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), MissConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def read_by_peft(base: nn.Module, folder) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    stored = model.load_adapter(str(folder), "default")
    assert not stored.unexpected_keys and not stored.missing_keys
    return logits(model)


def kind(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("method", MODES)
@pytest.mark.parametrize("shape", [(16, 24), (16, 26)])
def test_it_equals_pefts_layer(method, shape):
    """Forward, merge and gradient with PEFT's weights copied; r that does not divide the inputs,
    where PEFT pads."""
    out, features = shape
    if method == "bat" and features % 8:
        with pytest.raises(ValueError, match="divisible"):
            peft_made(nn.Sequential(nn.Linear(features, out)), r=8, target_modules=["0"],
                      init_weights="bat")  # fmt: skip
        return
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(features, out))
    mode, q = MODES[method]
    theirs = peft_made(base, r=8, target_modules=["0"], init_weights=mode, mini_r=q)
    adapters = lorica.attach(base, method, r=8, verbose=False)
    block = theirs.base_model.model[0].miss_block["default"]
    adapters.load_state_dict({"0.update.delta.D": block.detach().clone()})
    x = torch.randn(5, features)
    close(base(x), theirs(x))
    base(x).square().sum().backward()
    theirs(x).square().sum().backward()
    close(adapters.layers["0"].update.delta.D.grad, block.grad)
    merged = theirs.merge_and_unload(safe_merge=True)[0].weight
    lorica.merge(base)
    close(base[0].weight, merged)


@pytest.mark.parametrize("method", ["bone", "miss(mini_r=4)", "miss(mini_r=8)"])
def test_factors_are_pefts_own_conversion(method):
    from peft.tuners.lora.conversion import convert_to_lora

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(26, 16))
    mode, q = ("mini", int(method[-2])) if "mini" in method else (True, 1)
    theirs = peft_made(base, r=8, target_modules=["0"], init_weights=mode, mini_r=q)
    _, tensors = convert_to_lora(theirs, rank=8, progressbar=False)
    A, B = (next(t for k, t in tensors.items() if f"lora_{s}" in k) for s in "AB")
    one = lorica.attach(base, method, r=8, verbose=False).layers["0"]
    with torch.no_grad():
        one.update.delta.D.copy_(theirs.base_model.model[0].miss_block["default"])
    own = one.update.factors()
    close(own.weight(), B @ A)
    if own.A.shape == A.shape:
        assert torch.equal(own.A, A) and torch.equal(own.B, B)


@pytest.mark.parametrize("method", MODES)
def test_what_is_saved_is_pefts_type(method, tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    adapters = lorica.attach(
        model, method, r=8, lora_dropout=0.1, target_modules=ALL, modules_to_save=["lm_head"],
        verbose=False,
    )  # fmt: skip
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    mode, q = MODES[method]
    assert config["peft_type"] == "MISS" and config["r"] == 8 and config["miss_dropout"] == 0.1
    assert (config["init_weights"], config["mini_r"]) == (mode, q)
    assert not {k for k in config if "lora" in k}
    assert not (out / "lorica.safetensors").exists()
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    close(logits(model), read_by_peft(base, out))
    told = inspect(out)
    assert len(told["layers"]) == len(adapters) and not told["problems"]

    again = copy.deepcopy(base)
    loaded = lorica.load(again, out)
    assert loaded.fingerprint() == adapters.fingerprint() and loaded.recipe == adapters.recipe
    (out / "lorica.json").unlink()  # as if PEFT had written it
    other = copy.deepcopy(base)
    assert lorica.load(other, out).recipe.text() == method
    close(logits(model), logits(other))
    assert inspect(out)["method"] == f"MISS, {method}"


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_are_pefts_too(bias, tmp_path):
    model = models.qwen2()
    base = copy.deepcopy(model)
    perturb(lorica.attach(model, "bone", r=8, bias=bias, target_modules=ALL, verbose=False))
    out = lorica.save(model, tmp_path / "out")
    assert kind(out) == "MISS"
    close(logits(model), read_by_peft(base, out))
    (out / "lorica.json").unlink()
    other = copy.deepcopy(base)
    assert lorica.load(other, out).recipe.bias == bias
    close(logits(model), logits(other))


PEFTS = {
    "plain": ("bone", {}),
    "random start": ("bone", {"init_weights": False}),
    "r that does not divide": ("bone", {"r": 7}),
    "r above the outputs": ("bone", {"r": 24, "target_modules": ["k_proj"]}),
    "expression": ("bone", {"target_modules": r".*\.self_attn\.[qv]_proj"}),
    "one block": ("bone", {"layers_to_transform": 1}),
    "in full": ("bone", {"modules_to_save": ["lm_head"]}),
    "biases": ("bone", {"bias": "MiSS_only"}),
    "mini": ("miss(mini_r=4)", {"init_weights": "mini", "mini_r": 4}),
    "bat": ("bat", {"init_weights": "bat"}),
    "dropout": ("bone", {"miss_dropout": 0.1}),
}


@pytest.mark.parametrize("case", PEFTS)
def test_what_peft_made_is_read(case, tmp_path):
    method, fields = PEFTS[case]
    base = models.qwen2() if case == "biases" else llama()
    theirs = peft_made(base, tmp_path / "theirs", **{"r": 8, "target_modules": ALL, **fields})
    model = copy.deepcopy(base)
    adapters = lorica.load(model, tmp_path / "theirs")
    assert adapters.recipe.text() == method
    assert adapters.recipe.lora_dropout == fields.get("miss_dropout", 0.0)
    close(logits(theirs), logits(model))
    out = lorica.save(adapters, tmp_path / "ours")  # and on to PEFT again
    close(logits(theirs), read_by_peft(base, out))
    assert lorica.load(copy.deepcopy(base), out).fingerprint() == adapters.fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_weights": "tomorrow"}, "`init_weights='tomorrow'`"),
        ({"init_weights": "mini", "mini_r": "8"}, "`mini_r='8'`"),
        ({"lora_alpha": 6}, "`lora_alpha=6`"),
        ({"r": None}, "'r'"),
        ({"miss_dropout": "much"}, "'miss_dropout' is 'much'"),
        ({"peft_type": "BONE"}, "'BONE'; read are LORA files (LoRA, DoRA, rsLoRA, OLoRA, PiSSA,"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change, words, tmp_path):
    base = llama()
    peft_made(base, tmp_path / "a", r=8, target_modules=ALL)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError) as caught:
        lorica.load(base, tmp_path / "a")
    assert words in str(caught.value) and "adapter_config.json" in str(caught.value)


LORAS = {
    "a rank of its own": ("bone", "llama", {"rank_pattern": {"q_proj": 2}}),
    "a magnitude": ("dora+bone", "llama", {}),
    "shards": ("miss", "llama", {}),
    "a width that does not divide": ("miss(mini_r=5)", "llama", {}),
    "transposed": ("bone", "gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "an embedding": ("miss(mini_r=4)", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("case", LORAS)
def test_where_pefts_type_is_not_exact_its_lora_is(case, tmp_path):
    method, family, fields = LORAS[case]
    model = models.MODELS[family]()
    base = copy.deepcopy(model)
    fields = {"target_modules": ALL, **fields}
    adapters = lorica.attach(model, method, r=4, verbose=False, **fields)
    perturb(adapters)
    out = lorica.save(adapters, tmp_path / "out")
    assert kind(out) == "LORA"
    close(logits(model), read_by_peft(base, out))
    again = copy.deepcopy(base)
    assert lorica.load(again, out).fingerprint() == adapters.fingerprint()
    assert torch.equal(logits(again), logits(model))
    if "dora" not in method:
        export(adapters, tmp_path / "plain", portable=True)
        assert kind(tmp_path / "plain") == "LORA"
        close(logits(model), read_by_peft(base, tmp_path / "plain"))


def test_finished_links_make_it_a_lora(tmp_path):
    """Carried factors have no place in PEFT's own type."""
    from lorica.training.weight_edits import merge_

    model = llama()
    base = copy.deepcopy(model)
    adapters = lorica.attach(model, "bone", r=4, target_modules=ALL, verbose=False)
    perturb(adapters)
    for _, one in adapters:
        generator = torch.Generator().manual_seed(0)
        merge_(one, None, link=1, init=None, generator=generator, accumulate="factors")
    perturb(adapters, seed=6)
    out = lorica.save(adapters, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    close(logits(model), read_by_peft(base, out))
    again = copy.deepcopy(base)
    assert lorica.load(again, out).fingerprint() == adapters.fingerprint()
    close(logits(again), logits(model))
