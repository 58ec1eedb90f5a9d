"""What is run on 2 and on 4 processes. Every scenario computes its one-process twin beside it.

A scenario is a public function marked with the world sizes it runs at; it raises where it fails.
Every process calls it, inside a gloo process group of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorica
from lorica.interfaces import Pair
from lorica.methods.inits.base import fill_
from lorica.methods.optional import SharesTensors, StartsFromData
from lorica.methods.schedules.base import AbstractSchedule
from lorica.recipe import registry
from lorica.recipe.recipe import Recipe
from lorica.tensors import dtensor_ops
from lorica.tensors.dtensor_ops import seeded
from lorica.training import weight_edits
from lorica.training.bind import KEY
from lorica.training.checks import WATCHED_STEPS
from tolerance import rounding

_WORLDS: dict[str, tuple[int, ...]] = {}


def _on(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def mark(scenario: Callable[[], None]) -> Callable[[], None]:
        _WORLDS[scenario.__name__] = worlds
        return scenario

    return mark


def names(world: int) -> list[str]:
    """Scenarios of this world size, in the order of this file."""
    return [name for name, worlds in _WORLDS.items() if world in worlds]


# -- what the scenarios share ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Moving(AbstractSchedule):
    """Merges every layer after each second step and swaps two vectors a layer after the others."""

    needs: ClassVar[frozenset[str]] = frozenset({"pair", "factors", "writable_base"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    edits: ClassVar[frozenset[str]] = frozenset({"base", "pair"})

    def init(self, adapters: Any) -> dict[str, Any]:
        return {"merges": 0, "swaps": torch.zeros(2, dtype=torch.int64)}

    def after_step(self, state: dict[str, Any], training: Any) -> None:
        merging = training.step % 2 == 1
        state["merges"] += int(merging)
        for i, (name, layer) in enumerate(training.adapters):
            generator = training.generator(name)
            if merging:
                weight_edits.merge_(
                    layer,
                    training.optimizer,
                    link=state["merges"],
                    init=training.adapters.recipe.init,
                    generator=generator,
                )
            else:
                side = "AB"[(i + training.step // 2) % 2]
                state["swaps"]["AB".index(side)] += 1
                _swap(layer, training.optimizer, side, generator)


def _swap(layer: Any, optimizer: Any, side: str, generator: torch.Generator) -> None:
    r, site = layer.site.r, layer.site
    index = torch.randperm(r, generator=generator)[: min(2, r)].tolist()
    width = site.in_features if side == "A" else site.out_features
    weight_edits.swap_(
        layer, optimizer, side, index, 0.1 * dtensor_ops.draw((len(index), width), generator)
    )


def _mesh(*shape: int) -> DeviceMesh:
    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def _llama(intermediate: int = 45) -> Any:
    # 45 is odd, so the shards of the MLP are uneven.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _adapted(
    method: str,
    *,
    make: Callable[[], Any] = _llama,
    dtype: torch.dtype = torch.float64,
    schedules: tuple | None = (Moving(),),
    r: int | None = 3,
    base: torch.dtype | None = None,
    **fields: Any,
) -> lorica.Adapters:
    """A tiny model with adapters: the same on every process, and each time it is called."""
    torch.manual_seed(0)
    beside = {} if schedules is None else {"schedules": schedules}
    recipe = Recipe.parse(method, r=r, **beside, **fields)
    return lorica.attach(make().to(base or dtype), recipe, dtype=dtype, verbose=False)


def _shard(
    adapters: lorica.Adapters,
    mesh: DeviceMesh | None = None,
    axis: int = 0,
    policy: MixedPrecisionPolicy | None = None,
) -> None:
    """fully_shard per layer and at the root; matrices along `axis`."""
    model: Any = adapters.model
    mesh = _mesh() if mesh is None else mesh
    place: Any = {"shard_placement_fn": lambda p: Shard(axis if p.ndim > axis else 0)}
    place["mp_policy"] = policy or MixedPrecisionPolicy()
    blocks = getattr(model, model.base_model_prefix)
    for block in getattr(blocks, "layers", None) or blocks.h:
        fully_shard(block, mesh=mesh, **place)
    fully_shard(model, mesh=mesh, **place)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def _optimizer(adapters: lorica.Adapters, **options: Any) -> torch.optim.Optimizer:
    return lorica.optimizer(adapters, 5e-3, weight_decay=0.1, seed=3, **options)


def _tokens(step: int) -> Tensor:
    return torch.randint(0, 64, (8, 6), generator=torch.Generator().manual_seed(step))


def _train(
    model: nn.Module,
    adapters: lorica.Adapters,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    divided: bool,
) -> list[float]:
    """The losses of the global batch; where `divided`, each process takes its share of the
    sequences."""
    losses = []
    for step in steps:
        ids = _tokens(step)
        if divided:
            ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
        logits = model(input_ids=ids).logits  # transformers' own loss is in float32
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if divided:
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        losses.append(whole.item())
    return losses


@torch.no_grad()
def _logits(adapters: lorica.Adapters) -> Tensor:
    """Of a fixed batch; every process has the same sequences. In training mode: no dropout here,
    and an evaluation must not be what makes it right."""
    return adapters.model(input_ids=_tokens(1000)).logits.clone()


def _equal_states(got: dict[str, Tensor], want: dict[str, Tensor], atol: float) -> None:
    assert list(got) == list(want)
    for name in want:
        far = (got[name] - want[name]).abs().max().item()
        assert far <= atol, f"{name} is {far:.2e} away"


def _drawn(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other values of the same names and shapes."""
    return {n: torch.randn(v.shape, generator=seeded(n), dtype=v.dtype) for n, v in like.items()}


def _on_every_process(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def _refuses(call: Callable[[], Any], *parts: str) -> None:
    try:
        call()
    except ValueError as error:
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{error} lacks {missing}"
    else:
        raise AssertionError(f"no error with {parts}")


# -- verbs -----------------------------------------------------------------------------------------


class _One(nn.Module):
    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(t.clone())


def _placed(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values plain, sharded by `fully_shard` and sharded by hand: even, uneven and empty
    parts."""
    world = dist.get_world_size()
    flat = _mesh()
    yield "plain", t.clone()
    for axis in range(t.ndim):
        if axis == 0 or t.shape[axis] % world == 0:  # all that FSDP2 allows beside axis 0
            module = _One(t)
            fully_shard(module, mesh=flat, shard_placement_fn=lambda p, axis=axis: Shard(axis))
            yield f"fully_shard {axis}", module.weight.detach()
        yield f"shard {axis}", distribute_tensor(t.clone(), flat, [Shard(axis)])
    yield "replicate", distribute_tensor(t.clone(), flat, [Replicate()])
    if world == 4:
        grid = _mesh(2, 2)
        yield "hybrid", distribute_tensor(t.clone(), grid, [Replicate(), Shard(0)])
        if t.ndim == 2:
            yield "grid", distribute_tensor(t.clone(), grid, [Shard(0), Shard(1)])


_SHAPES = ((8, 4), (5, 7), (2, 9), (1, 6), (9, 1), (7,))


def _cases(
    generator: torch.Generator, shapes: tuple[tuple[int, ...], ...] = _SHAPES
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what it is, plain twin, the tensor in some placement)."""
    for shape in shapes:
        t = torch.randn(shape, generator=generator)
        for how, placed in _placed(t):
            yield f"{shape} {how}", t.clone(), placed


def _same(got: Tensor, want: Tensor, what: str, *, atol: float = 0.0) -> None:
    full = dtensor_ops.read_full(got)
    assert not isinstance(full, DTensor) and full.shape == want.shape, what
    torch.testing.assert_close(full, want, atol=atol, rtol=0, msg=lambda m: f"{what}: {m}")


@_on(2, 4)
def verbs_read_and_shard() -> None:
    for what, twin, t in _cases(torch.Generator().manual_seed(1)):
        _same(t, twin, f"read_full {what}")
        local, offset = dtensor_ops.shard_of(t)
        assert not isinstance(local, DTensor)
        mine = torch.zeros_like(twin)
        count = torch.zeros_like(twin)
        window = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
        mine[window] = local.detach()
        count[window] = 1
        dist.all_reduce(mine)
        dist.all_reduce(count)
        assert count.min() >= 1, f"{what}: the offsets leave holes"
        torch.testing.assert_close(mine / count, twin, atol=1e-6, rtol=0)


@_on(2, 4)
def verbs_write() -> None:
    g, flat = torch.Generator().manual_seed(2), _mesh()
    for what, twin, t in _cases(g):
        new = torch.randn(twin.shape, generator=torch.Generator().manual_seed(5))
        dtensor_ops.zero_(t)
        _same(t, torch.zeros_like(twin), f"zero_ {what}")
        for source in (new, distribute_tensor(new, flat, [Shard(new.ndim - 1)])):
            dtensor_ops.zero_(t)
            dtensor_ops.copy_(t, source)
            _same(t, new, f"copy_ {what}")
        twin.copy_(new)
        for axis in range(twin.ndim):
            n = twin.shape[axis]
            for index in ([], [0], [n - 1], [n - 1, 0, n // 2][: min(n, 3)] if n > 2 else [0]):
                shape = [len(index) if d == axis else s for d, s in enumerate(twin.shape)]
                rows = torch.randn(shape, generator=g, dtype=torch.float64)  # cast on the way
                dtensor_ops.write_rows(t, index, rows, axis)
                twin.index_copy_(axis, torch.tensor(index, dtype=torch.int64), rows.float())
                _same(t, twin, f"write_rows {index} along {axis} {what}")
        dtensor_ops.zero_rows(t, [0], twin.ndim - 1)
        twin.select(twin.ndim - 1, 0).zero_()
        _same(t, twin, f"zero_rows {what}")


@_on(2, 4)
def verbs_draw_and_fill() -> None:
    for what, twin, t in _cases(torch.Generator().manual_seed(3)):
        for bound in (None, 0.25):
            dtensor_ops.draw_(t, torch.Generator().manual_seed(9), bound=bound)
            want = dtensor_ops.draw(twin.shape, torch.Generator().manual_seed(9), bound=bound)
            _same(t, want, f"draw_ {bound} {what}")
    weight = torch.randn(10, 7, generator=torch.Generator().manual_seed(4))
    full = {r: (torch.zeros(r, 7), torch.zeros(10, r)) for r in (1, 3)}
    for word in ("kaiming", "olora", "pissa(niter=2)"):
        init: Any = Recipe.parse(word, r=1).init
        for r, (A, B) in full.items():
            want = Pair(nn.Parameter(A.clone()), nn.Parameter(B.clone()), 0.5)
            with torch.no_grad():
                init.fill(weight, want, torch.Generator().manual_seed(6))
            for (how, a), (_, b) in zip(_placed(A), _placed(B), strict=False):
                pair = Pair(nn.Parameter(a), nn.Parameter(b), 0.5)
                fill_(pair, init, weight, torch.Generator().manual_seed(6))
                _same(pair.A, want.A, f"fill_ {word} r={r} {how}")
                _same(pair.B, want.B, f"fill_ {word} r={r} {how}")


@_on(2, 4)
def verbs_outer_add() -> None:
    g = torch.Generator().manual_seed(7)
    for out, wide, k in ((8, 4, 2), (5, 7, 3), (1, 6, 1), (3, 2, 1)):
        W, A, B = (torch.randn(s, generator=g) for s in ((out, wide), (k, wide), (out, k)))
        want = W - 0.3 * B @ A
        for transposed in (False, True):
            stored = (W.T if transposed else W).contiguous()
            factors = itertools.cycle(zip(_placed(A), _placed(B), strict=False))
            for (how, t), ((how_a, a), (how_b, b)) in zip(_placed(stored), factors, strict=False):
                dtensor_ops.outer_add_(t, b, a, -0.3, transposed=transposed)
                what = f"outer_add_ {(out, wide)} {how}, {how_a}, {how_b} {transposed=}"
                _same(t, want.T if transposed else want, what, atol=1e-6)
    # Half precision is rounded once, from a float32 sum: to within half a unit in the last place of
    # its 8 digits, and what the sum's 3 products, its factor and W may have rounded before.
    W, A, B = (torch.randn(s, generator=g) for s in ((6, 8), (3, 8), (6, 3)))
    W = W.bfloat16()
    exact = W.double() + 0.01 * B.double() @ A.double()
    half = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 9)
    sizes = W.double().abs() + 0.01 * B.double().abs() @ A.double().abs()
    before = rounding(torch.float32, 5, sizes.max().item())
    for how, w in _placed(W):
        dtensor_ops.outer_add_(w, B, A, 0.01)
        far = (dtensor_ops.read_full(w).double() - exact).abs()
        assert w.dtype == torch.bfloat16 and (far <= half + before).all(), f"bfloat16 {how}"


@_on(2, 4)
def verbs_reduce() -> None:
    cases = list(_cases(torch.Generator().manual_seed(8)))
    got = dtensor_ops.reduce_scalar(
        [t for _, _, t in cases]
    )  # plain and differently sharded together
    assert all(value == got for value in _on_every_process(got))
    for (what, twin, t), value in zip(cases, got, strict=True):
        want = twin.square().sum().item()
        assert abs(value - want) <= 1e-5 * want, f"reduce_scalar {what}: {value} for {want}"
        alone = dtensor_ops.reduce_scalar([t])
        assert abs(alone[0] - want) <= 1e-5 * want, f"reduce_scalar alone {what}"
    assert dtensor_ops.reduce_scalar([]) == []


@_on(2, 4)
def verbs_optimizer_state() -> None:
    """Rows of moments and of step counts kept per row (plain tensors beside sharded moments)."""
    for what, twin, t in _cases(torch.Generator().manual_seed(9), ((5, 7), (2, 9), (1, 6), (9, 1))):
        for axis in range(twin.ndim):
            held = [nn.Parameter(x.clone()) for x in (twin, t)]
            optimizers = [torch.optim.AdamW([p], lr=0.1, amsgrad=True) for p in held]
            for p, optimizer in zip(held, optimizers, strict=True):
                p.grad = p.detach() * 2
                optimizer.step()
                per_row = [p.shape[d] if d == axis else 1 for d in range(p.ndim)]
                optimizer.state[p]["count"] = torch.arange(1.0, p.shape[axis] + 1).view(per_row)
            index = [twin.shape[axis] - 1]
            before = [dtensor_ops.read_full(p.detach()).clone() for p in held]
            for p, optimizer in zip(held, optimizers, strict=True):
                dtensor_ops.zero_rows(p, index, axis, optimizer)
            label = f"zero_rows of state, {what}, axis {axis}"
            for p, value in zip(held, before, strict=True):
                _same(p.detach(), value, f"{label}: the parameter itself stays")
            want, got = (o.state[p] for p, o in zip(held, optimizers, strict=True))
            assert list(got) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "count"]
            for name in got:
                _same(got[name], want[name], f"{label}: {name}")
                if name != "step":
                    whole = dtensor_ops.read_full(got[name])
                    assert not whole.select(axis, index[0]).any(), f"{label}: {name} not reset"
                    rest = whole.index_select(axis, torch.arange(index[0]))
                    assert rest.numel() == 0 or rest.abs().sum() > 0, f"{label}: {name} all reset"
            assert got["step"] == 1
            dtensor_ops.reset_state(optimizers[1], held[1])
            assert not any(dtensor_ops.read_full(v).any() for v in got.values()), (
                f"reset_state {what}"
            )


# -- moves on a model ------------------------------------------------------------------------------


def _moved(
    adapters: lorica.Adapters, optimizer: torch.optim.Optimizer, *, divided: bool
) -> list[Tensor]:
    """Logits before, after a swap of A, a swap of B and a merge, in every layer."""
    _train(adapters.model, adapters, optimizer, range(2), divided=divided)
    seen = [_logits(adapters)]
    for side in "AB":
        for name, layer in adapters:
            _swap(layer, optimizer, side, seeded(f"{side}/{name}"))
        seen.append(_logits(adapters))
    for name, layer in adapters:
        weight_edits.merge_(
            layer, optimizer, link=1, init=adapters.recipe.init, generator=seeded(f"merge/{name}")
        )
    return [*seen, _logits(adapters)]


def _moves_keep(method: str, *, axis: int = 0, make: Callable[[], Any] = _llama, r: int = 3,
                atol: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    one = _adapted(method, make=make, dtype=dtype, schedules=(), r=r)
    many = _adapted(method, make=make, dtype=dtype, schedules=(), r=r)
    _shard(many, axis=axis)
    want = _moved(one, _optimizer(one), divided=False)
    optimizer = _optimizer(many)
    got = _moved(many, optimizer, divided=True)
    for logits, twin in zip(got, want, strict=True):
        torch.testing.assert_close(logits, got[0], atol=atol, rtol=0)
        torch.testing.assert_close(logits, twin, atol=atol, rtol=0)
    fresh = [p for _, pair in many.pairs() for p in (pair.A, pair.B)]
    assert all(
        not dtensor_ops.read_full(v).any() for p in fresh for v in optimizer.state[p].values()
    )
    _equal_states(many.state_dict(), one.state_dict(), atol)


@_on(2, 4)
def moves_keep_the_function() -> None:
    _moves_keep("dora+olora", r=2)  # 4 processes: half of them hold nothing of A
    if dist.get_world_size() == 2:
        _moves_keep("lora")


@_on(2)
def moves_keep_the_function_transposed() -> None:
    _moves_keep("dora+pissa", make=_gpt2, dtype=torch.float64, atol=1e-9)  # an SVD magnifies
    _moves_keep("lora", make=_gpt2, r=1)


@_on(2)
def moves_keep_the_function_along_columns() -> None:
    _moves_keep("dora+olora", make=lambda: _llama(46), axis=1, r=4)


# -- training --------------------------------------------------------------------------------------


def _follows(
    method: str,
    *,
    wrap: Callable[[lorica.Adapters], nn.Module],
    atol: float = 1e-9,
    steps: int = 6,
    rests: bool = False,
    **options: Any,
) -> None:
    """`rests`: some layers have no gradient for a while."""
    one, many = _adapted(method, **options), _adapted(method, **options)
    model = wrap(many)
    total = {"total_steps": 2 * steps}
    want = _train(one.model, one, _optimizer(one, **total), range(steps), divided=False)
    optimizer = _optimizer(many, **total)
    got = _train(model, many, optimizer, range(steps), divided=True)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= atol, (got, want)
    _equal_states(many.state_dict(), one.state_dict(), atol)
    assert len(set(_on_every_process(many.fingerprint()))) == 1
    own = optimizer.param_groups[0][KEY]
    assert own["step"] == steps and (rests or bool(own["seen"].all()))
    start = _adapted(method, **options).state_dict()
    end = many.state_dict()
    moved = max((end[n] - v).abs().max().item() for n, v in start.items() if n in end)
    assert moved > 1e-3, "nothing has moved, so nothing was compared"


def _sharded(mesh: Callable[[], DeviceMesh] = _mesh) -> Callable[[lorica.Adapters], nn.Module]:
    def wrap(adapters: lorica.Adapters) -> nn.Module:
        _shard(adapters, mesh())
        return adapters.model

    return wrap


def _ddp(adapters: lorica.Adapters) -> nn.Module:
    return DistributedDataParallel(adapters.model)


@_on(2)
def training_on_shards() -> None:
    _follows("lora", wrap=_sharded())
    _follows("dora+olora", wrap=_sharded())


@_on(2)
def training_on_shards_float32() -> None:
    _follows("lora", wrap=_sharded(), dtype=torch.float32, atol=1e-5)
    _follows("dora+olora", wrap=_sharded(), dtype=torch.float32, atol=1e-5, schedules=())


@_on(2)
def training_on_shards_transposed() -> None:
    _follows("dora+olora", wrap=_sharded(), make=_gpt2)
    _follows("loraplus+pissa", wrap=_sharded(), make=_gpt2, r=1, bias="all", schedules=())


def _sharing() -> list[str]:
    """Methods whose layers read the same frozen tensors."""
    deltas = registry.names("deltas")
    return [w for w in deltas if issubclass(registry.find(w, "deltas"), SharesTensors)]


@_on(2)
def shared_tensors_train_under_fsdp2_and_ddp() -> None:
    """Every layer is a unit of FSDP2, and no parameter is ignored; also on a base of half
    precision, in which the forward then reads what is shared."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for method in _sharing():
        for wrap in (_sharded(), _ddp):
            _follows(method, wrap=wrap, schedules=(), r=5)
        _follows(f"dora+{method}", wrap=_sharded(), schedules=(), make=_gpt2, r=5)
        half = {"dtype": torch.float32, "base": torch.bfloat16, "schedules": (), "r": 5}
        many = _adapted(method, **half)
        _shard(many, policy=mixed)
        losses = _train(many.model, many, _optimizer(many), range(3), divided=True)
        assert len(set(losses)) == 3 and len(set(_on_every_process(many.fingerprint()))) == 1


@_on(4)
def training_on_empty_shards_and_replicas() -> None:
    _follows("dora+olora", wrap=_sharded(), r=2)
    _follows("lora", wrap=_sharded(lambda: _mesh(2, 2)), r=1)


@_on(2)
def training_in_full_on_shards() -> None:
    _follows("full", wrap=_sharded(), schedules=(), r=None)


@_on(2)
def half_precision_base_on_shards() -> None:
    """A bfloat16 base beside float32 adapters in one unit, with FSDP2's mixed precision (forward
    sees the adapters in bfloat16) and without."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for policy in (MixedPrecisionPolicy(), mixed):
        one, many = (_adapted("dora+olora", dtype=torch.float32, base=torch.bfloat16) for _ in "12")
        _shard(many, policy=policy)
        want = _train(one.model, one, _optimizer(one), range(4), divided=False)
        optimizer = _optimizer(many)
        got = _train(many.model, many, optimizer, range(4), divided=True)
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 2e-2, (got, want)
        held = [t.parameter for t in many.trained()]
        assert {p.dtype for p in held} == {torch.float32}
        assert {optimizer.state[p]["exp_avg"].dtype for p in held} == {torch.float32}
        assert len(set(_on_every_process(many.fingerprint()))) == 1


@_on(2)
def ddp_follows_one_process() -> None:
    for method in ("lora", "dora+olora"):
        _follows(method, wrap=_ddp)
        _follows(method, wrap=_ddp, dtype=torch.float32, atol=1e-5, schedules=())


@_on(2)
def starts_from_data_are_the_same_on_every_process() -> None:
    """From batches of each process' own, and from the same ones on all, which is then the start
    that one process makes."""
    torch.manual_seed(0)
    model = _llama()
    for word in registry.names("inits"):
        kind = registry.find(word)
        if not issubclass(kind, StartsFromData):
            continue

        def begin(first: int, word: str = word) -> dict[str, Tensor]:
            ids = [_tokens(i) for i in range(first, first + 3)]
            seen = [{"input_ids": i, "labels": i} for i in ids]
            method = f"{word}(batches=3)"
            base = copy.deepcopy(model)
            adapters = lorica.attach(base, method, r=3, data=seen, verbose=False)
            pairs = {n: (p.A.detach(), p.B.detach()) for n, p in adapters.pairs()}
            return {f"{n}.{i}": t for n, both in pairs.items() for i, t in enumerate(both)}

        own = begin(10 * dist.get_rank())
        for other in _on_every_process(own):
            _equal_states(other, own, 0)
        same = begin(0)
        alone = _on_every_process(same)[0]
        _equal_states(same, alone, 0)
        assert any(t.shape != own[n].shape or not torch.equal(t, own[n]) for n, t in same.items())
        world = dtensor_ops.dist.get_world_size
        try:
            dtensor_ops.dist.get_world_size = lambda *_: 1  # as if there were one process
            single = begin(0)
        finally:
            dtensor_ops.dist.get_world_size = world
        for name, t in single.items():  # signs are free
            _same(t.abs(), same[name].abs(), f"{word} {name}", atol=1e-3 * float(t.abs().max() + 1))


@_on(2)
def tensors_of_every_process_are_stacked() -> None:
    rank = dist.get_rank()
    got = dtensor_ops.gather_processes(torch.full((2, 3), float(rank)))
    assert got.shape == (2, 2, 3) and got[:, 0, 0].tolist() == [0.0, 1.0]


INTERVALS = ("every", "interval", "update_proj_gap", "deltaT")


def _with_events() -> Iterator[tuple[str, Any]]:
    """(method, its class) of every schedule, and every rule over whole weights, with an event in
    each second step."""
    for room in ("schedules", "rules"):
        for word in registry.names(room):
            kind = registry.find(word)
            fields = {f.name for f in dataclasses.fields(kind)}
            interval = next((f"({name}=2)" for name in INTERVALS if name in fields), None)
            if interval is not None:
                yield word + interval, kind
    yield "relora(every=2, warm_start=3)", registry.find("relora")
    yield "relora(every=2)+dora+olora", registry.find("relora")


@_on(2)
def ddp_with_events_follows_one_process() -> None:
    def wrap(adapters: lorica.Adapters) -> nn.Module:
        return DistributedDataParallel(adapters.model, find_unused_parameters=True)

    for method, kind in _with_events():
        r = None if kind.only_r else 3
        _follows(method, wrap=wrap, schedules=None, r=r, rests=True)


@_on(2)
def events_on_shards_follow_one_process() -> None:
    tried = 0
    for method, kind in _with_events():
        if "sharded" in kind.gives:
            r = None if kind.only_r else 3
            _follows(method, wrap=_sharded(), schedules=None, r=r, rests=True)
            tried += 1
    assert tried >= 2


def _with_objectives(
    adapters: lorica.Adapters, optimizer: torch.optim.Optimizer, steps: range, *, divided: bool
) -> list[float]:
    """As `_train`, the recipe's objectives applied; the task's loss in the model's own dtype."""
    losses = []
    for step in steps:
        ids = _tokens(step)
        ids = ids.chunk(dist.get_world_size())[dist.get_rank()] if divided else ids
        outputs = adapters.model(input_ids=ids)
        task = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        outputs["loss"] = task
        loss = adapters.loss(outputs, {"input_ids": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if divided:
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        losses.append(whole.item())
    return losses


@_on(2, 4)
def fading_on_shards_follows_one_process() -> None:
    """Distillation, the fade to 0, steps without the base; λ read where it is gathered and where
    it is not, and again after it was loaded."""
    for method in ("pclora(fade=0.5)", "pclora(fade=0.5, shape='identity')+pissa"):
        one, many = (_adapted(method, schedules=None, bias="all") for _ in "12")
        _shard(many)
        held = [_optimizer(a, total_steps=6) for a in (one, many)]
        start, seen = copy.deepcopy(one.state_dict()), []
        for steps in (range(2), range(2, 6)):
            want = _with_objectives(one, held[0], steps, divided=False)
            got = _with_objectives(many, held[1], steps, divided=True)
            assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1e-9, (got, want)
            _equal_states(many.state_dict(), one.state_dict(), 1e-9)
            torch.testing.assert_close(_logits(many), _logits(one), atol=1e-9, rtol=0)
            shares = {layer.combine.number for _, layer in many}  # type: ignore[operator]
            assert len(shares) == 1 and len(set(map(str, _on_every_process(shares)))) == 1
            seen += [*shares]
        assert seen[1] == 0 < seen[0] <= 1
        _logits(many)  # what a forward knew of λ is forgotten by loading
        many.load_state_dict(start)
        one.load_state_dict(start)
        torch.testing.assert_close(_logits(many), _logits(one), atol=1e-9, rtol=0)
        assert {layer.combine.number for _, layer in many} == {1.0}  # type: ignore[operator]


@_on(2)
def drift_is_seen() -> None:
    adapters = _adapted("dora+olora")
    assert len(set(_on_every_process(adapters.fingerprint()))) == 1
    pair = next(pair for _, pair in adapters.pairs())
    with torch.no_grad():
        pair.B[0, 0] += 1e-12 * dist.get_rank()
    assert len(set(_on_every_process(adapters.fingerprint()))) == dist.get_world_size()
    adapters = _adapted("lora")  # its schedule edits the base, so the base counts
    with torch.no_grad():
        next(layer for _, layer in adapters).store.parameter[0, 0] += 1e-6 * dist.get_rank()
    assert len(set(_on_every_process(adapters.fingerprint()))) == dist.get_world_size()


# -- checkpoints -----------------------------------------------------------------------------------


def _bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _resume(save: Callable[..., Any], load: Callable[..., None]) -> None:
    def sharded() -> tuple[lorica.Adapters, torch.optim.Optimizer]:
        adapters = _adapted("dora+olora", dtype=torch.float32)
        _shard(adapters)
        return adapters, _optimizer(adapters)

    adapters, optimizer = sharded()
    losses = _train(adapters.model, adapters, optimizer, range(3), divided=True)
    saved = save(adapters.model, optimizer)
    at_cut = {n: v.clone() for n, v in adapters.state_dict().items()}
    losses += _train(adapters.model, adapters, optimizer, range(3, 7), divided=True)

    again, resumed = sharded()
    assert not _bits(again.state_dict(), at_cut)
    load(again.model, resumed, saved)
    own = resumed.param_groups[0][KEY]
    assert own["step"] == 3 and bool(own["seen"].all()), own
    (state,) = own["schedules"].values()
    assert state["merges"] == 1 and state["swaps"].sum() == 2 * len(again), state
    assert _bits(again.state_dict(), at_cut), "loading edited the weights"
    tail = _train(again.model, again, resumed, range(3, 7), divided=True)
    assert tail == losses[3:]
    assert _bits(again.state_dict(), adapters.state_dict()), "the resumed run differs"


@_on(2)
def checkpoint_sharded_on_disk() -> None:
    """torch.distributed.checkpoint writes each process's shards, and loads into a template."""

    def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        # One folder for all processes.
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        write_shards(state, checkpoint_id=folder[0])
        return str(folder[0])

    def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
        start = {n: dtensor_ops.read_full(p).clone() for n, p in model.named_parameters()}
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),  # steps a fresh optimizer
        }
        assert optimizer.state, "the API took no fake step, so this proves nothing"
        assert optimizer.param_groups[0][KEY]["step"] == 0
        assert _bits({n: dtensor_ops.read_full(p) for n, p in model.named_parameters()}, start)
        read_shards(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    _resume(save, load)


@_on(2)
def checkpoint_full_in_memory() -> None:
    """Whole tensors, gathered on rank 0 and broadcast from there."""
    save_options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    load_options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def save(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        model_state = get_model_state_dict(model, options=save_options)
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=save_options)
        return copy.deepcopy((model_state, optimizer_state))  # as on disk: the run goes on

    def load(model: nn.Module, optimizer: torch.optim.Optimizer, saved: tuple) -> None:
        # The model after the optimizer would hide an edit by the fake step.
        set_model_state_dict(model, saved[0], options=load_options)
        set_optimizer_state_dict(model, optimizer, saved[1], options=load_options)

    _resume(save, load)


@_on(2)
def warm_up_from_zero_counts() -> None:
    """A first step at rate 0 has gradients, so it is no fake step."""
    adapters = _adapted("lora")
    _shard(adapters)
    optimizer = _optimizer(adapters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _train(adapters.model, adapters, optimizer, range(1), divided=True)
    assert optimizer.param_groups[0][KEY]["step"] == 1


@_on(2)
def state_dict_of_shards() -> None:
    for schedules in ((), (Moving(),)):
        one = _adapted("dora+olora", schedules=schedules, modules_to_save=("lm_head",))
        many = _adapted("dora+olora", schedules=schedules, modules_to_save=("lm_head",))
        _shard(many)
        state = many.state_dict()
        assert not any(isinstance(v, DTensor) for v in state.values())
        assert _bits(state, one.state_dict())
        assert many.fingerprint() == one.fingerprint() and many.hash_base() == one.hash_base()
        new = _drawn(state)
        many.load_state_dict(new)
        one.load_state_dict(new)
        assert _bits(many.state_dict(), new)
        torch.testing.assert_close(_logits(many), _logits(one), atol=1e-9, rtol=1e-9)
        _refuses(lambda: many.load_state_dict({}), "missing")  # noqa: B023


@_on(2)
def loading_after_an_evaluation() -> None:
    """After a forward without backward the root unit holds plain copies: a write into those would
    be lost at the next reshard."""
    many = _adapted("dora", schedules=(), modules_to_save=("lm_head",))
    fully_shard(many.model, mesh=_mesh())  # everything is the root's
    one = _adapted("dora", schedules=(), modules_to_save=("lm_head",))
    new = _drawn(one.state_dict())
    _logits(many)
    assert _bits(many.state_dict(), one.state_dict())
    many.load_state_dict(new)
    one.load_state_dict(new)
    assert _bits(many.state_dict(), new)
    torch.testing.assert_close(_logits(many), _logits(one), atol=1e-9, rtol=1e-9)
    optimizers = [_optimizer(one), _optimizer(many)]
    want = _train(one.model, one, optimizers[0], range(2), divided=False)
    got = _train(many.model, many, optimizers[1], range(2), divided=True)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    _equal_states(many.state_dict(), one.state_dict(), 1e-9)


# -- refusals and the start-up watch ---------------------------------------------------------------


@_on(2)
def wrong_order_is_refused() -> None:
    adapters = _adapted("lora")
    optimizer = _optimizer(adapters)
    _shard(adapters)
    _refuses(
        lambda: _train(adapters.model, adapters, optimizer, range(1), divided=True),
        "replaced after it was made",
        "Shard the model first",
    )
    model = _llama()
    fully_shard(model, mesh=_mesh())
    before = [n for n, _ in model.named_parameters()]
    _refuses(lambda: lorica.attach(model, "lora", verbose=False), "attach first, shard then")
    assert [n for n, _ in model.named_parameters()] == before


@_on(2)
def silent_adapter_is_named() -> None:
    for r in (3, 1):  # r=1: rank 1 holds nothing of A
        adapters = _adapted("lora", schedules=(), r=r)
        silent = next(name for name, _ in adapters)
        _shard(adapters)
        pair = adapters.layers[silent].update.delta.pair()
        assert pair is not None
        dtensor_ops.zero_(pair.A)  # both factors 0: neither has a gradient
        optimizer = _optimizer(adapters)
        _train(adapters.model, adapters, optimizer, range(WATCHED_STEPS - 1), divided=True)
        seen = optimizer.param_groups[0][KEY]["seen"]
        assert not seen[0] and bool(seen[1:].all())
        _refuses(
            lambda: _train(adapters.model, adapters, optimizer, range(1), divided=True),  # noqa: B023
            "1 adapter(s) had no gradient",
            silent,
        )


@_on(2)
def gradient_on_one_process_is_enough() -> None:
    """The watch sums over the shards: a gradient whose non-zero rows all lie elsewhere counts."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    adapters = lorica.attach(model, "lora", r=2, verbose=False)
    fully_shard(model, mesh=_mesh())
    optimizer = lorica.optimizer(adapters, 1e-2)
    model(torch.ones(2, 4))[:, -1].sum().backward()  # B is 0, and of its gradient all but a row
    if dist.get_rank() == 0:
        grads = [dtensor_ops.shard_of(t.parameter.grad)[0] for t in adapters.trained()]  # type: ignore[arg-type]
        assert not any(g.any() for g in grads), "rank 0 was to see nothing"
    optimizer.step()
    assert bool(optimizer.param_groups[0][KEY]["seen"].all())
