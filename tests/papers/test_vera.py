"""VeRA, arXiv 2310.11454: its equations, what follows, and PEFT's VERA."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lorica
from lorica.methods.deltas.vera import Vera, VeraDelta
from lorica.tensors.shared import SharedTensors
from models import MODELS, batch, gpt2, llama, logits, perturb, train
from reference import vera as twin

SHAPES = [(7, 5), (4, 7), (6, 4)]  # (out, in) of the layers, one after the other
R, LR = 9, 0.05  # above every layer's size


def chain(method="vera", r=R, **fields):
    """Three layers of unequal shapes in a row, adapted."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, m, dtype=torch.float64) for m, n in SHAPES))
    return lorica.attach(model, method, r=r, verbose=False, **fields)


def vectors(adapters):
    """(λ_b, λ_d) of each layer."""
    deltas = [layer.update.delta for _, layer in adapters]
    return [(d.lambda_b, d.lambda_d) for d in deltas]


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(11, SHAPES[0][1], generator=generator, dtype=torch.float64)
    return x, torch.randn(11, SHAPES[-1][0], generator=generator, dtype=torch.float64)


# -- the equations ---------------------------------------------------------------------------------


def test_one_pair_is_drawn_for_the_whole_model_from_the_key_alone():
    for key in (0, 5):
        A, B = twin.pair(SHAPES, R, key)
        for seed in (0, 1):
            state = chain(f"vera(projection_prng_key={key})", seed=seed).state_dict()
            assert torch.equal(state["shared.A"].double(), A)
            assert torch.equal(state["shared.B"].double(), B)
    assert A.abs().max() <= (6 / 7) ** 0.5 and B.abs().max() <= (6 / R) ** 0.5
    for name in "AB":
        held = [layer.update.delta.read_shared(name) for _, layer in chain()]
        assert all(t is held[0] and not t.requires_grad for t in held)


def test_the_weight_equals_the_twin():
    adapters = chain()
    perturb(adapters, 0.7)
    A, B = twin.pair(SHAPES, R)
    for (m, n), (b, d), (_, layer) in zip(SHAPES, vectors(adapters), adapters, strict=True):
        weight = twin.weight(A, B, b, d, n)
        assert weight.shape == (m, n)
        delta, x = layer.update.delta, torch.randn(4, n, dtype=torch.float64)
        torch.testing.assert_close(delta.weight(layer.store), weight)
        torch.testing.assert_close(delta.factors().weight(), weight)
        torch.testing.assert_close(delta(x, layer.store), x @ weight.T)


def test_the_gradients_are_the_closed_forms():
    adapters = chain()
    perturb(adapters, 0.7)
    A, B = twin.pair(SHAPES, R)
    x, goal = data()
    seen = {}
    for name, layer in adapters:
        layer.register_forward_hook(lambda m, i, y, name=name: seen.update({name: (i[0], y)}))
    loss = (adapters.model(x) - goal).square().sum()
    held = list(seen.values())
    of_y = torch.autograd.grad(loss, [y for _, y in held], retain_graph=True)
    loss.backward()
    for (inputs, _), dy, (b, d) in zip(held, of_y, vectors(adapters), strict=True):
        G = dy.T @ inputs.detach()
        of_b, of_d = twin.gradients(G, A, B, b.detach(), d.detach())
        torch.testing.assert_close(b.grad, of_b)
        torch.testing.assert_close(d.grad, of_d)
        rows = twin.weight(A, B, torch.ones_like(b), d, G.shape[1]).detach()  # B diag(λ_d) A
        torch.testing.assert_close(b.grad, (G * rows).sum(1))


def test_the_first_gradient_goes_to_lambda_b_alone():
    adapters = chain()
    x, goal = data()
    (adapters.model(x) - goal).square().sum().backward()
    for b, d in vectors(adapters):
        assert b.grad.abs().min() > 0 and not d.grad.any()


# -- trajectories, and what has to make them differ ------------------------------------------------


def trajectory(adapters, steps=12):
    """Training by AdamW; all vectors after every step."""
    optimizer = lorica.optimizer(adapters, lr=LR)
    x, goal = data()
    out = []
    for _ in range(steps):
        optimizer.zero_grad()
        (adapters.model(x) - goal).square().mean().backward()
        optimizer.step()
        out.append(torch.cat([v.detach().clone() for both in vectors(adapters) for v in both]))
    return torch.stack(out)


def twins_trajectory(adapters, steps=12):
    """The same by the equations: forward, backward and AdamW by hand."""
    A, B = twin.pair(SHAPES, R)
    bases = [layer.base for _, layer in adapters]
    own = [
        (torch.zeros(m, dtype=torch.float64), torch.full((R,), 0.1, dtype=torch.float64))
        for m, _ in SHAPES
    ]
    rule, out = twin.AdamW(LR), []
    h0, goal = data()
    for _ in range(steps):
        hidden, weights = [h0], []
        for base, (b, d), (_, n) in zip(bases, own, SHAPES, strict=True):
            weights.append(base.weight.detach() + twin.weight(A, B, b, d, n))
            hidden.append(hidden[-1] @ weights[-1].T + base.bias.detach())
        dy = 2 * (hidden[-1] - goal) / goal.numel()
        gradients = []
        for i in reversed(range(len(own))):
            gradients.insert(0, twin.gradients(dy.T @ hidden[i], A, B, *own[i]))
            dy = dy @ weights[i]
        rule.step([v for both in own for v in both], [g for both in gradients for g in both])
        out.append(torch.cat([v.clone() for both in own for v in both]))
    return torch.stack(out)


def test_training_equals_the_twin_across_layers_of_unequal_shapes():
    adapters = chain()
    want = twins_trajectory(adapters)
    torch.testing.assert_close(trajectory(adapters), want, rtol=1e-9, atol=1e-11)
    assert (want[-1] - want[0]).abs().max() > 0.1


def a_pair_for_each_layer(adapters, monkeypatch):
    for key, (_, layer) in enumerate(adapters):
        own = SharedTensors(dict(zip("AB", twin.pair(SHAPES, R, key), strict=True)))
        layer.update.delta.shared_tensors = own


def the_pairs_other_end(adapters, monkeypatch):
    monkeypatch.setattr(
        VeraDelta, "_right", lambda self: self.read_shared("A")[:, -self.site.in_features :]
    )


def vectors_exchanged(adapters, monkeypatch):
    """λ_d scales the rows of A before λ_b's place: a start at λ_b = 0.1, λ_d = 0."""
    for b, d in vectors(adapters):
        b.data.fill_(0.1)
        d.data.zero_()


def another_scale(adapters, monkeypatch):
    inner = VeraDelta._left
    monkeypatch.setattr(VeraDelta, "_left", lambda self: 1.01 * inner(self))


def another_key(adapters, monkeypatch):
    for name, t in zip("AB", twin.pair(SHAPES, R, 1), strict=True):
        adapters.shared.write(name, t)


@pytest.mark.parametrize(
    "fault",
    [a_pair_for_each_layer, the_pairs_other_end, vectors_exchanged, another_scale, another_key],
)
def test_a_planted_fault_leaves_the_twins_trajectory(fault, monkeypatch):
    adapters = chain()
    want = twins_trajectory(adapters)
    fault(adapters, monkeypatch)
    assert (trajectory(adapters) - want).abs().max() > 1e-4


# -- what follows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_and_out_plus_r_parameters_train(name):
    model = MODELS[name]()
    before = logits(model)
    adapters = lorica.attach(model, "vera", verbose=False)
    assert torch.equal(logits(model), before)
    assert adapters.recipe.r == 256 and adapters.recipe.learning_rate == (4e-3, "vera")
    want = sum(layer.out_features + 256 for _, layer in adapters)
    head = sum(t.parameter.numel() for t in adapters.trained() if t.role == "module")
    assert head == (3 * 32 + 3 if name == "bert" else 0)  # a classifier's head trains in full
    assert sum(t.parameter.numel() for t in adapters.trained()) == want + head
    assert adapters.summary.trainable == want + head


def test_a_width_above_the_layers_size_is_no_error():
    model = llama(hidden_size=64)
    adapters = lorica.attach(model, "vera", r=256, verbose=False)
    perturb(adapters)
    weight = adapters.layers["model.layers.0.self_attn.q_proj"].update.delta.weight(None)
    assert torch.linalg.matrix_rank(weight) == 64


def test_the_rank_is_at_most_r():
    adapters = chain(r=2)
    perturb(adapters, 0.7)
    for _, layer in adapters:
        assert torch.linalg.matrix_rank(layer.update.delta.weight(None)) == 2


def test_layers_of_different_ranks_read_the_same_pair_from_its_first_row_on():
    adapters = chain(r=4, rank_pattern={"1": 9})
    perturb(adapters, 0.7)
    state = adapters.state_dict()
    A, B = state["shared.A"].double(), state["shared.B"].double()
    assert A.shape == (9, 7) and B.shape == (7, 9)
    for (_, n), (b, d), (_, layer) in zip(SHAPES, vectors(adapters), adapters, strict=True):
        want = twin.weight(A, B, b, d, n)
        torch.testing.assert_close(layer.update.delta.weight(None), want)
    assert [len(d) for _, d in vectors(adapters)] == [4, 9, 4]


@pytest.mark.parametrize("method", ["vera", "dora+vera", "relora(every=2)+vera"])
def test_a_saved_run_resumes_bit_for_bit_and_merges(method, tmp_path):
    def begin():
        adapters = lorica.attach(llama().double(), method, r=40, dtype=torch.float64, verbose=False)
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=6)

    adapters, optimizer = begin()
    train(adapters, optimizer, 3)
    middle = copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))
    train(adapters, optimizer, 3, first=3)
    resumed, again = begin()
    resumed.load_state_dict(middle[0])
    again.load_state_dict(middle[1])
    train(resumed, again, 3, first=3)
    assert resumed.fingerprint() == adapters.fingerprint()
    said = logits(adapters.model)
    if adapters.base_unchanged:
        out = lorica.save(adapters, tmp_path / "out")
        loaded = lorica.load(llama().double(), out)
        assert loaded.fingerprint() == adapters.fingerprint()
        torch.testing.assert_close(logits(loaded.model), said, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(lorica.merge(adapters.model)), said, rtol=0, atol=1e-9)


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("method", ["vera", "dora+vera"])
def test_each_layer_may_be_a_unit_of_fsdp2(mesh, method):
    x, goal = data()
    ends = []
    for shard in (False, True):
        adapters = chain(method)
        for module in (*adapters.model, adapters.model) if shard else ():
            fully_shard(module, mesh=mesh)
        assert isinstance(vectors(adapters)[0][0], DTensor) == shard
        optimizer = lorica.optimizer(adapters, lr=LR)
        for _ in range(4):
            optimizer.zero_grad()
            (adapters.model(x) - goal).square().mean().backward()
            optimizer.step()
        ends.append(adapters.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-12)


def test_backward_keeps_nothing_as_wide_as_the_output():
    """x Aᵀ (tokens, r) alone, whatever the layer's size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64))
    layer = lorica.attach(model, "vera", r=4, verbose=False).layers["0"]
    x, kept = torch.randn(100, 48), []

    def keep(t):
        kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer.update.delta(x, layer.store)
    assert [s for s in kept if s[0] == 100 and tuple(s) != (100, 48)] == [(100, 4)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("d_initial=0", "a number other than 0"),
        ("d_initial='0.1'", "a number other than 0"),
        ("projection_prng_key=-1", "a whole number of at least 0"),
        ("projection_prng_key=True", "a whole number of at least 0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, text):
    with pytest.raises(ValueError, match=text):
        lorica.Recipe.parse(f"vera({arguments})")


def test_there_is_no_scale_and_no_start_to_choose():
    with pytest.raises(ValueError, match="`lora_alpha=8` has no effect"):
        lorica.Recipe.parse("vera", lora_alpha=8)
    with pytest.raises(ValueError, match="`vera` fills the axis `scale`"):
        lorica.Recipe.parse("vera+rslora")
    with pytest.raises(ValueError, match="`pissa` needs `pair`"):
        lorica.Recipe.parse("vera+pissa")
    assert lorica.Recipe.parse("vera").text() == "vera"
    assert Vera(d_initial=0.5).text() == "vera(d_initial=0.5)"


# -- PEFT ------------------------------------------------------------------------------------------

TARGETS = {
    llama: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    gpt2: ["c_attn", "c_fc", "mlp.c_proj"],  # stored as (in, out), c_attn of several outputs
}


def both(dtype=torch.float64, key=0, d_initial=0.1, r=24, make=llama, **peft):
    """The same base under our adapters and under PEFT's, each at its own start."""
    base, targets = make().to(dtype), TARGETS[make]
    method = f"vera(d_initial={d_initial}, projection_prng_key={key})"
    ours = lorica.attach(
        copy.deepcopy(base), method, r=r, target_modules=targets, dtype=dtype, verbose=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = VeraConfig(
            r=r, target_modules=targets, projection_prng_key=key, d_initial=d_initial, **peft
        )
        theirs = get_peft_model(base, config).to(dtype)
    return ours, theirs


def matched(ours, theirs):
    out = []
    for name, layer in ours:
        other = theirs.base_model.model.get_submodule(name)
        out.append((layer.update.delta.lambda_b, other.vera_lambda_b["default"]))
        out.append((layer.update.delta.lambda_d, other.vera_lambda_d["default"]))
    return out


@pytest.mark.parametrize(
    ("make", "key", "d_initial"), [(llama, 0, 0.1), (llama, 7, 0.5), (gpt2, 0, 0.1)]
)
def test_pefts_pair_logits_and_ten_steps_are_the_same(make, key, d_initial):
    ours, theirs = both(key=key, d_initial=d_initial, make=make)
    shared = ours.state_dict()
    for name in "AB":
        other = getattr(theirs.base_model, f"vera_{name}")["default"]
        assert torch.equal(shared[f"shared.{name}"].to(other.dtype), other), name
    pairs = matched(ours, theirs)
    with torch.no_grad():
        for mine, other in pairs:
            assert torch.equal(mine.float(), other.float()), "PEFT's vectors begin in float32"
            other.copy_(mine)
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    mine = lorica.optimizer(ours, lr=1e-2)
    other = torch.optim.AdamW([p for _, p in pairs], lr=1e-2, weight_decay=0.0)
    for step in range(10):
        inputs = batch(ours.model, seed=step)
        for model, optimizer in ((ours.model, mine), (theirs, other)):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(logits(ours.model), logits(theirs), rtol=1e-7, atol=1e-8)
    assert max(b.abs().max() for b, _ in pairs[::2]) > 0.05


def written_by_peft(folder, **peft):
    """An adapter of PEFT's with vectors away from their start, and its logits."""
    _, theirs = both(torch.float32, **peft)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "vera_lambda" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
    return logits(theirs.eval())


@pytest.mark.parametrize(
    ("make", "key", "save_projection"),
    [(llama, 0, True), (llama, 7, False), (gpt2, 0, True), (gpt2, 7, False)],
)
def test_an_adapter_of_pefts_is_read(make, key, save_projection, tmp_path):
    """Without A and B in the file they are drawn again from its key."""
    said = written_by_peft(tmp_path, key=key, save_projection=save_projection, make=make)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (make is gpt2)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert ("base_model.vera_A" in held) == save_projection
    model = make()
    adapters = lorica.load(model, tmp_path)
    assert adapters.recipe.text() == ("vera" if key == 0 else "vera(projection_prng_key=7)")
    assert adapters.recipe.r == 24
    torch.testing.assert_close(logits(model), said, rtol=1e-5, atol=1e-5)
    if save_projection:
        assert torch.equal(adapters.state_dict()["shared.A"], held["base_model.vera_A"])


def test_what_pefts_file_holds_comes_before_its_key(tmp_path):
    """PEFT computes with the file's pair, whatever the generator of another version would draw."""
    written_by_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    held["base_model.vera_A"] *= 2
    save_file(held, file)
    adapters = lorica.load(llama(), tmp_path)
    assert torch.equal(adapters.state_dict()["shared.A"], held["base_model.vera_A"])


@pytest.mark.parametrize("lost", ["base_model.vera_A", "base_model.vera_B"])
def test_a_pair_that_is_missing_though_it_was_saved_is_an_error(lost, tmp_path):
    written_by_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != lost}, file)
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        lorica.load(llama(), tmp_path)


@pytest.mark.parametrize(("field", "value"), [("d_initial", 0), ("projection_prng_key", -1)])
def test_a_configuration_that_is_not_ours_is_refused(field, value, tmp_path):
    written_by_peft(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ValueError, match="a VERA adapter with .* is not known here"):
        lorica.load(llama(), tmp_path)


@pytest.mark.parametrize(
    ("make", "fields"),
    [(llama, {}), (llama, {"bias": "all"}), (llama, {"bias": "lora_only"}), (gpt2, {})],
)
def test_peft_reads_ours_with_the_pair_stored_once(make, fields, tmp_path):
    base = llama(attention_bias=True) if make is llama else make()
    ours = lorica.attach(
        copy.deepcopy(base), "vera(projection_prng_key=3)", r=24, target_modules=TARGETS[make],
        lora_dropout=0.1, verbose=False, **fields,
    )  # fmt: skip
    perturb(ours)
    out = lorica.save(ours, tmp_path / "out")
    assert {f.name for f in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorica.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["vera_dropout"]) == ("VERA", 24, 0.1)
    held = load_file(out / "adapter_model.safetensors")
    state = ours.state_dict()
    assert sum(t.numel() for t in held.values()) == sum(t.numel() for t in state.values())
    said = logits(ours.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), out)
    torch.testing.assert_close(logits(theirs.eval()), said, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), said, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(base)
    assert lorica.load(again, out).fingerprint() == ours.fingerprint()
    assert torch.equal(logits(again), said)


@pytest.mark.parametrize(
    ("method", "family"), [("dora+vera", "llama"), ("relora(every=2)+vera", "t5")]
)
def test_where_pefts_type_is_not_exact_another_form_is(method, family, tmp_path):
    model = MODELS[family]()
    base = copy.deepcopy(model)
    ours = lorica.attach(model, method, r=40, verbose=False)
    perturb(ours)
    out = lorica.save(ours, tmp_path / "out")
    config = out / "adapter_config.json"
    kind = json.loads(config.read_text())["peft_type"] if config.exists() else None
    assert kind == (None if "relora" in method else "LORA")
    said = logits(model)
    again = copy.deepcopy(base)
    assert lorica.load(again, out).fingerprint() == ours.fingerprint()
    torch.testing.assert_close(logits(again), said, rtol=0, atol=1e-5)
    if kind is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PeftModel.from_pretrained(base, out).eval()
        torch.testing.assert_close(logits(theirs), said, rtol=2e-4, atol=2e-4)
