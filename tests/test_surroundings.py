"""What lies around a layer: default devices, several devices, offloading, transforms of functions,
policies of checkpointing, rounded products, gradient scalers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lorica
from lorica.methods.kernels.base import Call, Order, Table, choose, measured
from lorica.tensors.dtensor_ops import reduce_scalar
from models import perturb

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
