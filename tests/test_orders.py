"""The orders of one layer's products: what each costs, which is chosen, what is saved."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.methods.kernels import _measured as measuring
from lorica.methods.kernels import _orders as orders
from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels.base import Call, Order, Table, choose, measured

EVERY = [Order(*pick) for pick in itertools.product((False, True), repeat=3)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(Fused):
    """A kernel that takes the order it is told."""

    given: Order = Order()

    def order(self, call: Call) -> Order:
        return self.given


def layer(m: int, n: int, r: int, frozen: int = 0, bias: bool = True, **fields: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(m, n, bias=bias, dtype=torch.float64))
    adapters = lorica.attach(model, fields.pop("method", "lora"), r=r, verbose=False, **fields)
    one = adapters.layers["0"]
    nn.init.normal_(one.update.delta.B)
    if frozen:
        wide = {"dtype": torch.float64}
        one.update.add_frozen_(torch.randn(frozen, m, **wide), torch.randn(n, frozen, **wide))
    return one


def run(
    one: Any, kernel: Fused, x: torch.Tensor, gain: torch.Tensor | None = None,
    formed: torch.Tensor | None = None, asked: list[bool] | None = None,
):  # fmt: skip
    """(y, gradients of x, A, B and the gain) for a fixed gradient of y; what the gain was asked
    goes into `asked`."""
    x = x.detach().requires_grad_(True)
    pair = one.update.delta.pair()

    def scales(forms: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if asked is not None:
            asked.append(forms)
        return gain, formed

    y = kernel.product(x, one.store, one.update, gain=None if gain is None else scales)
    wanted = [x, pair.A, pair.B, *([] if gain is None else [gain])]
    return y.detach(), *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y))


class Multiplies(TorchDispatchMode):
    """Counts those of matrix products. Torch's own counter leaves out the ones done in place."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left = args[0] if name == "mm" else args[1]
            self.total += out.numel() * left.shape[1]
        return out


@pytest.mark.parametrize("order", EVERY)
@pytest.mark.parametrize("frozen", [0, 2])
def test_every_order_computes_the_same_at_the_cost_it_states(order, frozen):
    """Multiplies as counted by torch, against the formulas that the choice is made by."""
    N, m, n, r = 11, 7, 5, 3
    one = layer(m, n, r, frozen)
    x = torch.randn(N, m, dtype=torch.float64)
    call = Call(tokens=N, in_features=m, out_features=n, r=r, frozen_rank=frozen)
    expected = run(one, Fixed(), x)
    with Multiplies() as counter:
        found = run(one, Fixed(given=order), x)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    stated = orders.forward_multiplies(call, order.forward_sum)
    stated += orders.backward_multiplies(call, order.input_sum, order.outer)
    assert counter.total == stated


@pytest.mark.parametrize("saves", ["output", "product", "nothing"])
@pytest.mark.parametrize("order", EVERY)
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_sum_that_the_caller_formed_changes_nothing(order, frozen, saves, bias):
    one = layer(7, 5, 3, frozen, bias=bias)
    x, gain = torch.randn(11, 7, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    gain.requires_grad_()
    kernel = Fixed(given=order, saves=saves)
    plan = kernel.plan(x, one.store, one.update)
    assert plan is not None and plan.forms == order.forward_sum
    other = kernel.plan(x.float(), one.store, one.update)
    assert other is not None and not other.forms, "of another dtype"
    asked: list[bool] = []
    expected = run(one, kernel, x, gain, asked=asked)
    assert asked == [order.forward_sum], "once, and whether the sum would be used"
    if not order.forward_sum:
        return
    _, v = one.update.formed_norms(one.store, keep=True)
    found = run(one, kernel, x, gain, formed=v)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_half_precision_stays_the_kernels_own(dtype):
    """Norms are of a sum in float32, whose product with half precision there is not."""
    model = nn.Sequential(nn.Linear(7, 5, dtype=dtype))
    one = lorica.attach(model, "dora+materialised", r=2, verbose=False).layers["0"]
    x = torch.randn(9, 7, dtype=dtype)
    before = one.base(x)
    assert one(x).dtype == dtype
    torch.testing.assert_close(one(x), before, rtol=2e-2, atol=2e-2)


def test_row_norms_cost_no_product_where_the_sum_is_formed_anyway():
    """DoRA's forward: the product with W, and the sum once, for norms and product both."""
    N, m, n, r = 11, 7, 5, 3
    one = layer(m, n, r, method="dora", bias=False)
    with Multiplies() as counter, torch.no_grad():
        one(torch.randn(N, m, dtype=torch.float64))
    assert N >= orders.threshold(m, n) and counter.total == N * m * n + m * n * r


@given(
    tokens=st.integers(1, 4096), m=st.integers(1, 512), n=st.integers(1, 512),
    r=st.integers(1, 512), needs=st.tuples(*[st.booleans()] * 4),
)  # fmt: skip
def test_the_choice_is_the_cheapest(tokens, m, n, r, needs):
    call = Call(
        tokens=tokens, in_features=m, out_features=n, r=r, needs_x=needs[0], needs_a=needs[1],
        needs_b=needs[2], needs_w=needs[3],
    )  # fmt: skip
    chosen = choose(call)

    def cost(order: Order) -> int:
        back = orders.backward_multiplies(call, order.input_sum, order.outer)
        return orders.forward_multiplies(call, order.forward_sum) + back

    assert cost(chosen) == min(cost(order) for order in EVERY)


@given(N=st.integers(1, 5000), m=st.integers(2, 300), n=st.integers(2, 300), data=st.data())
def test_the_choice_follows_the_closed_form(N, m, n, data):
    """Where x, A and B all need gradients: f2 from N > mn/(m + n), b5 before b1 from N > n, and
    b4 where r is large."""
    r = data.draw(st.integers(1, min(m, n)))
    chosen = choose(Call(tokens=N, in_features=m, out_features=n, r=r))
    assert chosen.forward_sum == (N * (m + n) > m * n)
    b4 = (
        N * (2 * r * (m + n) - m * n) > 2 * m * n * r
        and N * (3 * m * r + 2 * n * r - m * n) > 3 * m * n * r
    )
    assert (chosen.input_sum, chosen.outer) == ((True, True) if b4 else (n < N, False))


def test_half_precision_and_dropout_form_no_sum():
    big = Call(tokens=4096, in_features=64, out_features=64, r=64)
    assert choose(big) == Order(True, True, True)
    assert choose(dataclasses.replace(big, dtype=torch.bfloat16)) == Order()
    assert choose(dataclasses.replace(big, dropping=True)) == Order()


# -- measured orders -------------------------------------------------------------------------------

CALL = Call(tokens=64, in_features=8, out_features=8, r=2)
ODD = Order(False, False, True)  # which arithmetic never takes here


def test_a_measured_table_decides_near_its_entries(tmp_path):
    Table(((CALL, ODD),)).write(tmp_path / "orders.json")
    table = Table.read(tmp_path / "orders.json")
    assert table == Table(((CALL, ODD),))
    assert table.order(dataclasses.replace(CALL, tokens=128, in_features=5)) == ODD
    assert table.order(dataclasses.replace(CALL, tokens=129)) is None, "over a factor of two away"
    assert table.order(dataclasses.replace(CALL, needs_x=False)) is None, "of another kind"
    assert table.order(dataclasses.replace(CALL, dtype=torch.bfloat16)) is None
    kernel = lorica.Recipe.parse("lora").kernel
    assert kernel.order(CALL) == choose(CALL) != ODD
    with measured(tmp_path / "orders.json"):
        assert kernel.order(CALL) == ODD
        assert kernel.order(dataclasses.replace(CALL, r=64)) == choose(
            dataclasses.replace(CALL, r=64)
        )
        with measured(None):
            assert kernel.order(CALL) == choose(CALL)
        assert kernel.order(CALL) == ODD
    assert kernel.order(CALL) == choose(CALL)


def test_the_environment_names_a_table_for_the_command_line(tmp_path, monkeypatch):
    Table(((CALL, ODD),)).write(tmp_path / "orders.json")
    monkeypatch.setenv(measuring.VARIABLE, str(tmp_path / "orders.json"))
    monkeypatch.setattr(measuring, "_known", None)
    monkeypatch.setattr(measuring, "_table", None)
    assert lorica.Recipe.parse("lora").kernel.order(CALL) == ODD


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"orders": [{}]}', '{"orders": 3}', '{"orders": [{"call": {"tokens": 1}}]}'],
)
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "orders.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"is no table of orders .*python -m lorica\.methods\.kernels FILE"
    ):
        Table.read(path)
    with pytest.raises(ValueError, match="no table of orders"), measured(tmp_path / "absent"):
        pass


def test_measuring_times_every_lawful_order():
    call = Call(tokens=8, in_features=4, out_features=4, r=2)
    times = measuring.seconds(call, rounds=1)
    assert set(times) == set(EVERY) and all(f > 0 and b > 0 for f, b in times.values())
    table = measuring.tabulate([call, dataclasses.replace(call, dropping=True)], rounds=1)
    assert table.entries[1][1] == Order(), "under dropout only one is lawful"
    best = {Order(True, False, True): (1.0, 9.0), Order(False, True, False): (2.0, 3.0)}
    assert measuring.fastest(best) == Order(True, True, False)


# -- what is saved ---------------------------------------------------------------------------------


def saved(one: Any, x: torch.Tensor) -> set[int]:
    """Storages kept for backward, parameters aside."""
    seen: set[int] = set()

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = one(x)
    own = {p.untyped_storage().data_ptr() for p in one.parameters()}
    names = {x.untyped_storage().data_ptr(): -1, y.untyped_storage().data_ptr(): -2}
    return {names.get(s, 0) for s in seen - own}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [2, 64])
def test_the_input_alone_is_saved_and_for_a_magnitude_the_product(p, tokens):
    x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    assert saved(layer(8, 6, 2, lora_dropout=p), x) == {-1}
    # The third is the gain, of one number a row.
    output = "dora+auto(saves='output')"
    bare = layer(8, 6, 2, method=output, lora_dropout=p, bias=False)
    assert saved(bare, x) == {-1, -2, 0}
    # Beside a bias, the output would lose a small gain in rounding.
    assert -2 not in saved(layer(8, 6, 2, method=output, lora_dropout=p), x)
    for bias in (False, True):  # by default no tensor that others may write to
        assert saved(layer(8, 6, 2, method="dora", lora_dropout=p, bias=bias), x) == {-1, 0}
    nothing = layer(8, 6, 2, method="dora+auto(saves='nothing')", lora_dropout=p)
    assert saved(nothing, x) == {-1, 0}


def test_a_frozen_factor_needs_no_input():
    x = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    assert saved(layer(8, 6, 2, method="lorafa"), x) == {0}, "x Aᵀ alone"


# -- models that write over what they were given ---------------------------------------------------


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        y += x
        return y.exp()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tokens", [2, 40])
def test_an_output_changed_in_place_is_never_read_as_if_it_were_not(checkpointed, tokens):
    """Torch's own check does not reach into checkpointed segments."""
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    grads = {}
    for saves in ("product", "nothing", "output"):
        torch.manual_seed(0)
        model = InPlace()
        adapters = lorica.attach(model, f"dora+auto(saves='{saves}')", r=2, verbose=False)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        if saves == "output":
            with pytest.raises(RuntimeError, match=r"in place.*saves='product'"):
                y.square().sum().backward()
            continue
        y.square().sum().backward()
        grads[saves] = adapters.layers["inner"].combine.m.grad
    torch.testing.assert_close(grads["product"], grads["nothing"])


class _Overwrites(torch.autograd.Function):
    """exp, whose backward leaves its gradient where its input was, through a raw pointer: neither a
    version counter nor a hook on saved tensors sees that. Fused activations do so."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.exp()

    @staticmethod
    def backward(ctx, dz):
        (y,) = ctx.saved_tensors
        dy = dz * y.exp()
        y.detach().numpy()[...] = dy.numpy()
        return dy


class Overwriting(torch.nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 5, bias=bias, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Overwrites.apply(self.inner(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("method", ["dora", "dora+materialised", "dora+factored",
                                    "dora(detach=False)"])  # fmt: skip
def test_a_kernel_that_writes_through_pointers_changes_no_gradient(method, tokens, bias):
    x, grads = torch.randn(tokens, 6, dtype=torch.float64), []
    reference = method.split("+")[0] + "+reference"
    for text in (method, reference):
        torch.manual_seed(0)
        model = Overwriting(bias)
        adapters = lorica.attach(model, text, r=2, verbose=False)
        with torch.no_grad():
            for t in adapters.trained():
                t.parameter.add_(0.3 * torch.randn(t.parameter.shape))
        model(x.clone().requires_grad_()).square().sum().backward()
        grads.append([t.parameter.grad for t in adapters.trained()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_saved_outputs_pass_through_checkpoints_and_offloading():
    """A hook may hand back a copy, whose version says nothing."""
    x, results = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), []
    for mode in ("plain", "checkpoint", "offload"):
        one = layer(6, 4, 2, method="dora+auto(saves='output')", bias=False)
        if mode == "checkpoint":
            y = checkpoint(one, x, use_reentrant=False)
        elif mode == "offload":
            with torch.autograd.graph.save_on_cpu():
                y = one(x)
        else:
            y = one(x)
        y.square().sum().backward()
        results.append(one.combine.m.grad)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_magnitude_of_zero_has_its_gradient():
    one = layer(6, 4, 2, method="dora", bias=False)
    with torch.no_grad():
        one.combine.m[1] = 0
    x, grads = torch.randn(40, 6, dtype=torch.float64), []
    for saves in ("output", "nothing"):
        one.kernel = lorica.Recipe.parse(f"dora+auto(saves='{saves}')").kernel
        one.combine.m.grad = None
        one(x).square().sum().backward()
        one(x).sum().backward()
        grads.append(one.combine.m.grad)
    torch.testing.assert_close(*grads)
    assert grads[0][1] != 0


def test_an_unknown_thing_to_save_is_refused():
    with pytest.raises(ValueError, match="allowed: 'product', 'nothing', 'output'"):
        lorica.Recipe.parse("dora+auto(saves='input')")
