"""Torch's machinery around a model: whatever it wraps, an adapted model computes the same.

Every delta and combine is compiled into one graph, checkpointed, trained in micro-batches, under
autocast and asked without gradients; and schedules change a compiled model without a new graph.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_schedules import RECIPES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from walk import allowed, recipe, wrapping

import lorica
from lorica import Adapters, Recipe
from lorica.methods.kernels._linear import Fused
from lorica.methods.kernels.reference import Reference
from lorica.recipe import registry
from lorica.tensors import dropout
from models import batch, llama, perturb
from tolerance import rounding

PAIRS = [
    f"{delta}+{combine}"
    for delta in wrapping()
    for combine in registry.names("combine")
    if allowed(f"{delta}+{combine}")
]
DROPPING = [pair for pair in PAIRS if "lora_dropout" in Recipe.parse(pair).takes]
FUSED = [word for word in registry.names("kernels") if issubclass(registry.find(word), Fused)]
WIDTH = 8


def some(cases: list[Any], fast: Callable[[Any], bool]) -> list[Any]:
    """All cases, of which those that are not `fast` wait for the slow run."""
    return [c if fast(c) else pytest.param(c, marks=pytest.mark.slow) for c in cases]


# Dynamo itself makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:`gradient_checkpointing_enable`",
)


class Net(nn.Module):
    """Layers of one size, so that those that link to others do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.reentrant: bool | None = None  # of checkpointed segments; None: there are none

    def forward(self, x: Tensor, output_hidden_states: bool = False) -> dict[str, Any]:
        states = [x]
        for layer in self.layers:
            y = layer(x) if self.reentrant is None else self.again(layer, x)
            x = x + torch.tanh(y)
            states.append(x)
        out: dict[str, Any] = {"loss": x.square().mean()}
        return {**out, "hidden_states": tuple(states)} if output_hidden_states else out

    def again(self, layer: nn.Module, x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=self.reentrant)


def net(method: str | Recipe, p: float = 0.0, reentrant: bool | None = None) -> Adapters:
    torch.manual_seed(0)
    model = Net().double().train()
    model.reentrant = reentrant
    method = recipe(method, r=2, lora_dropout=p) if isinstance(method, str) else method
    adapters = lorica.attach(model, method, verbose=False)
    perturb(adapters, 0.3)
    return adapters


def rows(seed: int, count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def twin_of(adapters: Adapters) -> Adapters:
    return Adapters.of(copy.deepcopy(adapters.model))


def gradients(adapters: Adapters) -> dict[str, Tensor]:
    """Of all that trains; nothing else has one."""
    trained = {t.name: t.parameter for t in adapters.trained()}
    own = {id(p) for p in trained.values()}
    for name, p in adapters.model.named_parameters():
        assert id(p) in own or (p.grad is None and not p.requires_grad), name
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-10
) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=within, atol=within, msg=name)


# -- compiled --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test meets what another compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str) -> tuple[Any, CompileCounterWithBackend]:
    """The compiled model, in which a break of the graph is an error, and a counter of graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def as_compiled(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dropout fall as it does in a graph: from torch's function, on the parts one by one."""
    monkeypatch.setattr(dropout, "drop", lambda x, p, seed=None: F.dropout(x, p))
    for _, layer in adapters:
        layer.kernel = Reference()


def compare(
    adapters: Adapters, inputs: Callable[[int], dict[str, Any]], backend: str, dropping: bool,
    within: float = 1e-10,
) -> int:  # fmt: skip
    """Three steps, compiled and plain; the number of graphs."""
    twin = twin_of(adapters)
    model, counter = compiled(adapters.model, backend)
    both = [(model, adapters), (twin.model, twin)]
    optimizers = [lorica.optimizer(a, lr=1e-2) for _, a in both]
    losses: list[list[Tensor]] = [[], []]
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
        for i, (run, handle) in enumerate(both):
            if run is twin.model and dropping:
                as_compiled(twin, patch)
            for step in range(3):
                torch.manual_seed(step)
                loss = handle.loss(run(**inputs(step)), inputs(step))
                loss.backward()
                losses[i].append(loss.detach())
                if step < 2:
                    optimizers[i].step()
                    optimizers[i].zero_grad()
    torch.testing.assert_close(*losses, rtol=within, atol=within)
    assert_equal(gradients(adapters), gradients(twin), within)
    return counter.frame_count


def leading(pair: str) -> bool:
    """Every delta with the first combine, and every combine with the plain delta."""
    return pair.endswith("+add") or pair.startswith("lowrank+")


@pytest.mark.parametrize("method", some(PAIRS, leading))
def test_one_graph_computes_what_the_model_does(method):
    assert compare(net(method), lambda seed: {"x": rows(seed)}, "eager", False) == 1


@pytest.mark.parametrize("method", some(DROPPING, lambda pair: pair.startswith("lowrank+")))
def test_one_graph_drops_as_the_model_does(method):
    assert compare(net(method, 0.4), lambda seed: {"x": rows(seed)}, "eager", True) == 1


def one_block(method: str, p: float) -> Adapters:
    model = llama(num_hidden_layers=1).double().train()
    adapters = lorica.attach(model, recipe(method, r=3, lora_dropout=p), verbose=False)
    perturb(adapters, 0.1)
    return adapters


def transformer(method: str, p: float, backend: str, within: float = 1e-10) -> None:
    adapters = one_block(method, p)
    model = adapters.model
    assert compare(adapters, lambda seed: batch(model, seed), backend, p > 0, within) == 1


def test_a_transformer_is_one_graph():
    transformer("dora+olora", 0.0, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("method", PAIRS)
def test_a_transformer_is_one_graph_with_every_method(method, p):
    transformer(method, p if method in DROPPING else 0.0, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of the compiler is missing")
@pytest.mark.parametrize(("method", "p"), [("lora", 0.0), ("dora+olora", 0.3)])
def test_code_that_is_generated_computes_the_same(method, p, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor.patch(fallback_random=True):  # else it draws by itself
        # Norms and the loss of the model itself are in float32, where another order rounds.
        transformer(method, p, "inductor", within=1e-4)


OWN = registry.names("schedules")  # beside those of the tests', over methods that have none


@pytest.mark.parametrize("name", some([*RECIPES], lambda name: name in OWN or "+" in name))
def test_an_event_makes_no_new_graph(name):
    """But for layers that rest from it on, and for what is carried, which grows."""
    adapters, twin = net(RECIPES[name]), net(RECIPES[name])
    model, counter = compiled(adapters.model, "eager")
    shapes, losses = set(), []
    for run, handle in ((model, adapters), (twin.model, twin)):
        optimizer = lorica.optimizer(handle, lr=1e-2, total_steps=10, seed=3)
        losses.append([])
        for step in range(4):
            state = [(layer.frozen_for_now, carried_rank(layer)) for _, layer in handle]
            shapes.add(repr(state))
            loss = handle.loss(run(rows(step)), {"x": rows(step)})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    assert 1 <= counter.frame_count <= len(shapes)
    assert_equal(adapters.state_dict(), twin.state_dict())


def carried_rank(layer: Any) -> int:
    carried = layer.update.frozen_factors
    return 0 if carried is None else carried.A.shape[0]


def test_every_mode_has_one_graph():
    adapters = net("dora+olora", 0.3)
    model, counter = compiled(adapters.model, "eager")
    seen = []
    for _ in range(2):
        model.train()
        model(rows(0))["loss"].backward()
        seen.append(counter.frame_count)
        model.eval()
        with torch.no_grad():
            value = model(rows(0))["loss"]
            torch.testing.assert_close(value, adapters.model(rows(0))["loss"])
            seen.append(counter.frame_count)
            with adapters.disabled():
                plain = model(rows(0))["loss"]
        assert abs(plain - value) > 1e-4
        seen.append(counter.frame_count)
    assert seen == [1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("method", some(["lora", "dora"], lambda method: method == "lora"))
def test_batches_of_any_length_share_graphs(method):
    """One of the first length, one of any; and one more where the order of the products changes."""
    adapters = net(method)
    model, counter = compiled(adapters.model, "eager")
    for count in (12, 13, 14, 2, 3, 18):
        model(rows(0, count))["loss"].backward()
    assert counter.frame_count <= 3


@pytest.mark.parametrize("case", some(
    [("lora", 0.0), ("lora", 0.3), ("dora", 0.0), ("dora", 0.3), ("bat", 0.0), ("bat", 0.3)],
    lambda case: case in (("lora", 0.0), ("dora", 0.3)),
))  # fmt: skip
def test_checkpointed_segments_compile(case):
    method, p = case
    adapters = net(method, p, reentrant=False)
    assert compare(adapters, lambda seed: {"x": rows(seed)}, "aot_eager", p > 0) == 1


# -- checkpointed, accumulated ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", PAIRS)
def test_checkpointed_segments_compute_the_same_again(method, reentrant):
    found = []
    for how in (None, reentrant):
        adapters = net(method, 0.4, reentrant=how)
        torch.manual_seed(2)
        adapters.model(rows(0).requires_grad_())["loss"].backward()
        found.append(gradients(adapters))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("method", PAIRS)
def test_micro_batches_are_one_batch(method):
    states = []
    for parts in (1, 3):
        adapters = net(method)
        optimizer = lorica.optimizer(adapters, lr=1e-2)
        for step in range(2):
            x = rows(step)
            for part in x.chunk(parts):
                adapters.loss(adapters.model(part), share=1 / parts).div(parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(adapters.state_dict())
    assert_equal(states[1], states[0])


# -- autocast --------------------------------------------------------------------------------------

TOKENS, IN, OUT = 48, 24, 20


class Activations(TorchDispatchMode):
    """Collects what is made in float32 with a row for each token."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, Tensor) or t.dtype != torch.float32:
                continue
            made = t.untyped_storage().data_ptr() not in self.known
            if made and t.ndim == 2 and t.shape[0] == TOKENS:
                self.found.append(f"{func} {tuple(t.shape)}")
        return out


def half(method: str, base: torch.dtype, p: float, bias: bool) -> Adapters:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=base)).train()
    adapters = lorica.attach(model, recipe(method, r=3, lora_dropout=p), verbose=False)
    perturb(adapters, 0.3)
    return adapters


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("combine", registry.names("combine"))
@pytest.mark.parametrize("kernel", FUSED)
def test_autocast_makes_no_wide_activation(kernel, combine, dtype, p):
    """Neither for x in bfloat16, as other layers leave it, nor for one in float32, as norms do."""
    for base in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            adapters = half(f"lowrank+{combine}+{kernel}", base, p, bias)
            x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=dtype == torch.bfloat16)
            grad = torch.randn(TOKENS, OUT, dtype=torch.bfloat16)
            with Activations(x) as seen:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = adapters.model(x)
                y.backward(grad)
            assert y.dtype == torch.bfloat16 and not seen.found
            assert x.grad is None or x.grad.dtype == torch.bfloat16
            assert {g.dtype for g in gradients(adapters).values()} == {torch.float32}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", FUSED)
def test_autocast_saves_the_input_itself(kernel, dtype, p):
    """A copy for each of the layers that share it would cost more than casting it again."""
    x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    # Where rows are scaled: the product before the scaling, too.
    for combine, bias, others in (("add", True, 0), ("dora", False, 1), ("dora", True, 1)):
        adapters, kept = half(f"lowrank+{combine}+{kernel}", torch.float32, p, bias), {}

        def keep(t: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            if t.ndim == 2 and t.shape[0] == TOKENS:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            y = adapters.model(x)
        own = kept.pop(x.untyped_storage().data_ptr())
        assert own.dtype == dtype and own.shape == x.shape
        assert [t.shape for t in kept.values()] == [y.shape] * others
        assert all(t.dtype == torch.bfloat16 for t in kept.values())
        assert y.untyped_storage().data_ptr() not in kept, "others may write to the output"


@pytest.mark.parametrize("method", PAIRS)
def test_autocast_is_near_the_truth(method):
    results = []
    for automatic in (False, True):
        adapters = half(method, torch.float32, 0.0, True)
        x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=automatic):
            y = adapters.model(x)
        y.float().square().mean().backward()
        results.append([y.detach().float(), *gradients(adapters).values()])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.05 * one.norm() + 1e-6


# -- without gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", PAIRS)
def test_without_gradients_nothing_is_kept_and_training_goes_on(method, mode):
    adapters, kept = net(method, 0.4), []
    twin = twin_of(adapters)
    adapters.model.eval()
    twin.model.eval()
    expected = twin.model(rows(0))["loss"]
    # Without gradients another order of the products can be cheapest, so the two agree to rounding:
    # in each layer a product and a row norm of W + ΔW, which is itself a sum, and then the mean.
    within = rounding(torch.float64, 2 * 3 * WIDTH + rows(0).numel())
    with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        value = adapters.model(rows(0))["loss"]
        torch.testing.assert_close(value, expected, rtol=within, atol=0)
        assert not value.requires_grad and not kept
        adapters.model.train()
        assert not adapters.model(rows(0))["loss"].requires_grad and not kept
    for handle in (adapters, twin):
        handle.model.train()
        torch.manual_seed(3)
        handle.model(rows(1))["loss"].backward()
    assert_equal(gradients(adapters), gradients(twin))
