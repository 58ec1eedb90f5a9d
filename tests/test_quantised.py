"""Quantised bases: every method that leaves the base as it is works on them, as on the plain model
of their values; what writes to the base is refused.

The oracles are the same adapter on a dense model that holds the quantised weights' values, and PEFT
on the same quantised base.

    pip install -e ".[test,quantization]"           # all of this file skips without the extra
    pip install --no-deps optimum-quanto hqq        # for the two formats at its end
    pytest -W ignore::DeprecationWarning tests/test_quantised.py    # HQQ's import warns
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from walk import data_for, every, start_for

import lorica
import models
from lorica.model.modules_to_save import replace
from lorica.model.quantised import dequantise, floating_dtype, quantised
from lorica.recipe import Recipe
from lorica.run.options import UsageError
from lorica.run.quantization import asked, check_method
from models import perturb


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's own import
        return pytest.importorskip(name)


package("bitsandbytes")
package("torchao")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each cast of an input


def _torchao(config, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(importlib.import_module("torchao.quantization"), config)(**given)
        return TorchAoConfig(made)


FORMATS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 with double quantisation": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8 (bitsandbytes)": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8 (torchao)": lambda: _torchao("Int8WeightOnlyConfig"),
    "float8_e4m3fn (torchao)": lambda: _torchao("Float8WeightOnlyConfig"),
    "int4 (torchao)": lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}
every_format = pytest.mark.parametrize("stored", FORMATS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model of two layers on disk; 64 wide, which is a block of bitsandbytes."""
    path = tmp_path_factory.mktemp("dense")
    models.llama(hidden_size=64, intermediate_size=96).save_pretrained(path)
    return path


def loaded(folder, stored, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=FORMATS[stored](), dtype=dtype
        )
    return model.train()  # in evaluation int8 of bitsandbytes rounds activations as well


@pytest.fixture
def load(folder):
    return lambda stored, dtype=torch.float32: loaded(folder, stored, dtype)


def plain(model):
    """The same model, its quantised weights replaced by their values."""
    replace(model, dequantise(model, floating_dtype(model)))
    return model.requires_grad_(False)


def steps(adapters, n, lr=1e-2):
    """Losses of n steps."""
    optimizer = lorica.optimizer(adapters, lr=lr, total_steps=n)
    return models.train(adapters, optimizer, n)


@every_format
def test_the_format_is_recognised_by_what_the_weight_is(load, stored):
    model = load(stored)
    packed = quantised(model)
    assert len(packed) == 14, "all linear layers but the head"
    assert {store.format for store in packed.values()} == {stored}
    for store in packed.values():
        w = store.weight()
        assert w.shape == (store.out_features, store.in_features)
        x = torch.randn(5, store.in_features, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(store.product(x), x @ w.T.float(), rtol=1e-4, atol=1e-4)


@every_format
@pytest.mark.parametrize("method", ["lora", "dora", "pissa+dora"])
def test_it_trains_as_the_plain_model_of_its_values(load, stored, method):
    model, twin = load(stored), plain(load(stored))
    adapters = lorica.attach(model, method, r=4, verbose=False)
    other = lorica.attach(twin, method, r=4, verbose=False)
    batch = models.batch(model, 9)
    for m in (model, twin):
        m(**batch)["loss"].backward()
    for (name, p), (_, q) in zip(
        adapters.state_dict().items(), other.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    for t, u in zip(adapters.trained(), other.trained(), strict=True):
        torch.testing.assert_close(t.parameter.grad, u.parameter.grad, rtol=2e-3, atol=1e-5)
        t.parameter.grad = u.parameter.grad = None
    torch.testing.assert_close(
        torch.tensor(steps(adapters, 10)), torch.tensor(steps(other, 10)),
        rtol=2e-3, atol=2e-3,
    )  # fmt: skip


def _keeps_base(word):
    recipe = Recipe.parse(word)
    return recipe.delta.wraps and not any("writable_base" in c.needs for c in recipe.choices)


WORDS = [word for _, word in every()]
KEEPING = [word for word in WORDS if _keeps_base(word)]


@pytest.mark.parametrize("word", KEEPING)
def test_every_method_that_keeps_the_base_runs_on_nf4(load, tmp_path, word):
    model = load("nf4")
    recipe = Recipe.parse(word)
    fields = {"r": 4} if "r" in recipe.takes and not any(c.only_r for c in recipe.choices) else {}
    if recipe.rank is not None and recipe.rank.reads_patterns:
        fields["rank_pattern"] = {".*": 3}
    begin = start_for(model, recipe)
    begin.pop("unquantised", None)  # the checkpoint has them
    adapters = lorica.attach(model, word, verbose=False, **begin, **fields)
    published = adapters.hash_base()
    assert torch.tensor(steps(adapters, 3)).isfinite().all()
    adapters.base_hash = None
    assert adapters.hash_base() == published
    perturb(adapters)
    live = model(**models.batch(model, 5))["logits"].detach()
    lorica.save(adapters, tmp_path / "a")
    again = load("nf4")
    lorica.load(again, tmp_path / "a", verbose=False)
    torch.testing.assert_close(again(**models.batch(model, 5))["logits"].detach(), live)


@pytest.mark.parametrize("stored", ["nf4", "int8 (torchao)"])
def test_a_start_from_gradients_is_that_of_the_values(load, stored):
    """A packed weight has no gradient of its own; it is made of the layer's input and output."""
    model, twin = load(stored), plain(load(stored))
    made = Recipe.parse("loraga", r=2)
    for m in (model, twin):
        lorica.attach(m, made, data=data_for(m, made), verbose=False)
    one, other = (m.state_dict() for m in (model, twin))
    for name in [n for n in one if n.endswith((".A", ".B"))]:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder).train()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("stored", ["nf4", "int8 (torchao)"])
def test_loftq_starts_nearer_to_the_checkpoint(load, folder, stored):
    """As PEFT's own function leaves it; it knows nf4 alone and writes float32."""
    model, exact = load(stored), dense(folder)
    batch = models.batch(model, 3)
    wanted, bare = exact(**batch)["logits"].detach(), model(**batch)["logits"].detach()
    adapters = lorica.attach(model, "loftq", r=16, lora_alpha=16, verbose=False)
    started = model(**batch)["logits"].detach()
    assert (started - wanted).norm() < 0.8 * (bare - wanted).norm()
    if stored == "nf4":
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=list(adapters.layers))
        theirs = peft.get_peft_model(load(stored), config).train()
        with on_cpu():
            peft.replace_lora_weights_loftq(theirs, str(folder))
        torch.testing.assert_close(theirs(**batch)["logits"], started, rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def on_cpu():
    """PEFT names a GPU where this function computes."""
    to = torch.Tensor.to

    def stays(self, *args, **kwargs):
        kwargs.pop("device", None)
        return to(self, *args, **kwargs) if args or kwargs else self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", stays)
        yield


def test_loftq_says_where_it_found_no_weights(load, folder, tmp_path):
    model = load("nf4")
    load("nf4").save_pretrained(tmp_path / "packed")
    for source, says in (
        (tmp_path, "has no safetensors files"),
        (tmp_path / "packed", "holds packed weights .*uint8"),
        ({}, "has no weight for 'model.layers.0.self_attn.q_proj'"),
    ):
        with pytest.raises(ValueError, match=says):
            lorica.attach(model, "loftq", r=2, unquantised=source, verbose=False)
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match="does not say which checkpoint"):
        lorica.attach(model, "loftq", r=2, verbose=False)
    given = {n: m.weight for n, m in dense(folder).named_modules() if n.endswith("_proj")}
    lorica.attach(model, "loftq", r=2, unquantised=given, verbose=False)


@pytest.mark.parametrize("stored", ["nf4 with double quantisation", "int8 (torchao)"])
def test_files_name_the_format_and_other_bases_are_told(load, folder, tmp_path, stored):
    model = load(stored)
    adapters = lorica.attach(model, "dora", r=4, verbose=False)
    assert stored in str(adapters.summary)
    perturb(adapters)
    lorica.save(adapters, tmp_path / "a")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"held in .*{stored.split(' (')[0]}.*float32 here"):
        lorica.load(dense, tmp_path / "a", verbose=False)
    lorica.load(dense, tmp_path / "a", check_base=False, verbose=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("stored", ["nf4", "int8 (bitsandbytes)"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_the_adapter_on_the_same_base(load, tmp_path, stored, method):
    model = load(stored)
    adapters = lorica.attach(model, method, r=4, verbose=False)
    perturb(adapters)
    batch = models.batch(model, 3)
    live = model(**batch)["logits"].detach()
    lorica.save(adapters, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(load(stored), tmp_path / "a").train()
    torch.testing.assert_close(theirs(**batch)["logits"].detach(), live, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*use_reentrant")
@pytest.mark.parametrize("reentrant", [True, False])
def test_it_trains_as_after_pefts_preparation(even, reentrant):
    """PEFT casts norms, embeddings and head of a bfloat16 model to float32; here they stay, as the
    summary says, and norms compute in float32 all the same. Gradients agree up to bfloat16."""
    how = {"use_reentrant": reentrant}
    model, other = (loaded(even, "nf4", torch.bfloat16) for _ in range(2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    adapters = lorica.attach(model, "lora", r=4, verbose=False)
    assert adapters.summary.dtypes == {"rest": "bfloat16", "trained": "float32"}
    assert "stays in bfloat16, what trains is float32, and" in str(adapters.summary)
    other = peft.prepare_model_for_kbit_training(other, gradient_checkpointing_kwargs=how)
    config = peft.LoraConfig(
        r=4, lora_alpha=adapters.recipe.lora_alpha, target_modules=list(adapters.layers)
    )
    theirs = peft.get_peft_model(other, config).train()
    named = dict(theirs.base_model.model.named_parameters())
    generator, pairs = torch.Generator().manual_seed(0), []
    for name, layer in adapters:
        for side in "AB":
            ours = layer.get_parameter(f"update.delta.{side}")
            pairs.append((ours, named[f"{name}.lora_{side}.default.weight"]))
            ours.data = 0.1 * torch.randn(ours.shape, generator=generator)
            pairs[-1][1].data = ours.data.clone()
    batch = models.batch(model, 9)
    for m in (model, theirs):
        m(**batch)["loss"].backward()
    for ours, peers in pairs:
        assert ours.dtype == peers.dtype == ours.grad.dtype == torch.float32
        near = torch.cosine_similarity(ours.grad.flatten(), peers.grad.flatten(), dim=0)
        assert near > 0.97 and ours.grad.norm() > 0
    assert not any(p.requires_grad for p in adapters.base_parameters().values())


def test_a_resumed_run_is_bit_identical(load, tmp_path):
    def begin():
        adapters = lorica.attach(load("nf4"), "pissa+dora+loraplus", r=4, verbose=False)
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=6)

    straight, optimizer = begin()
    whole = models.train(straight, optimizer, 6)
    adapters, optimizer = begin()
    models.train(adapters, optimizer, 3)
    lorica.save(adapters, tmp_path / "a")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again, optimizer = begin()
    lorica.formats.restore(again, tmp_path / "a")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert models.train(again, optimizer, 3, first=3) == whole[3:]
    assert again.fingerprint() == straight.fingerprint()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ten_steps_equal_pefts(load, method):
    """On the same nf4 base, from the same start, with the same optimizer."""
    model, other = load("nf4"), load("nf4")
    adapters = lorica.attach(model, method, r=4, verbose=False)
    config = peft.LoraConfig(
        r=4, lora_alpha=adapters.recipe.lora_alpha, use_dora=method == "dora",
        target_modules=list(adapters.layers),
    )  # fmt: skip
    theirs = peft.get_peft_model(other, config).train()
    named = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, layer in adapters:
            for side in "AB":
                ours = layer.get_parameter(f"update.delta.{side}")
                named[f"{name}.lora_{side}.default.weight"].copy_(ours)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
        for m in (model, theirs)
    ]
    losses = []
    for seed in range(10):
        batch = models.batch(model, seed)
        pair = [m(**batch)["loss"] for m in (model, theirs)]
        for loss, optimizer in zip(pair, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append([loss.item() for loss in pair])
    ours, peers = torch.tensor(losses).T
    torch.testing.assert_close(ours, peers, rtol=1e-3, atol=1e-3)


@every_format
def test_merging_gives_the_plain_model_of_the_sum(load, stored, tmp_path):
    model = load(stored)
    adapters = lorica.attach(model, "dora", r=4, verbose=False, exclude_modules=["o_proj"])
    perturb(adapters)
    batch = models.batch(model, 3)
    live = model(**batch)["logits"].detach()
    lorica.merge(model)
    torch.testing.assert_close(model(**batch)["logits"].detach(), live, rtol=1e-4, atol=1e-4)
    assert not quantised(model), "what was not adapted is dequantised, too"
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    assert "quantization_config" not in again.config.to_dict()
    torch.testing.assert_close(again(**batch)["logits"].detach(), live, rtol=1e-4, atol=1e-4)


def test_detaching_leaves_the_packed_bytes(load):
    model = load("nf4")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapters = lorica.attach(model, "pissa+dora", r=4, verbose=False)
    steps(adapters, 2)
    with adapters.disabled():
        live = model(**models.batch(model, 3))["logits"].detach()
    lorica.detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(model(**models.batch(model, 3))["logits"].detach(), live)


def test_training_goes_on_after_an_evaluation(load):
    """Evaluating, bitsandbytes repacks weights on some CPUs for a kernel without a gradient; here
    one of the layers has no adapter beside it."""
    model = load("nf4")
    adapters = lorica.attach(model, "lora", r=4, verbose=False, exclude_modules=["down_proj"])
    with torch.no_grad():
        model.eval()(**models.batch(model, 0))
    model.train()(**models.batch(model, 0))["loss"].backward()
    grads = [t.parameter.grad for t in adapters.trained() if t.role == "B"]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_half_precision(load):
    model = load("nf4", torch.bfloat16)
    adapters = lorica.attach(model, "dora", r=4, verbose=False)
    assert {t.parameter.dtype for t in adapters.trained()} == {torch.float32}
    losses = steps(adapters, 6)
    assert losses[-1] < losses[0]
    lorica.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["switchlora", "relora", "full", "galore"])
def test_what_writes_to_the_base_is_refused(load, method):
    with pytest.raises(ValueError, match=f"is nf4, and `{method}` writes to the base"):
        lorica.attach(load("nf4"), method, verbose=False)


def test_training_the_rest_in_place_is_refused(load):
    with pytest.raises(ValueError, match="`train_rest` writes to the base"):
        lorica.attach(load("nf4"), "lora", train_rest=True, verbose=False)


def test_a_chain_keeps_finished_links_beside_a_quantised_base(load):
    model = load("nf4")
    adapters = lorica.attach(model, "raclora(every=2, accumulate='factors')", r=2, verbose=False)
    steps(adapters, 5)
    assert all(layer.update.frozen_A.shape[0] == 4 for _, layer in adapters)


def test_a_packed_form_that_nobody_reads_is_named():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 4
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

        def forward(self, x):
            return x

    no_weight = torch.nn.Linear(8, 8)  # as compressed-tensors leaves it
    del no_weight.weight
    packed = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.int32), requires_grad=False)
    no_weight.register_parameter("weight_packed", packed)
    with pytest.raises(ValueError, match="'1' is a .*Linear.*packed form"):
        both = torch.nn.Sequential(torch.nn.Linear(8, 8), no_weight)
        lorica.attach(both, "lora", r=2, verbose=False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Packed())
    with pytest.raises(ValueError, match="'1' is a .*Packed.*packed form"):
        lorica.attach(model, "lora", r=2, verbose=False)
    lorica.attach(model, "lora", r=2, target_modules=["0"], verbose=False)


def test_the_command_line_quantises_while_loading(tmp_path):
    from lorica.cli.eval import Options, run
    from lorica.run.finetune import train
    from lorica.run.options import TrainOptions

    folder = tmp_path / "run"
    given = {"max_steps": 2, "max_samples": 64, "eval_fraction": 0.5, "load_in_8bit": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(TrainOptions(output_dir=str(folder), method="dora", **given))
        told = lorica.formats.inspect(folder / "adapter")
        assert "int8 (bitsandbytes)" in told["base"]["dtype"]
        measured = run(Options(adapter=str(folder / "adapter"), max_samples=64, load_in_8bit=True))
        with pytest.raises(ValueError, match="can't be used in nf4 .* multiple of 64 only"):
            train(TrainOptions(output_dir=str(folder) + "4", load_in_4bit=True, max_steps=1))
    assert measured.data["metrics"]["loss"] > 0 and result["summary"]["quantised"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "give one"),
        ({"quantization": '{"quant_method": "gptq"}'}, "allowed: bitsandbytes, torchao"),
        ({"quantization": "nowhere.json"}, "there is no such file"),
        ({"quantization": "{1"}, "no JSON"),
        ({"quantization": "{}"}, "has to hold `quant_method`"),
        ({"quantization": '{"quant_method": "bitsandbytes", "load_in_4bit": 3}'}, "refuses"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        asked(**given)


def test_a_method_that_writes_is_refused_before_anything_is_loaded(folder):
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="to be loaded quantised, and `switchlora` writes"):
        check_method(Recipe.parse("switchlora"), asked(load_in_4bit=True), config, "m")


@pytest.mark.parametrize(
    ("given", "package"),
    [
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quantization": '{"quant_method": "torchao"}'}, "torchao"),
    ],
)
def test_a_package_that_is_not_installed_is_named(monkeypatch, folder, given, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    with pytest.raises(UsageError, match=f"needs the package {package}, .*`pip install {package}`"):
        asked(**given)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": package}
    with pytest.raises(UsageError, match="`m` is quantised, and needs the package"):
        check_method(Recipe.parse("lora"), None, config, "m")


def test_targets_of_a_format_that_is_not_read_are_listed(even, tmp_path):
    from lorica.cli.targets import Options, run

    config = AutoConfig.from_pretrained(even)
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    told = run(Options(model=str(tmp_path), r=4)).data
    assert told["quantization"] == "mxfp4" and told["trainable"] > 0


def test_a_start_from_what_quantisation_took_needs_a_quantised_base(folder):
    config, recipe = AutoConfig.from_pretrained(folder), Recipe.parse("loftq")
    check_method(recipe, asked(load_in_4bit=True), config, "m")
    with pytest.raises(UsageError, match="`m` is not quantised; .*--load-in-4bit"):
        check_method(recipe, None, config, "m")
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UsageError, match="`m` holds packed weights alone"):
        check_method(recipe, None, config, "m")


# -- the command line merges


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A dense model on disk all of whose layers have inputs in whole blocks."""
    path = tmp_path_factory.mktemp("even")
    models.llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(even, tmp_path_factory):
    """{format: folder of an adapter that was trained on it}."""
    made = {}
    for stored in ("nf4 with double quantisation", "int8 (bitsandbytes)"):
        adapters = lorica.attach(loaded(even, stored), "dora", r=4, verbose=False)
        perturb(adapters, 0.02)
        made[stored] = tmp_path_factory.mktemp("adapter") / "a"
        lorica.save(adapters, made[stored])
    return made


def merged_by(adapter, out, **given):
    from lorica.cli.merge import Options, run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run(Options(adapter=str(adapter), output_dir=str(out), **given))
    return outcome.data, AutoModelForCausalLM.from_pretrained(out).train(), outcome.shown[0]


def test_merging_takes_the_published_weights_where_they_are(trained, even, tmp_path):
    adapter = trained["nf4 with double quantisation"]
    data, model, said = merged_by(adapter, tmp_path / "m", load_in_4bit=True)
    assert data["way"] == "published" and not data["suspicious"]
    assert 0 < data["others"]["dequantised"]["mean_change"] < 1e-4 < data["mean_change"]
    assert "quantisation explains it; merged with the values" in said
    on_dense = dense(even)
    lorica.load(on_dense, adapter, check_base=False)
    lorica.merge(on_dense)
    batch = models.batch(model, 3)
    torch.testing.assert_close(model(**batch)["logits"], on_dense(**batch)["logits"])
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("stored", ["nf4 with double quantisation", "int8 (bitsandbytes)"])
def test_merging_into_a_dequantised_copy_is_exact(trained, tmp_path, even, stored):
    how = {"load_in_8bit": True} if "int8" in stored else {"load_in_4bit": True}
    data, model, _ = merged_by(trained[stored], tmp_path / "m", into="dequantised", **how)
    assert data["way"] == "dequantised" and not data["suspicious"] and not data["others"]
    live = loaded(even, stored)
    lorica.load(live, trained[stored])
    batch = models.batch(model, 3)
    torch.testing.assert_close(
        model(**batch)["logits"], live(**batch)["logits"], rtol=1e-4, atol=1e-4
    )
    assert not quantised(model)


def test_quantising_what_was_merged_is_refused_unless_its_change_is_accepted(
    trained, even, tmp_path
):
    adapter = trained["nf4 with double quantisation"]
    with pytest.raises(ValueError, match="quantised again changed the logits .*--accept-change"):
        merged_by(adapter, tmp_path / "m", into="quantised", load_in_4bit=True)
    assert not any(tmp_path.iterdir())
    data, model, said = merged_by(
        adapter, tmp_path / "m", into="quantised", load_in_4bit=True, accept_change=True
    )
    assert data["way"] == "quantised" and {*data["others"]} == {"published", "dequantised"}
    assert len(quantised(model)) == 14 and "MORE than rounding explains" in said


def test_a_base_that_is_stored_quantised_is_merged_into_its_values(trained, even, tmp_path):
    packed = tmp_path / "packed"
    loaded(even, "nf4 with double quantisation").save_pretrained(packed)
    adapter = trained["nf4 with double quantisation"]
    data, model, _ = merged_by(adapter, tmp_path / "m", model=str(packed))
    assert data["way"] == "dequantised" and not quantised(model)
    data, _, _ = merged_by(adapter, tmp_path / "p", model=str(packed), published=str(even))
    assert data["way"] == "published"
    for given, says in (
        ({"into": "published"}, "holds packed weights alone; name the unquantised"),
        ({"published": str(packed)}, "is quantised itself"),
        ({"load_in_4bit": True}, "is quantised already"),
        ({"into": "dequantised", "published": str(even)}, "has no effect with"),
    ):
        with pytest.raises(UsageError, match=says):
            merged_by(adapter, tmp_path / "n", model=str(packed), **given)


def test_a_merge_says_what_it_has_to_know(trained, even, tmp_path):
    adapter = trained["nf4 with double quantisation"]
    with pytest.raises(UsageError, match="say how it was.*--load-in-4bit"):
        merged_by(adapter, tmp_path / "m")
    with pytest.raises(UsageError, match="`--published` names the original"):
        merged_by(adapter, tmp_path / "m", load_in_4bit=True, published=str(even))
    on_dense = dense(even)
    adapters = lorica.attach(on_dense, "lora", r=2, verbose=False)
    perturb(adapters)
    lorica.save(adapters, tmp_path / "plain")
    with pytest.raises(UsageError, match="`--into` is about a quantised base"):
        merged_by(tmp_path / "plain", tmp_path / "m", into="dequantised")
    with pytest.raises(ValueError, match="`quantization` has no effect"):
        lorica.formats.merge_to(adapters, tmp_path / "m", quantization=FORMATS["nf4"]())


@pytest.mark.parametrize(
    "given",
    [
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"quantization": "int8 (torchao)"},
        None,
    ],
    ids=["4 bits", "8 bits", "torchao", "stored quantised"],
)
def test_targets_count_values_and_show_what_is_packed(even, tmp_path, given):
    from lorica.cli.targets import Options, run

    if given and "quantization" in given:
        fields = FORMATS[given["quantization"]]().to_json_string(use_diff=False)
        given = {"quantization": fields}
    bare = run(Options(model=str(even), r=4)).data
    folder = even
    if given is None:
        loaded(even, "nf4").save_pretrained(folder := tmp_path / "packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run(Options(model=str(folder), r=4, **(given or {})))
    told = outcome.data
    assert bare["quantization"] is None
    assert told["quantization"].startswith(("bitsandbytes (", "torchao ("))
    assert told["quantization"] in "\n".join(outcome.shown[1:])
    assert [told["parameters"], told["trainable"]] == [bare["parameters"], bare["trainable"]]
    for group, plain in zip(told["layers"], bare["layers"], strict=True):
        linear = group["role"] == "linear"
        assert group.pop("packed") == (group["count"] if linear else 0) and plain.pop("packed") == 0
        assert group == plain
    with pytest.raises(ValueError, match="`switchlora` writes to the base"):
        run(Options(model=str(folder), method="switchlora", **(given or {})))


# -- formats that transformers doesn't load here, put into a model by their own packages


def packed_by_hqq(model):
    quantize = package("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    made = {
        n: quantize.HQQLinear(m, config, compute_dtype=torch.float32, device="cpu")
        for n, m in model.named_modules()
        if n.endswith("_proj")
    }
    replace(model, made)
    return "hqq, 4 bits in groups of 32"


def packed_by_quanto(model, freeze=True):
    quanto = package("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude=["lm_head", "*norm*"])
    if freeze:
        quanto.freeze(model)
    return "qint8 (quanto)"


@pytest.mark.parametrize("pack", [packed_by_hqq, packed_by_quanto])
@pytest.mark.parametrize("method", ["lora", "pissa+dora"])
def test_other_packages_formats(pack, method, tmp_path):
    model, twin = (models.llama(hidden_size=64, intermediate_size=128) for _ in range(2))
    told = pack(model)
    for name, store in quantised(model).items():
        twin.get_submodule(name).weight.data = store.weight()
    adapters = lorica.attach(model, method, r=4, verbose=False)
    other = lorica.attach(twin, method, r=4, verbose=False)
    assert {store.format for store in quantised(model).values()} == {told}
    assert adapters.summary.quantised == {told: 14}
    assert adapters.summary.total == other.summary.total, "values are counted"
    assert adapters.summary.memory["base"] < 0.6 * other.summary.memory["base"]
    torch.testing.assert_close(
        torch.tensor(steps(adapters, 6)), torch.tensor(steps(other, 6)), rtol=1e-3, atol=1e-3
    )
    batch = models.batch(model, 3)
    live = model(**batch)["logits"].detach()
    lorica.save(adapters, tmp_path / "a")
    again = models.llama(hidden_size=64, intermediate_size=128)
    pack(again)
    lorica.load(again, tmp_path / "a")
    torch.testing.assert_close(again(**batch)["logits"].detach(), live, rtol=1e-4, atol=1e-4)
    lorica.merge(model)
    assert not quantised(model)
    torch.testing.assert_close(model(**batch)["logits"].detach(), live, rtol=1e-4, atol=1e-4)


def test_quantos_layers_that_are_quantised_at_each_call_are_refused():
    model = models.llama(hidden_size=64, intermediate_size=128)
    packed_by_quanto(model, freeze=False)
    with pytest.raises(ValueError, match="quantised anew at every call; freeze the model"):
        lorica.attach(model, "lora", r=2, verbose=False)


def test_several_formats_in_one_model(even):
    """What can't be served is named, with the reason; of the rest each is served as what it is."""
    model, other = loaded(even, "nf4"), loaded(even, "int8 (torchao)")
    into = {n: m for n, m in other.named_modules() if n.endswith("mlp.up_proj")}
    into["model.layers.0.mlp.gate_proj"] = torch.nn.Linear(64, 128, bias=False)
    replace(model, into)
    adapters = lorica.attach(model, "dora", r=4, verbose=False)
    assert adapters.summary.quantised == {"nf4": 11, "int8 (torchao)": 2} and len(adapters) == 14
    losses = steps(adapters, 4)
    assert losses[-1] < losses[0]
    lorica.detach(model)
    import bitsandbytes as bnb

    bare = bnb.nn.Linear4bit(64, 128, bias=False)
    replace(model, {"model.layers.1.mlp.gate_proj": bare})
    with pytest.raises(ValueError, match="'model.layers.1.mlp.gate_proj'.*isn't packed .* yet"):
        lorica.attach(model, "lora", r=2, verbose=False)
