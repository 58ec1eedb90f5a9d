"""What lies around a layer: default devices, several devices, offloading, transforms of functions,
policies of checkpointing, rounded products, gradient scalers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lorica
from lorica import Adapters
from lorica.methods.kernels.base import Call, Order, Table, choose, measured
from lorica.model.layer import AdaptedLinear
from lorica.model.modules_to_save import TrainedModule
from lorica.tensors.dtensor_ops import reduce_scalar
from models import batch, llama, perturb

METHODS = ["lora", "dora", "dora+factored", "lora+materialised"]


def net(method: str, *, width: int = 12, depth: int = 2, bias: bool = False, **fields: Any):
    torch.manual_seed(0)
    dtype = fields.pop("dtype", torch.float64)
    layers = [nn.Linear(width, width, bias=bias, dtype=dtype) for _ in range(depth)]
    adapters = lorica.attach(nn.Sequential(*layers), method, r=3, verbose=False, **fields)
    perturb(adapters)
    adapters.model.train()
    return adapters


def gradients(adapters: Any, call: Any, x: torch.Tensor) -> list[torch.Tensor]:
    loss = call(x).square().sum()
    return list(torch.autograd.grad(loss, [t.parameter for t in adapters.trained()]))


# -- policies of selective checkpointing -----------------------------------------------------------

SAVED = [
    (torch.ops.aten.mm.default,),
    (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mul.Tensor),
]


@pytest.mark.parametrize("saved", SAVED, ids=["mm", "more"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_may_keep_any_result(method, tokens, bias, saved):
    adapters = net(method, bias=bias)
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    want = gradients(adapters, adapters.model, x)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in saved
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        context = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(adapters.model, x, use_reentrant=False, context_fn=context)

    for got, wanted in zip(gradients(adapters, checkpointed, x), want, strict=True):
        torch.testing.assert_close(got, wanted)


# -- transforms of functions -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("method", METHODS)
def test_transforms_see_through_a_layer(method):
    adapters = net(method)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(adapters.model)(x), adapters.model(x))
    named = {t.name: t.parameter for t in adapters.trained()}

    def loss(parameters: Any) -> torch.Tensor:
        return torch.func.functional_call(adapters.model, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(named)
    want = gradients(adapters, adapters.model, x)
    for one, other in zip(got.values(), want, strict=True):
        torch.testing.assert_close(one, other)
    ones = {n: torch.ones_like(p) for n, p in named.items()}
    slope = torch.func.jvp(loss, (named,), (ones,))[1]
    torch.testing.assert_close(slope, torch.stack([g.sum() for g in want]).sum())


def test_a_transform_draws_its_own_dropout():
    adapters = net("lora", lora_dropout=0.5)
    x = torch.ones(64, 12, dtype=torch.float64)
    rows = torch.func.vmap(adapters.model, randomness="different")(x)
    assert rows.unique(dim=0).shape[0] > 32, "each row has a mask of its own"


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("method", ["lora", "dora+pissa"])
def test_a_default_device_changes_nothing(method, p):
    x = torch.randn(5, 12, dtype=torch.float64)

    def run() -> torch.Tensor:
        adapters = net(method, lora_dropout=p)
        torch.manual_seed(1)
        return adapters.model(x)

    want = run()
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(12, 12, False, dtype=torch.float64) for _ in range(2)))
    with torch.device("meta"):
        adapters = lorica.attach(base, method, r=3, lora_dropout=p, verbose=False)
    perturb(adapters)
    base.train()
    torch.manual_seed(1)
    with torch.device("meta"):
        got = base(x)
        optimizer = lorica.optimizer(adapters, total_steps=3)
        got.sum().backward()
        optimizer.step()
    assert torch.equal(got, want)


def test_sums_of_squares_come_from_several_devices():
    with FakeTensorMode():
        values = [torch.ones(2), torch.ones(3, device="cuda"), torch.ones(2, device="cuda")]
        with pytest.raises(DataDependentOutputException):  # at the end, as numbers: none are there
            reduce_scalar(values)
    assert reduce_scalar([torch.ones(2), 2 * torch.ones(3)]) == [2.0, 12.0]


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the weight of '0' is offloaded.*without offloading"):
        lorica.attach(model, "lora", r=2, verbose=False)


# -- precision -------------------------------------------------------------------------------------


def test_where_products_are_rounded_no_update_is_added_to_the_weight():
    big = Call(tokens=4096, in_features=64, out_features=64, r=4)
    assert choose(big).forward_sum and choose(Call(**{**vars(big), "exact": False})) == Order()
    wide = Call(**{**vars(big), "exact": False, "dtype": torch.float64})
    assert choose(wide).forward_sum, "float64 is not rounded"
    seen = []
    adapters = net("lora", dtype=torch.float32)
    layer = next(iter(adapters.layers.values()))
    kernel = layer.kernel
    object.__setattr__(kernel, "order", lambda call: seen.append(call.exact) or choose(call))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            adapters.model(torch.randn(50, 12))
    finally:
        torch.set_float32_matmul_precision(before)
        object.__delattr__(kernel, "order")
    assert seen[:2] == [True, True] and not any(seen[2:]), seen


@pytest.mark.parametrize("kernel", ["auto", "auto(saves='nothing')", "auto(saves='product')",
                                    "reference"])  # fmt: skip
def test_a_magnitudes_gradient_does_not_overflow_in_float16(kernel):
    adapters = net(f"dora+{kernel}", depth=1, dtype=torch.float16)
    x = torch.randn(600, 12).half()
    dy = torch.full((600, 12), 600.0).half()
    m = next(t.parameter for t in adapters.trained() if t.role == "magnitude")
    adapters.model(x)
    y = adapters.model(40 * x)  # dY ∘ y is beyond 65,504 here and there, and so are its sums
    (got,) = torch.autograd.grad(y, m, dy)
    layer = next(iter(adapters.layers.values()))
    with torch.no_grad():
        want = (dy.double() * y.double()).sum(0) / m.double()
    assert want.abs().max() > 65504 and got.isfinite().all() and layer.combine.m is m
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e3)


# -- what is not needed is not computed ------------------------------------------------------------


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm")
        return func(*args, **(kwargs or {}))


def test_without_gradients_a_frozen_factor_costs_no_product():
    x = torch.randn(40, 12, dtype=torch.float64)
    counts = []
    for method in ("lora", "lorafa"):
        adapters = net(method, depth=1)
        with torch.no_grad(), Products() as products:
            adapters.model(x)
        counts.append(products.count)
    assert counts[0] == counts[1] == 2, counts


# -- a table under a compiler ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
def test_a_measured_table_is_one_graph(tmp_path):
    entry = Call(tokens=16, in_features=12, out_features=12, r=3, dtype=torch.float64,
                 needs_x=False)  # fmt: skip
    Table(((entry, Order(True, False, True)),)).write(tmp_path / "orders.json")
    adapters = net("lora", depth=1)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with measured(tmp_path / "orders.json"):
        torch._dynamo.reset()
        compiled = torch.compile(adapters.model, fullgraph=True, backend=backend, dynamic=True)
        for tokens in (16, 17, 30, 20):
            x = torch.randn(tokens, 12, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), adapters.model(x))
        assert len(graphs) <= 2
    torch._dynamo.reset()


# -- gradient scalers ------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_scaler_skips_is_none(fused):
    """Fused rules are called all the same, with gradients that are still scaled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    adapters = lorica.attach(model, "sora", r=2, verbose=False)
    perturb(adapters)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=20, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x = torch.randn(4, 6)
    own = optimizer.param_groups[0]["lorica"]
    taken = []
    for i in range(4):
        loss = model(x).square().sum()
        scaler.scale(loss if i != 1 else loss * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(own["step"])
    assert taken == [1, 1, 2, 3]


@pytest.mark.parametrize("method", ["dora", "dora+reference", "dora(dropout='authors')",
                                    "dora+auto(saves='nothing')"])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [4, 40])
def test_a_magnitude_trains_in_steps_below_half_precision(method, autocast, tokens):
    """Rounded to bfloat16, m/c would stay what it was over changes of 0.2 to 0.4 %."""
    dtype = torch.float32 if autocast else torch.bfloat16
    drop = 0.01 if "authors" in method else 0.0
    adapters = net(method, depth=1, width=64, dtype=dtype, lora_dropout=drop)
    m = next(t.parameter for t in adapters.trained() if t.role == "magnitude")
    x = torch.randn(tokens, 64, dtype=dtype)

    def mean() -> torch.Tensor:
        torch.manual_seed(2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return adapters.model(x).double().abs().mean(0)

    before, start = mean(), m.detach().clone()
    for change in (1.0015, 0.9985):
        with torch.no_grad():
            m.copy_(start * change)
        moved = (mean() / before).mean()
        assert abs(moved - change) < 5e-4, (change, moved)


# -- wrappers --------------------------------------------------------------------------------------


# Dynamo itself makes an instance of every autograd function that it traces.
traced = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@pytest.fixture
def eager(monkeypatch):
    """Compiling runs the graphs as they are: what is asked here is who sees which module."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="eager")
    torch._dynamo.reset()


def blocks(wrap: Any = lambda block: block) -> nn.Module:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)]
    return nn.Sequential(*(wrap(block) for block in made)).double()


@traced
def test_a_compiled_model_is_its_model(eager, tmp_path):
    model, x = eager(blocks()), torch.randn(3, 4, dtype=torch.float64)
    want = blocks()(x)
    assert torch.equal(model(x), want)  # compiled before
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    assert [*adapters.layers] == ["0.0", "1.0"] and Adapters.of(model) is adapters
    perturb(adapters)
    moved, printed = adapters.model(x).detach(), adapters.fingerprint()
    torch.testing.assert_close(model(x), moved)
    assert not torch.allclose(moved, want)
    with Adapters.of(model).disabled():
        assert torch.equal(model(x), want)
    lorica.save(model, tmp_path / "out")
    assert lorica.detach(model) is model
    assert torch.equal(model(x), want)
    lorica.load(blocks(), tmp_path / "out")
    assert lorica.load(model, tmp_path / "out").fingerprint() == printed
    torch.testing.assert_close(model(x), moved)
    assert lorica.merge(model) is model
    torch.testing.assert_close(model(x), moved)


def test_a_transformer_is_found_through_its_wrapper(eager):
    """Its head, its names and its configuration are those of the model itself."""
    one, other = (lorica.attach(m, "lora", r=2, verbose=False) for m in (llama(), eager(llama())))
    assert one.layers.keys() == other.layers.keys() and type(other.model) is type(one.model)
    assert one.hash_base() == other.hash_base()


@traced
@pytest.mark.parametrize("around", ["compile", "checkpoint"])
def test_wrappers_around_blocks_leave_no_trace(eager, around, tmp_path):
    plain, model = blocks(), blocks(eager if around == "compile" else checkpoint_wrapper)
    one, other = (
        lorica.attach(m, "olora", r=2, modules_to_save=["1.1"], bias="all", verbose=False)
        for m in (plain, model)
    )
    assert other.state_dict().keys() == one.state_dict().keys()
    assert other.hash_base() == one.hash_base()
    perturb(one)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    assert all(t.parameter.grad is not None for t in other.trained())
    lorica.load(blocks(), lorica.save(other, tmp_path / "out"))
    lorica.detach(model)
    torch.testing.assert_close(model(x), blocks()(x))


def test_full_training_in_wrapped_blocks_has_plain_names(eager):
    model = llama()
    model.model.layers[0] = eager(model.model.layers[0])
    assert (
        lorica.attach(model, "full", verbose=False).direct.keys()
        == lorica.attach(llama(), "full", verbose=False).direct.keys()
    )


@pytest.mark.parametrize("given", ["owner/name", len, None])
def test_what_is_no_model_is_told_so(given):
    with pytest.raises(ValueError, match=r"is a (str|NoneType|builtin.*), .*from_pretrained"):
        lorica.attach(given, "lora")


def test_a_layer_with_a_wrapper_of_its_own_is_refused(eager):
    model = nn.Sequential(eager(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0' is wrapped by itself.*Attach first"):
        lorica.attach(model, "lora", r=2)
    lorica.attach(model, "lora", r=2, target_modules=["1"], verbose=False)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parallel(kind: str, model: nn.Module) -> nn.Module:
    if kind == "FullyShardedDataParallel":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    return {"DataParallel": nn.DataParallel, "DistributedDataParallel": DistributedDataParallel}[
        kind
    ](model)


@pytest.mark.parametrize(
    "kind", ["DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"]
)
def test_wrappers_that_list_parameters_come_after_attach(one_process, kind, eager):
    for wrapper in (parallel(kind, net_of(4)), eager(parallel(kind, net_of(4)))):
        with pytest.raises(ValueError, match=rf"a {kind}, .*Attach first"):
            lorica.attach(wrapper, "lora", r=2)
    with pytest.raises(ValueError, match=rf"'0' is a {kind}, .*Attach first"):
        lorica.attach(nn.Sequential(parallel(kind, net_of(4))), "lora", r=2)


def net_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


def test_what_is_asked_of_the_wrapper_is_asked_of_the_model(one_process, tmp_path):
    adapters = lorica.attach(net_of(4), "lora", r=2, verbose=False)
    wrapper = DistributedDataParallel(adapters.model)
    wrapper(torch.ones(1, 4)).sum().backward()
    assert adapters.layers["0"].update.delta.B.grad is not None
    for call in (lorica.merge, lorica.detach, Adapters.of, lambda m: lorica.save(m, tmp_path)):
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*`wrapper.module`"):
            call(wrapper)
    lorica.merge(wrapper.module)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_a_model_that_pefts_adapters_are_in_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    for model in (peft.get_peft_model(llama(), config), llama()):
        if not isinstance(model, peft.PeftModel):
            model.add_adapter(config)
        with pytest.raises(ValueError, match="PEFT has put.*merge_and_unload"):
            lorica.attach(model, "lora", r=2)


def test_accelerate_prepares_an_adapted_model_and_gives_it_back(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # One per process, which refuses another precision than that of an earlier Trainer.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    adapters = lorica.attach(llama(), "lora", r=2, verbose=False)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(adapters.model)
    assert Adapters.of(accelerator.unwrap_model(model)) is adapters
    model(**batch(model)).loss.backward()
    assert all(layer.update.delta.B.grad is not None for _, layer in adapters)


# -- hooks of the caller's on layers ---------------------------------------------------------------


def probed(adapt: Any) -> tuple[nn.Module, dict[str, list[Any]]]:
    """A layer between two others with every kind of hook, adapted after or before they are put
    there; what each of them saw."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    seen: dict[str, list[Any]] = {k: [] for k in ("before", "after", "kwargs", "back", "to back")}

    def hooks(layer: nn.Module) -> None:
        layer.register_forward_pre_hook(lambda m, args: (seen["before"].append(args[0]), None)[1])
        layer.register_forward_hook(lambda m, args, y: (seen["after"].append(y), 2 * y)[1])
        layer.register_forward_hook(
            lambda m, args, kwargs, y: (seen["kwargs"].append(y), None)[1], with_kwargs=True
        )
        layer.register_full_backward_hook(
            lambda m, dx, dy: (seen["back"].append((dx[0], dy[0])), None)[1]
        )
        layer.register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],))

    adapt(model, hooks)
    return model, seen


@pytest.mark.parametrize("first", ["hooks", "attach"])
@pytest.mark.parametrize("fields", [{}, {"target_modules": ["0"], "modules_to_save": ["1"]}])
def test_hooks_run_once_on_what_the_layer_computes(first, fields):
    def adapt(model: nn.Module, hooks: Any) -> None:
        if first == "hooks":
            hooks(model[1])
        lorica.attach(model, "dora", r=2, verbose=False, **fields)
        if first == "attach":
            hooks(model.get_submodule("1"))
        perturb(Adapters.of(model))

    model, seen = probed(adapt)
    merged, other = probed(lambda model, hooks: hooks(model[1]))
    with torch.no_grad():
        for mine, theirs in zip(merged, model, strict=True):
            if isinstance(theirs, AdaptedLinear):
                weight, bias = theirs.effective()
                mine.weight.copy_(weight)
                mine.bias.copy_(bias)
            else:
                own = theirs.copy if isinstance(theirs, TrainedModule) else theirs
                mine.load_state_dict(own.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    torch.testing.assert_close(model(x), merged(twin))
    model(x).sum().backward()
    merged(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    assert [len(v) for v in seen.values()] == [len(v) for v in other.values()] == [2, 2, 2, 1, 0]
    torch.testing.assert_close(seen, other)
    for take_out in (Adapters.of(model).disabled, lambda: lorica.detach(model)):
        for found in seen.values():
            found.clear()
        if take_out.__name__ == "disabled":
            with take_out():
                model(x)
        else:
            take_out()
            model(x)
        assert [len(v) for v in seen.values()] == [1, 1, 1, 0, 0]


def test_a_hook_that_was_removed_is_gone():
    adapters, calls = net("lora"), []
    handle = adapters.layers["0"].base.register_forward_hook(lambda *_: calls.append(1))
    adapters.model(torch.ones(1, 12, dtype=torch.float64))
    handle.remove()
    adapters.model(torch.ones(1, 12, dtype=torch.float64))
    assert calls == [1]


def spectral(module: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(module)


def patched(module: nn.Module) -> None:
    module.forward = lambda x: x


COMPUTED = {
    "WeightNorm": lambda m: torch.nn.utils.weight_norm(m),
    "SpectralNorm": spectral,
    "L1Unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "_WeightNorm": lambda m: torch.nn.utils.parametrizations.weight_norm(m),
    "`forward` was replaced": patched,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize(
    "fields", [{"target_modules": ["0"]}, {"target_modules": ["1"], "modules_to_save": ["0"]}]
)
def test_a_weight_that_is_computed_is_refused_by_its_name(name, fields):
    model = net_of(4)
    COMPUTED[name](model[0])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"'0'.*cannot be adapted.*{name}"):
        lorica.attach(model, "lora", r=2, **fields)
    assert before.keys() == model.state_dict().keys()
    lorica.attach(model, "lora", r=2, target_modules=["1"], verbose=False)
