"""Expert tensors: parameters (E, out, in), or (E, in, out), that hold a weight for each expert."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import lorica
from lorica.cli import main
from lorica.formats import inspect
from lorica.formats.export import export
from lorica.model.experts import AdaptedExperts, AdaptedTensor
from lorica.tensors.effective import EffectiveWeight, Term
from lorica.tensors.grouped import grouped

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def _qwen() -> PreTrainedModel:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"intermediate_size": 32, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **sizes, num_experts=4))


def _oss() -> PreTrainedModel:  # (E, in, out), with biases
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"intermediate_size": 24, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **sizes, num_local_experts=4))


def _llama4() -> PreTrainedModel:  # (E, in, out), and transformers doesn't say so
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"intermediate_size": 24, "intermediate_size_mlp": 32, "head_dim": 8}
    one = {**SMALL, "num_experts_per_tok": 1}
    config = Llama4TextConfig(**one, **sizes, num_local_experts=4, pad_token_id=0)
    return Llama4ForCausalLM(config)


def _jetmoe() -> PreTrainedModel:  # a module for each tensor
    from transformers import JetMoeConfig, JetMoeForCausalLM

    sizes = {"intermediate_size": 24, "kv_channels": 8, "num_local_experts": 4}
    return JetMoeForCausalLM(JetMoeConfig(**{k: v for k, v in SMALL.items()
                                             if k != "num_attention_heads"}, **sizes))  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": _qwen, "gpt_oss": _oss, "llama4": _llama4, "jetmoe": _jetmoe,
}  # fmt: skip
WAYS = [
    ("qwen3_moe", "eager"), ("qwen3_moe", "grouped_mm"), ("qwen3_moe", "batched_mm"),
    ("gpt_oss", "eager"), ("gpt_oss", "grouped_mm"), ("gpt_oss", "batched_mm"),
    ("llama4", None), ("jetmoe", None),
]  # fmt: skip
IDS = torch.arange(18).view(2, 9) * 7 % 64


def build(family: str, way: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for p in model.parameters():
        if p.ndim == 3:
            nn.init.normal_(p, std=0.3)
    if way is not None:
        model.set_experts_implementation(way)
    return model.eval()


def adapted(
    family: str, method: str | lorica.Recipe, way: str | None = None, **fields: object
) -> lorica.Adapters:
    fields = {"r": 3, **fields} if isinstance(method, str) else fields
    adapters = lorica.attach(build(family, way), method, verbose=False, **fields)
    torch.manual_seed(1)
    for _, layer in adapters:
        if (pair := layer.update.delta.pair()) is not None:
            nn.init.normal_(pair.B, std=0.3)
    return adapters


def stacks(adapters: lorica.Adapters) -> dict[str, AdaptedTensor]:
    return {n: x for n, x in adapters if isinstance(x, AdaptedTensor)}


@pytest.mark.parametrize("method", ["lora", "dora", "olora", "dora(detach=False)"])
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_products_are_those_of_the_effective_weight(
    family: str, way: str | None, method: str
) -> None:
    """Logits, and gradients of every factor, are those of a plain model with W' in W's place."""
    adapters = adapted(family, method, way)
    model, found = adapters.model, stacks(adapters)
    assert found
    logits = model(IDS).logits
    logits.square().mean().backward()
    trained = {t.name: t.parameter for t in adapters.trained()}
    got = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    model.zero_grad()

    weights: dict[str, Tensor] = {}
    for site, layer in found.items():
        weight, _ = layer.effective()
        weight = weight.mT if layer.store.transposed else weight
        weights[f"{layer.place}.base.{layer.leaf}"] = weight
        layer.disabled = True
        assert site == f"{layer.place}.{layer.leaf}"
    wanted = torch.func.functional_call(model, weights, (IDS,)).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    wanted.square().mean().backward()
    for name, p in trained.items():
        if p.grad is not None and "experts" in name:
            torch.testing.assert_close(got[name], p.grad, rtol=2e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attach_save_load_merge_detach(family: str, method: str, tmp_path: Path) -> None:
    model = build(family)
    before = model(IDS).logits.detach()
    state = {n: p.clone() for n, p in model.state_dict().items()}
    fresh = lorica.attach(model, method, r=3, verbose=False)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    lorica.detach(model)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert fresh.released == "detach"

    adapters = adapted(family, method)
    live = adapters.model(IDS).logits.detach()
    assert (live - before).abs().max() > 1e-2
    with adapters.disabled():
        torch.testing.assert_close(adapters.model(IDS).logits, before)
    out = lorica.save(adapters, tmp_path / "out")
    again = build(family)
    lorica.load(again, out)
    assert torch.equal(again(IDS).logits, live)
    merged = lorica.merge(adapters.model)
    assert not any(isinstance(m, AdaptedExperts) for m in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, live, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    read = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(read(IDS).logits, live, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_peft_there_and_back(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for method in ("lora", "olora"):
        adapters = adapted(family, method)
        live = adapters.model(IDS).logits.detach()
        out = lorica.save(adapters, tmp_path / method)
        config = json.loads((out / "adapter_config.json").read_text())
        assert set(config["target_parameters"]) == set(stacks(adapters))
        read = peft.PeftModel.from_pretrained(build(family), out)
        torch.testing.assert_close(read(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-5)
        cut = export(adapters, tmp_path / f"{method}-cut", r=2)
        read = peft.PeftModel.from_pretrained(build(family), cut.path)
        assert cut.logits is not None and cut.r == 2

    model = build(family)
    names = sorted({".".join(n.split(".")[-2:]) for n in stacks(adapters)})
    linear = next(n for n in adapters.layers if n not in stacks(adapters)).rpartition(".")[2]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[linear], target_parameters=names,
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    live = theirs(input_ids=IDS).logits.detach()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build(family)
    lorica.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_inspect(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = adapted("qwen3_moe", method)
    out = lorica.save(adapters, tmp_path / "out")
    assert main(["inspect", str(out)]) == 0
    assert "4 x 48 x 16" in capsys.readouterr().out
    norms = [d["norm"] for d in inspect(out)["layers"].values() if len(d["shape"]) == 3]
    assert len(norms) == 4
    if method == "lora":
        found = [x.update.weight(x.store).norm().item() for x in stacks(adapters).values()]
        assert sorted(norms) == pytest.approx(sorted(found), rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_ten_steps_are_those_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=names,
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(build("qwen3_moe"), config)
    theirs.save_pretrained(tmp_path / "start")
    ours = build("qwen3_moe")
    adapters = lorica.load(ours, tmp_path / "start")

    def train(model: nn.Module) -> list[float]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.SGD(parameters, lr=0.3), []
        for _ in range(10):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert train(ours) == pytest.approx(train(theirs), rel=1e-4)
    assert len(stacks(adapters)) == 4


def test_only_routed_rows_are_paid_for() -> None:
    """The update of E experts costs k·(in + out) multiplies for each routed row, whatever E is."""
    fields = {"target_modules": (), "target_parameters": ("down_proj",)}

    def flops(adapters: lorica.Adapters) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            adapters.model(IDS)
        return counter.get_total_flops()

    adapters = adapted("qwen3_moe", "lora+factored", "eager", **fields)
    live = flops(adapters)
    with adapters.disabled():
        frozen = flops(adapters)
    rows = IDS.numel() * 2 * 2  # two experts for each token, in two layers
    assert live - frozen == rows * 2 * 3 * (24 + 16)
    one = adapted("qwen3_moe", "lora", "eager", **fields)
    assert flops(one) <= live  # the order that multiplies least


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
def test_half_precision_autocast_and_checkpointing() -> None:
    model = build("qwen3_moe").bfloat16()
    adapters = lorica.attach(model, "dora", r=3, verbose=False)
    for p in (t.parameter for t in adapters.trained()):
        assert p.dtype is torch.float32
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(IDS, labels=IDS).loss.backward()
    first = {t.name: t.parameter.grad.clone() for t in adapters.trained()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(IDS, labels=IDS).loss.backward()
    for t in adapters.trained():
        torch.testing.assert_close(t.parameter.grad, first[t.name])
    other = adapted("qwen3_moe", "lora")
    wanted = other.model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = other.model(IDS).logits.float()  # rounding routes a token or two elsewhere
    assert (got - wanted).abs().median() < 0.05


def test_dropout_falls_on_the_update_alone() -> None:
    plain = build("qwen3_moe").train()
    wanted = plain(IDS).logits
    adapters = lorica.attach(build("qwen3_moe"), "olora", r=3, lora_dropout=0.5, verbose=False)
    adapters.model.train()  # the start is dropped with what takes it out again
    torch.testing.assert_close(adapters.model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    for layer in stacks(adapters).values():
        nn.init.normal_(layer.update.delta.pair().B, std=0.3)
    one, two = adapters.model(IDS).logits, adapters.model(IDS).logits
    assert not torch.equal(one, two)


def test_which_are_adapted() -> None:
    model = build("jetmoe")
    adapters = lorica.attach(model, r=3, verbose=False)
    routers = [n for n, why in adapters.summary.left_out.items() if "router" in why]
    assert len(routers) == 4 and not any("router" in n for n in adapters.layers)
    lorica.detach(model)
    some = lorica.attach(
        build("qwen3_moe"), r=3, target_modules=["q_proj"], verbose=False,
        target_parameters=["down_proj"], layers_to_transform=[1],
    )  # fmt: skip
    assert [*stacks(some)] == ["model.layers.1.mlp.experts.down_proj"]
    named = lorica.attach(build("qwen3_moe"), r=3, target_modules=["q_proj"], verbose=False)
    assert not stacks(named)
    without = lorica.attach(build("qwen3_moe"), r=3, exclude_modules=["experts"], verbose=False)
    assert not stacks(without)
    none = lorica.attach(build("qwen3_moe"), r=3, target_parameters=[], verbose=False)
    assert not stacks(none)


@pytest.mark.parametrize(
    ("method", "fields", "wanted"),
    [
        ("lora", {"target_parameters": ["down"]}, "matches no expert tensor"),
        ("lora", {"target_parameters": ["q_proj.weight"]}, "is named in `target_modules`"),
        ("lora", {"target_modules": ["down_proj"]}, "no module; name it in `target_parameters`"),
        ("lora", {"target_modules": ["experts"]}, "gate_up_proj, down_proj. are named in"),
        ("switchlora", {"target_parameters": ["down_proj"]}, "works on single matrices"),
        ("full", {"target_parameters": ["down_proj"]}, "no effect"),
        ("dora(dropout='authors')", {"target_parameters": ["down_proj"]}, "`dora` works on"),
        (
            "lora",
            {"target_parameters": ["down_proj"], "exclude_modules": ["experts"]},
            "has no effect, since `exclude_modules`",
        ),
    ],
)
def test_what_is_refused(method: str, fields: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        lorica.attach(build("qwen3_moe"), method, r=3, verbose=False, **fields)


def test_a_method_of_single_matrices_leaves_them_out() -> None:
    adapters = lorica.attach(build("qwen3_moe"), "adalora", verbose=False)
    assert not stacks(adapters)
    reasons = {why for n, why in adapters.summary.left_out.items() if "experts" in n}
    assert reasons == {"`svd` works on single matrices, not on stacks of experts' weights"}


def test_idle_experts_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    adapters = lorica.attach(build("qwen3_moe", "eager"), r=3, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=3)
    one = torch.full((1, 3), 5)
    with caplog.at_level(logging.INFO, logger="lorica"):
        for _ in range(3):
            adapters.model(one, labels=one).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    told = [r.getMessage() for r in caplog.records if "no token was routed" in r.getMessage()]
    assert len(told) == 1 and "of 4 experts" in told[0]
    assert all(layer.routed is None for layer in stacks(adapters).values())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at every tensor
def test_compiled_forward_computes_the_same() -> None:
    adapters = adapted("qwen3_moe", "dora", "eager")
    experts = adapters.model.get_submodule("model.layers.0.mlp.experts")
    x = torch.randn(6, 16)
    index, weights = torch.tensor([[0, 1], [2, 3]] * 3), torch.rand(6, 2)
    wanted = experts(x, index, weights)
    got = torch.compile(experts, backend="eager")(x, index, weights)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(2, 3, 1), (0, 4, 0), (6, 0, 0), (1, 0, 2)])
def test_the_grouped_product_and_its_gradients(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((6, 4), (3, 5, 4), (3, 2, 4),
                                                                (3, 5, 2)))  # fmt: skip
    y = grouped(x, W, A, B, counts)
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    for i in range(6):
        wanted = torch.zeros(5, dtype=torch.float64)
        if i < len(rows):
            wanted = (W + B @ A)[rows[i]] @ x[i]
        torch.testing.assert_close(y[i], wanted)
    inputs = (x.requires_grad_(), A.requires_grad_(), B.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, A, B: grouped(x, W, A, B, counts), inputs)


class TestEffectiveWeight:
    """Whatever is done with it, it counts as the sum."""

    @pytest.fixture(params=["plain", "rows", "columns"])
    def pair(self, request: pytest.FixtureRequest) -> tuple[EffectiveWeight, Tensor]:
        torch.manual_seed(0)
        W, left, right = (torch.randn(s, dtype=torch.float64)
                          for s in ((3, 5, 4), (3, 5, 2), (3, 2, 4)))  # fmt: skip
        on_rows = request.param == "rows"
        gain = None
        if request.param != "plain":
            gain = torch.rand(3, 5 if on_rows else 4, dtype=torch.float64)
        weight = EffectiveWeight.of(W, (Term(left, right),), gain, on_rows=on_rows)
        return weight, weight.formed()

    @pytest.mark.parametrize(
        "use",
        [
            lambda w, x: F.linear(x(6, 4), w[1]),
            lambda w, x: F.linear(x(6, 5), w[torch.tensor(2)].T),
            lambda w, x: x(6, 5) @ w[0],
            lambda w, x: x(3, 6, 5) @ w,
            lambda w, x: torch.bmm(x(3, 6, 4), w.transpose(1, 2)),
            lambda w, x: torch.bmm(w, x(3, 4, 2)),
            lambda w, x: torch.bmm(w[torch.tensor([2, 0])], x(2, 4, 1)),
            lambda w, x: w.mT @ x(3, 5, 2),
            lambda w, x: w[0] @ x(4),
            lambda w, x: w[:2].sum(0),
            lambda w, x: torch.einsum("nq,epq->enp", x(6, 4), w),
            lambda w, x: w + 1,
            lambda w, x: torch.ops.transformers.grouped_mm_fallback(
                x(6, 5), w, torch.tensor([2, 2, 6], dtype=torch.int32)
            ),
            lambda w, x: torch.cat([w, w]).shape,
        ],
    )
    def test_a_use(self, pair: tuple[EffectiveWeight, Tensor], use: Callable[..., object]) -> None:
        weight, formed = pair

        def x(*shape: int) -> Tensor:
            generator = torch.Generator().manual_seed(1)
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        torch.testing.assert_close(use(weight, x), use(formed, x))

    def test_dropout_needs_a_product(self) -> None:
        W = torch.randn(2, 3, 4)
        term = Term(torch.randn(2, 3, 1), torch.randn(2, 1, 4), lambda x: x)
        weight = EffectiveWeight.of(W, (term,), None, on_rows=True)
        with pytest.raises(ValueError, match="lora_dropout=0"):
            weight.sum()
