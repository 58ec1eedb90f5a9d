"""Faults planted into a method through its axis' contract, to see whether its own tests notice.

A fault changes what a method computes and keeps every interface intact: forward and weight of a
delta change together, so that the conformance tests, which compare the two, see nothing. Only a
test that compares with the method's equations can.

As a pytest plugin (`-p faults`) it plants the fault named in the environment,
`LORICA_FAULT=method:fault`, and writes what happened to the file `LORICA_FAULT_REPORT`:

    acted     how often the fault changed something
    caught    the first test that failed
    broke     the traceback's end, where the fault itself is what raised
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

import lorica
from lorica.interfaces import Factors
from lorica.methods.choice import AXES, method_name
from lorica.methods.optional import SharesTensors
from lorica.recipe import registry

Plant = Callable[[type], None]
PLANTS: dict[str, dict[str, tuple[Plant, Callable[[type], bool]]]] = {axis: {} for axis in AXES}
acted = 0


def act() -> None:
    global acted
    acted += 1


def fault(axis: str, name: str, applies: Callable[[type], bool] = lambda cls: True) -> Any:
    """Registers a function that plants a fault into a choice's class."""

    def keep(plant: Plant) -> Plant:
        PLANTS[axis][name] = plant, applies
        return plant

    return keep


def faults_of(word: str) -> list[str]:
    """The faults that apply to a method."""
    cls = registry.find(word)
    return [name for name, (_, applies) in PLANTS[cls.axis].items() if applies(cls)]


# -- helpers ---------------------------------------------------------------------------------------


def wrapped(owner: type, name: str) -> Callable[[Callable[..., Any]], None]:
    """Puts a function in place of a method; it gets the original as its first argument. A call that
    the original makes of the same object meets the original: the fault is applied once."""
    original = getattr(owner, name)
    active: set[tuple[int, str]] = set()

    def put(new: Callable[..., Any]) -> None:
        @functools.wraps(original)
        def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (key := (id(self), name)) in active:
                return original(self, *args, **kwargs)
            active.add(key)
            try:
                return new(functools.partial(original, self), self, *args, **kwargs)
            finally:
                active.discard(key)

        setattr(owner, name, outer)

    return put


def with_module(cls: type, make: Callable[[type], dict[str, Any]]) -> None:
    """Modules that the choice builds get a class with these methods in place of their own."""
    made: dict[type, type] = {}
    original = cls.build  # type: ignore[attr-defined]

    def build(self: Any, site: Any) -> Any:
        module = original(self, site)
        kind = type(module)
        if kind not in made:
            made[kind] = type(kind.__name__, (kind,), make(kind))
            made[kind].__module__, made[kind].__qualname__ = kind.__module__, kind.__qualname__
        module.__class__ = made[kind]
        return module

    cls.build = build  # type: ignore[attr-defined]


class Fewer:
    """Adapters without their last layer, or with the first alone."""

    def __init__(self, adapters: Any, kept: Callable[[list[str]], list[str]]) -> None:
        self._adapters = adapters
        names = kept(list(adapters.layers))
        self.layers = {n: adapters.layers[n] for n in names}
        if len(self.layers) < len(adapters.layers):
            act()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapters, name)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.layers.items())

    def __len__(self) -> int:
        return len(self.layers)

    def pairs(self) -> Iterator[tuple[str, Any]]:
        return ((n, p) for n, p in self._adapters.pairs() if n in self.layers)

    def trained(self) -> list[Any]:
        return [t for t in self._adapters.trained() if t.site in self.layers]


# -- deltas ----------------------------------------------------------------------------------------


def changed_delta(
    output: Callable[[Tensor], Tensor], weight: Callable[[Tensor], Tensor],
    factors: Callable[[Factors], Factors],
) -> Plant:  # fmt: skip
    """forward, weight and factors changed alike, each once: one may call another."""

    def plant(cls: type) -> None:
        def make(kind: type) -> dict[str, Any]:
            inside: set[int] = set()

            def method(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
                original = getattr(kind, name)

                def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                    if id(self) in inside:
                        return original(self, *args, **kwargs)
                    inside.add(id(self))
                    try:
                        value = original(self, *args, **kwargs)
                    finally:
                        inside.discard(id(self))
                    if value is None:
                        return None
                    act()
                    return change(value)

                return call

            return {
                "forward": method("forward", output),
                "weight": method("weight", weight),
                "factors": method("factors", factors),
            }

        with_module(cls, make)

    return plant


def wraps(cls: type) -> bool:
    return cls.wraps  # type: ignore[attr-defined]


def shares(cls: type) -> bool:
    return issubclass(cls, SharesTensors)


fault("deltas", "scale doubled", wraps)(
    changed_delta(
        lambda y: 2 * y, lambda w: 2 * w, lambda f: dataclasses.replace(f, scale=2 * f.scale)
    )
)
fault("deltas", "rows of a factor reversed", wraps)(
    changed_delta(
        lambda y: y.flip(-1), lambda w: w.flip(0), lambda f: dataclasses.replace(f, B=f.B.flip(0))
    )
)


@fault("deltas", "shared tensors drawn per layer", shares)
def own_draws(cls: type) -> None:
    def make(kind: type) -> dict[str, Any]:
        original = kind.read_shared  # type: ignore[attr-defined]

        def read_shared(self: Any, name: str) -> Tensor:
            act()
            t = original(self, name)
            generator = torch.Generator().manual_seed(crc32(self.site.name.encode()))
            order = torch.randperm(t.numel(), generator=generator).to(t.device)
            return t.flatten()[order].view(t.shape)

        return {"read_shared": read_shared}

    with_module(cls, make)


@fault("deltas", "parameters of one layer used in all", lambda c: wraps(c) and not shares(c))
def one_for_all(cls: type) -> None:
    original = cls.build  # type: ignore[attr-defined]
    seen: set[str] = set()
    first: dict[Any, torch.nn.Parameter] = {}

    def build(self: Any, site: Any) -> Any:
        module = original(self, site)
        if site.name in seen:  # another model
            seen.clear()
            first.clear()
        seen.add(site.name)
        for path, p in list(module.named_parameters()):
            key = path, p.shape, p.dtype, p.device, site.scale
            if key in first:
                act()
                owner, _, name = path.rpartition(".")
                module.get_submodule(owner).register_parameter(name, first[key])
            first.setdefault(key, p)
        return module

    cls.build = build  # type: ignore[attr-defined]


# -- inits -----------------------------------------------------------------------------------------


def changed_start(change: Callable[[Any], None]) -> Plant:
    def plant(cls: type) -> None:
        for name in ("fill", "fill_from"):
            if name in vars(cls):

                @wrapped(cls, name)
                def fill(original: Any, self: Any, *args: Any) -> None:
                    original(*args)
                    pair = next(a for a in args if isinstance(getattr(a, "A", None), Tensor))
                    act()
                    with torch.no_grad():
                        change(pair)

    return plant


fault("inits", "scale doubled")(changed_start(lambda pair: pair.A.mul_(2)))
fault("inits", "columns of a factor reversed")(
    changed_start(lambda pair: pair.A.copy_(pair.A.flip(1).clone()))
)
fault("inits", "ranks of a factor reversed")(
    changed_start(lambda pair: pair.A.copy_(pair.A.flip(0).clone()))
)


# -- combines --------------------------------------------------------------------------------------


def changed_weight(change: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    """Forward and effective weight of a combine changed alike.

    Args:
        change: (W + ΔW, effective weight) -> another effective weight, all (out, in).
    """

    def plant(cls: type) -> None:
        def make(kind: type) -> dict[str, Any]:
            def effective(self: Any, base: Any, update: Any) -> tuple[Tensor, Tensor | None]:
                weight, bias = kind.effective(self, base, update)  # type: ignore[attr-defined]
                act()
                return change(base.weight().to(weight.dtype) + update.weight(base), weight), bias

            def forward(self: Any, x: Tensor, base: Any, update: Any, kernel: Any) -> Tensor:
                weight, bias = effective(self, base, update)
                rows = weight.T[x] if base.lookup else x @ weight.T.to(x.dtype)
                return rows if bias is None else rows + bias.to(rows.dtype)

            return {"effective": effective, "forward": forward}

        with_module(cls, make)

    return plant


def gains(v: Tensor, weight: Tensor) -> Tensor:
    """What scales each row (out, 1)."""
    norms = torch.finfo(v.dtype).tiny
    return weight.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True).clamp_min(norms)


fault("combine", "gain doubled")(changed_weight(lambda v, w: 2 * w))
fault("combine", "gains of the wrong outputs")(changed_weight(lambda v, w: gains(v, w).flip(0) * v))
fault("combine", "magnitude along the wrong dimension")(
    changed_weight(lambda v, w: w * (w.norm(dim=0, keepdim=True) / v.norm(dim=0).clamp_min(1e-30)))
)


# -- scales and ranks ------------------------------------------------------------------------------


@fault("scales", "scale doubled")
def double_scale(cls: type) -> None:
    @wrapped(cls, "factor")
    def factor(original: Any, self: Any, *args: Any) -> float:
        act()
        return 2 * original(*args)


@fault("scales", "another rank's scale")
def other_rank(cls: type) -> None:
    @wrapped(cls, "factor")
    def factor(original: Any, self: Any, alpha: Any, r: int) -> float:
        act()
        return original(alpha, r + 1)


@fault("scales", "alpha squared")
def alpha_squared(cls: type) -> None:
    @wrapped(cls, "factor")
    def factor(original: Any, self: Any, alpha: Any, r: int) -> float:
        act()
        return original(alpha and alpha * alpha, r)


def changed_ranks(change: Callable[[list[Any]], list[Any]]) -> Plant:
    def plant(cls: type) -> None:
        @wrapped(cls, "assign")
        def assign(original: Any, self: Any, *args: Any) -> dict[str, Any]:
            act()
            given = original(*args)
            return dict(zip(given, change(list(given.values())), strict=True))

    return plant


fault("ranks", "layers in reverse order")(changed_ranks(lambda given: given[::-1]))
fault("ranks", "one rank more")(changed_ranks(lambda given: [(r + 1, a) for r, a in given]))
fault("ranks", "the first layer's rank in all")(
    changed_ranks(lambda given: [given[0]] * len(given))
)


# -- schedules -------------------------------------------------------------------------------------


@fault("schedules", "a step early")
def early(cls: type) -> None:
    for name in ("before_step", "after_step"):

        @wrapped(cls, name)
        def step(original: Any, self: Any, state: Any, training: Any) -> None:
            act()
            training.step += 1
            try:
                original(state, training)
            finally:
                training.step -= 1


INTERVALS = ("every", "interval", "update_proj_gap", "deltaT")


def has_interval(cls: type) -> bool:
    return any(f.name in INTERVALS for f in dataclasses.fields(cls))


@fault("schedules", "interval doubled", has_interval)
def doubled(cls: type) -> None:
    @wrapped(cls, "fit")
    def fit(original: Any, self: Any, total_steps: int | None) -> Any:
        act()
        fitted = original(total_steps)
        made = object.__new__(type(fitted))
        vars(made).update(vars(fitted))
        for name in INTERVALS:
            if isinstance(value := getattr(fitted, name, None), int):
                object.__setattr__(made, name, 2 * value)
        return made


@fault("schedules", "every second step left out", lambda cls: not has_interval(cls))
def every_second(cls: type) -> None:
    for name in ("before_step", "after_step"):

        @wrapped(cls, name)
        def step(original: Any, self: Any, state: Any, training: Any) -> None:
            if training.step % 2:
                act()
            else:
                original(state, training)


@fault("schedules", "all but the last layer")
def but_the_last(cls: type) -> None:
    def most(names: list[str]) -> list[str]:
        return names[:-1] if len(names) > 1 else names

    @wrapped(cls, "init")
    def init(original: Any, self: Any, adapters: Any) -> Any:
        return original(Fewer(adapters, most))

    for name, at in (("before_step", 1), ("after_step", 1), ("restore", 1)):

        @wrapped(cls, name)
        def step(original: Any, self: Any, *args: Any, at: int = at) -> None:
            training = args[at]
            adapters, training.adapters = training.adapters, Fewer(training.adapters, most)
            try:
                original(*args)
            finally:
                training.adapters = adapters


# -- groups ----------------------------------------------------------------------------------------

OTHER_SIDE = {"A": "B", "B": "A"}


@fault("groups", "the other side")
def other_side(cls: type) -> None:
    cls.freezes = frozenset(OTHER_SIDE.get(r, r) for r in cls.freezes)  # type: ignore[attr-defined]
    if "adjust" in vars(cls):

        @wrapped(cls, "adjust")
        def adjust(original: Any, self: Any, trained: Any, options: Any) -> Any:
            role = OTHER_SIDE.get(trained.role, trained.role)
            return original(dataclasses.replace(trained, role=role), options)

    act()


@fault("groups", "both sides")
def both_sides(cls: type) -> None:
    if cls.freezes:  # type: ignore[attr-defined]
        cls.freezes = frozenset()  # type: ignore[attr-defined]
    if "adjust" in vars(cls):

        @wrapped(cls, "adjust")
        def adjust(original: Any, self: Any, trained: Any, options: Any) -> Any:
            if trained.role not in OTHER_SIDE:
                return original(trained, options)
            for role in OTHER_SIDE:
                options = original(dataclasses.replace(trained, role=role), options)
            return options

    act()


@fault("groups", "first layer only")
def first_group_only(cls: type) -> None:
    if "adjust" not in vars(cls):
        from lorica.model.adapters import Adapters

        trained, freezes = Adapters.trained, cls.freezes  # type: ignore[attr-defined]
        cls.freezes = frozenset()  # type: ignore[attr-defined]

        def some(self: Any) -> list[Any]:
            out = trained(self)
            first = out[0].site if out else None
            act()
            return [t for t in out if t.site != first or t.role not in freezes]

        Adapters.trained = some  # type: ignore[method-assign]
        return
    first: list[str] = []

    @wrapped(cls, "adjust")
    def adjust(original: Any, self: Any, trained: Any, options: Any) -> Any:
        first[:] = first or [trained.site]
        if trained.site == first[0]:
            return original(trained, options)
        act()
        return options


# -- rules -----------------------------------------------------------------------------------------


def changed_step(around: Callable[[torch.optim.Optimizer], Any]) -> Plant:
    """Every real step of the rule's optimizer within a context."""

    def plant(cls: type) -> None:
        original = cls.build  # type: ignore[attr-defined]
        made: dict[type, type] = {}

        def build(self: Any, *args: Any) -> torch.optim.Optimizer:
            optimizer = original(self, *args)
            kind = type(optimizer)
            if kind not in made:

                def step(self: Any, *args: Any, **kwargs: Any) -> Any:
                    with around(self):
                        return kind.step(self, *args, **kwargs)

                made[kind] = type(kind.__name__, (kind,), {"step": step})
            optimizer.__class__ = made[kind]
            return optimizer

        cls.build = build  # type: ignore[attr-defined]

    return plant


@contextlib.contextmanager
def double_rate(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    rates = [g["lr"] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["lr"] = 2 * g["lr"]
    act()
    yield
    for g, rate in zip(optimizer.param_groups, rates, strict=True):
        g["lr"] = rate


def rotated(values: list[Tensor]) -> None:
    """Each tensor's content into the next one."""
    with torch.no_grad():
        copies = [v.clone() for v in values]
        for v, other in zip(values, [copies[-1], *copies[:-1]], strict=True):
            v.copy_(other)


@contextlib.contextmanager
def others_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """State of a parameter goes to another of the same shape, or to the reverse of its own."""
    yield
    alike: dict[Any, list[Tensor]] = {}
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                alike.setdefault((tuple(p.shape), name, tuple(value.shape)), []).append(value)
    for values in alike.values():
        act()
        if len(values) > 1:
            rotated(values)
        else:
            values[0].copy_(values[0].flatten().flip(0).view(values[0].shape))


COUNTS = ("step", "steps", "count")  # names of an optimizer's state


@contextlib.contextmanager
def count_ahead(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A step count of 1 before the first step."""
    before = {id(p) for p, state in optimizer.state.items() if state}
    yield
    for p, state in optimizer.state.items():
        for name in COUNTS:
            if id(p) not in before and isinstance(state.get(name), Tensor):
                act()
                state[name] += 1


@contextlib.contextmanager
def others_gradient(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gradients in the reverse order of their rows."""
    held = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    grads = [p.grad for p in held]
    for p in held:
        act()
        p.grad = p.grad.flip(0)
    yield
    for p, grad in zip(held, grads, strict=True):
        p.grad = grad


def has_state(cls: type) -> bool:
    return bool(cls.state_per_element)  # type: ignore[attr-defined]


@functools.cache
def counts_steps(cls: type) -> bool:
    """Whether its optimizer keeps a step count: found by a step of one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapters = lorica.attach(model, method_name(cls), r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-3, total_steps=400)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    return any(n in COUNTS for state in optimizer.state.values() for n in state)


fault("rules", "rate doubled")(changed_step(double_rate))
fault("rules", "state of another parameter", has_state)(changed_step(others_state))
# A test that follows the optimizer from a step hook sees the changed gradient, too; so this one is
# for rules without a count.
fault("rules", "rows of the gradient reversed", lambda cls: not counts_steps(cls))(
    changed_step(others_gradient)
)
fault("rules", "step count ahead by one", counts_steps)(changed_step(count_ahead))


# -- objectives ------------------------------------------------------------------------------------


@fault("objectives", "penalty halved")
def halved(cls: type) -> None:
    @wrapped(cls, "loss")
    def loss(original: Any, self: Any, task: Tensor, context: Any) -> Tensor:
        act()
        return task + (original(task, context) - task) / 2


@fault("objectives", "share of the micro-batch left out")
def no_share(cls: type) -> None:
    @wrapped(cls, "loss")
    def loss(original: Any, self: Any, task: Tensor, context: Any) -> Tensor:
        act()
        return original(task, dataclasses.replace(context, share=1.0 + (context.share == 1.0)))


def walks_layers(cls: type) -> bool:
    return "pair" in cls.needs  # type: ignore[attr-defined]


@fault("objectives", "first layer only", walks_layers)
def first_penalty_only(cls: type) -> None:
    @wrapped(cls, "loss")
    def loss(original: Any, self: Any, task: Tensor, context: Any) -> Tensor:
        few = Fewer(context.adapters, lambda names: names[:1])
        return original(task, dataclasses.replace(context, adapters=few))


@fault("objectives", "task's loss counted twice", lambda cls: not walks_layers(cls))
def task_twice(cls: type) -> None:
    @wrapped(cls, "loss")
    def loss(original: Any, self: Any, task: Tensor, context: Any) -> Tensor:
        act()
        return original(2 * task, context)


# -- the plugin ------------------------------------------------------------------------------------

_report: dict[str, Any] = {"acted": 0, "caught": None, "broke": None}


def pytest_configure(config: Any) -> None:
    if (given := os.environ.get("LORICA_FAULT")) is None:
        return
    word, name = given.split(":", 1)
    cls = registry.find(word)
    PLANTS[cls.axis][name][0](cls)


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    if call.excinfo is None or call.excinfo.typename == "Skipped" or _report["caught"]:
        return
    _report["caught"] = f"{item.name} ({call.excinfo.typename})"
    end = call.excinfo.traceback[-1]
    if Path(str(end.path)) == Path(__file__):
        _report["broke"] = f"line {end.lineno + 1}: {call.excinfo.exconly()}"


def pytest_sessionfinish() -> None:
    if path := os.environ.get("LORICA_FAULT_REPORT"):
        Path(path).write_text(json.dumps({**_report, "acted": acted}), encoding="utf-8")
