"""RuleOptimizer: one `torch.optim.Optimizer` for every rule of this axis that torch doesn't have.

A pair (A, B) has a group of its own, `params=[A, B]`, with its scale; everything else is in plain
groups, updated elementwise. Pairs of equal shape are stacked and updated together. State is
tensors, in float32 or wider; hyperparameters are in the groups: schedulers, checkpoints, gradient
scalers, Accelerate and the Trainer see nothing unusual.

For every rule alike, a parameter without a gradient does not move, nor does its state. Gradients
are finite: a step in which one is not has none, for it is left out as a whole before the rule sees
it (`lorica.training.left_out`).

Shared by the rules of this axis; no method by itself.
"""

from __future__ import annotations

import abc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorica.interfaces import AdaptersLike, Pair, Trained
from lorica.methods.arguments import refuse_unknown
from lorica.methods.groups.base import Options, grouped, options_of
from lorica.methods.rules._elementwise import Adam, Elementwise, Shape
from lorica.methods.rules.base import AbstractRule, TrainerArguments
from lorica.tensors import foreach
from lorica.tensors.dtensor_ops import copy_, read_full
from lorica.tensors.linalg import floats

logger = logging.getLogger("lorica")

# Elements of one factor stacked at once: few calls, and temporary copies that stay small.
STACKED = 1 << 22

# State of A and of B, wide: name -> (n, ...), a scalar as (n, 1, 1); of a factor that does not move
# it is empty.
PairState = tuple[dict[str, Tensor], dict[str, Tensor]]
Shared = Any  # Any: what a rule's `prepare` finds over all pairs for its own `update`


@dataclass
class Factor:
    """One side of n pairs of equal shape, held wide: A (n, r, in) as it is, B (n, r, out)
    transposed. Read anew at each call, so that a stack holds no copies."""

    parameters: list[Tensor]
    transposed: bool
    diagonals: list[Tensor] | None  # (r, 1) each, where something trains between the factors
    lr: float | Tensor  # (n, 1, 1) where the pairs' rates differ
    moves: bool  # has gradients

    def value(self) -> Tensor:
        return stack_wide(self.parameters, self.transposed)

    def gradient(self) -> Tensor:
        return stack_wide(gradients(self.parameters), self.transposed)

    def as_partner(self) -> Tensor:
        """What the other factor's product meets: E·value where there is a diagonal E."""
        value = self.value()
        return value if self.diagonals is None else value * stack_wide(self.diagonals, False)


@dataclass
class Stack:
    """n pairs of equal shape and equal hyperparameters."""

    A: Factor
    B: Factor
    sites: list[str]  # for messages alone
    scales: list[float]
    options: Options  # of their groups, the same for all but `lr`

    @property
    def sides(self) -> tuple[tuple[Factor, Factor], tuple[Factor, Factor]]:
        """(factor, its partner), A first."""
        return (self.A, self.B), (self.B, self.A)

    def note_skipped(self, factor: Factor, counts: Tensor, skipped: Sequence[bool]) -> None:
        """Count, (n, 1, 1), that a rule left this factor out of a step, and log it at the 1st,
        10th, 100th, ... time."""
        if not any(skipped):
            return
        counts += torch.tensor(skipped, device=counts.device)[:, None, None]
        for site, count, now in zip(self.sites, floats(counts.flatten()), skipped, strict=True):
            if now and count in _LOGGED:
                logger.warning(
                    "%s, %s: the gradient is above the rule's limit, so it has no part in this step"
                    " (%d such steps so far)", site, "AB"[factor.transposed], count,
                )  # fmt: skip


_LOGGED = frozenset(10**k for k in range(9))


@dataclass(frozen=True, kw_only=True)
class EngineRule(AbstractRule):
    """A rule that runs in `RuleOptimizer`; on its own it is elementwise."""

    state_per_element: ClassVar[int] = 2

    @property
    def plain(self) -> Elementwise:
        """What moves the parameters that are in no pair."""
        return Adam()

    def options(self, given: Options) -> tuple[Options, Options]:
        """Hyperparameters of the plain groups and of the pairs' groups."""
        plain = {**self.plain.defaults, **given}
        return plain, plain

    def build(self, groups: list[Options], options: Options) -> torch.optim.Optimizer:
        refuse_unknown(self.name, options, self.plain.defaults)
        plain, pair = self.options(options)
        self.plain.check(plain)
        idle = [name for name in options if pair.get(name) != options[name]]
        if idle and all(g.get("pair") for g in groups):
            name = idle[0]
            raise ValueError(
                f"`{name}={options[name]!r}` is an option of what trains in no pair, and there is"
                f" nothing such here; for the pairs write `{self.name}({name}={options[name]!r})`"
                " into the method"
            )
        made = [{**g, **(pair if g.get("pair") else plain)} for g in groups]
        return RuleOptimizer(self, made)

    def options_from(self, args: TrainerArguments) -> Options:
        """What differs from the Trainer's defaults: nothing else was asked for."""
        fields = type(args).__dataclass_fields__
        betas = {"adam_beta1": args.adam_beta1, "adam_beta2": args.adam_beta2}
        out: Options = {}
        if any(value != fields[name].default for name, value in betas.items()):
            out["betas"] = tuple(betas.values())
        if args.adam_epsilon != fields["adam_epsilon"].default:
            out["eps"] = args.adam_epsilon
        return out

    def state_shapes(self, group: Options, parameter: Tensor) -> Mapping[str, Shape]:
        if not group["pair"]:
            return self.plain.shapes(tuple(parameter.shape), group)
        A, B = group["params"]
        (r, wide), tall = A.shape, B.shape[0]
        if parameter is A:
            return self.shapes(r, wide, tall, group)
        return {name: s[::-1] for name, s in self.shapes(r, tall, wide, group).items()}

    def state_elements(self, adapters: AdaptersLike) -> int:
        """Exactly, scalar tensors not counted."""
        pairs, others = _split(adapters)
        plain, pair_options = self.options({})
        shapes = [self.plain.shapes(tuple(t.parameter.shape), plain).values() for t in others]
        for _, pair, (A, B) in pairs:
            (r, wide), tall = pair.A.shape, pair.B.shape[0]
            for d, other, trained in ((wide, tall, A), (tall, wide, B)):
                if trained is not None:
                    shapes.append(self.shapes(r, d, other, pair_options).values())
        sizes = [torch.Size(s).numel() for some in shapes for s in some]
        return sum(n for n in sizes if n > 1)

    def shapes(self, r: int, d: int, partner: int, options: Options) -> dict[str, Shape]:
        """State of one factor (r, d) whose partner is (r, partner): name -> shape, `()` for a
        scalar."""
        return self.plain.shapes((r, d), options)


@dataclass(frozen=True, kw_only=True)
class PairRule(EngineRule):
    """A rule that sees A and B of a pair together."""

    needs: ClassVar[frozenset[str]] = frozenset({"pair"})

    def groups(self, adapters: AdaptersLike, lr: float, weight_decay: float) -> list[Options]:
        """One group per pair, then the others by their options.

        `ratios` are the rates of A and B over the group's `lr`, 0 for a factor that stays frozen;
        `diagonal` is (group, position) of the parameter between the two.
        """
        pairs, beside = _split(adapters)
        by = adapters.recipe.groups
        others = grouped(beside, by, lr, weight_decay)
        at = {
            id(p): [len(pairs) + i, j]
            for i, g in enumerate(others)
            for j, p in enumerate(g["params"])
        }
        out: list[Options] = []
        for site, pair, trained in pairs:
            own = [t and options_of(t, by, lr, weight_decay) for t in trained]
            first = next(o for o in own if o)
            if any(o and o["weight_decay"] != first["weight_decay"] for o in own):
                raise ValueError(
                    f"{site!r}: the groups axis gives A and B different weight decays, but"
                    f" `{self.name}` decays a pair as one; give both the same"
                )
            ratios = [(o["lr"] / first["lr"] if first["lr"] else 1.0) if o else 0.0 for o in own]
            out.append(
                {
                    "params": [pair.A, pair.B],
                    "pair": True,
                    "site": site,
                    "scale": pair.scale,
                    "ratios": ratios,
                    "diagonal": at.get(id(pair.E)),
                    **first,
                }
            )
        return out + others

    def prepare(self, stacks: list[Stack]) -> Sequence[Shared] | None:
        """Once a step, over all pairs: None, or one `shared` for each stack's `update`."""
        return None

    @abc.abstractmethod
    def update(self, stack: Stack, state: PairState, shared: Shared) -> Sequence[Tensor | None]:
        """New values of A and B, wide, both from old ones; None for a factor that does not move.

        Args:
            state: see `PairState`; changed in place, or its tensors replaced.
            shared: this stack's part of what `prepare` returned, None without one.
        """


class RuleOptimizer(torch.optim.Optimizer):
    """See the module's docstring. Made by a rule's `build`."""

    def __init__(self, rule: EngineRule, groups: list[Options]) -> None:
        self.rule = rule
        super().__init__(groups, {"weight_decay": 0.0, "pair": False})

    def __getstate__(self) -> dict[str, Any]:  # Any: as torch declares it
        return {**super().__getstate__(), "rule": self.rule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: as torch declares it
        super().load_state_dict(state_dict)
        # The base class rounds state to the parameters' dtype; ours may be wider.
        ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        own = ((p, g["pair"]) for g in self.param_groups for p in g["params"])
        for i, (p, paired) in zip(ids, own, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                # A scalar of what is in no pair is read at every step: on a device torch would wait
                # for each.
                device = p.device if paired or value.ndim else "cpu"
                self.state[p][name] = value.to(device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if stacks := list(self._stacks()):
            assert isinstance(self.rule, PairRule)  # which alone makes groups of pairs
            shared = self.rule.prepare(stacks)
            for i, stack in enumerate(stacks):
                self._update(self.rule, stack, shared[i] if shared is not None else None)
        for group in self.param_groups:
            if not group["pair"]:
                if moving := [p for p in group["params"] if p.grad is not None]:
                    self._update_plain(moving, group)
        return loss

    # -- what takes part

    def _stacks(self) -> Iterator[Stack]:
        alike: dict[_Alike, list[Options]] = {}
        for group in self.param_groups:
            if not group["pair"]:
                continue
            A, B = group["params"]
            moves = A.grad is not None, B.grad is not None
            if any(moves):
                own = {k: v for k, v in group.items() if k not in _OF_THE_PAIR}
                between = group["diagonal"] is not None
                key = _Alike(A.shape, B.shape, A.dtype, A.device, moves, between, repr(own))
                alike.setdefault(key, []).append(group)
        for key, groups in alike.items():
            count = max(1, STACKED // max(key.A.numel(), key.B.numel()))
            for i in range(0, len(groups), count):
                yield self._stack(groups[i : i + count], key.moves)

    def _stack(self, groups: list[Options], moves: tuple[bool, bool]) -> Stack:
        diagonals: list[Tensor] | None = None
        if groups[0]["diagonal"] is not None:
            at = [g["diagonal"] for g in groups]
            diagonals = [self.param_groups[i]["params"][j] for i, j in at]
        factors: list[Factor] = []
        for side in range(2):
            parameters: list[Tensor] = [g["params"][side] for g in groups]
            rates = [float(g["lr"]) * g["ratios"][side] for g in groups]
            lr: float | Tensor = rates[0]
            if any(rate != lr for rate in rates):
                wide = wide_dtype(parameters[0].dtype)
                lr = torch.tensor(rates, dtype=wide, device=parameters[0].device)[:, None, None]
            factors.append(Factor(parameters, side == 1, diagonals, lr, moves[side]))
        sites, scales = [g["site"] for g in groups], [g["scale"] for g in groups]
        return Stack(factors[0], factors[1], sites, scales, groups[0])

    # -- one step

    def _update(self, rule: PairRule, stack: Stack, shared: Shared) -> None:
        state = self._read(stack.A, stack.B, stack), self._read(stack.B, stack.A, stack)
        new = rule.update(stack, state, shared)
        for (factor, _), own, value in zip(stack.sides, state, new, strict=True):
            if value is None:
                continue
            for name, tensor in own.items():
                unstack_(
                    [self.state[p][name] for p in factor.parameters], tensor, factor.transposed
                )
            unstack_(factor.parameters, value, factor.transposed)

    def _read(self, factor: Factor, partner: Factor, stack: Stack) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if not factor.moves:
            return out
        (r, d), other = _wide_shape(factor), _wide_shape(partner)[1]
        for name, shape in self.rule.shapes(r, d, other, stack.options).items():
            stored = shape[::-1] if factor.transposed else shape  # as `state_shapes` says
            held = [self._state(p, name, stored, like=None) for p in factor.parameters]
            out[name] = stack_wide(held, factor.transposed)
        return out

    def _state(self, p: Tensor, name: str, shape: Shape, like: Tensor | None) -> Tensor:
        """State tensor `name` of p, made of zeros on first use: sharded as `like`, or whole."""
        own = self.state[p]
        if name not in own:
            wide = wide_dtype(p.dtype)
            if like is None or not shape:
                device = p.device if shape or like is None else "cpu"  # torch counts on the CPU
                dtype = wide if shape else torch.float32
                own[name] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                own[name] = torch.zeros_like(like, dtype=wide)
        return own[name]

    def _update_plain(self, parameters: list[Tensor], group: Options) -> None:
        """Move parameters, at least one, that all have a gradient."""
        kernel = self.rule.plain
        states = [
            {
                n: self._state(p, n, s, like=p)
                for n, s in kernel.shapes(tuple(p.shape), group).items()
            }
            for p in parameters
        ]
        values = [p.to(wide_dtype(p.dtype)) for p in parameters]
        moved_by = [g.to(v.dtype) for g, v in zip(gradients(parameters), values, strict=True)]
        kernel.plain(values, moved_by, states, float(group["lr"]), group["weight_decay"], group)
        for p, v in zip(parameters, values, strict=True):
            if v is not p:  # was narrower
                p.copy_(v)


class _Alike(NamedTuple):
    """What pairs of one stack have in common."""

    A: torch.Size
    B: torch.Size
    dtype: torch.dtype
    device: torch.device
    moves: tuple[bool, bool]
    between: bool  # something trains between the factors
    hyperparameters: str


# What may differ within a stack, or is no hyperparameter.
_OF_THE_PAIR = frozenset({"params", "lr", "initial_lr", "site", "scale", "diagonal", "lorica"})


class _TrainedPair(NamedTuple):
    site: str
    pair: Pair
    trained: tuple[Trained | None, Trained | None]  # A and B; None: frozen


def _split(adapters: AdaptersLike) -> tuple[list[_TrainedPair], list[Trained]]:
    """Pairs with a trained factor, and the trained parameters that are in no pair of matrices:
    those of a stack of experts are moved elementwise."""
    left = {id(t.parameter): t for t in adapters.trained()}
    pairs: list[_TrainedPair] = []
    for site, pair in adapters.pairs():
        if pair.A.ndim != 2:
            continue
        trained = left.pop(id(pair.A), None), left.pop(id(pair.B), None)
        if any(trained):
            pairs.append(_TrainedPair(site, pair, trained))
    return pairs, list(left.values())


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Of parameters that have one."""
    out: list[Tensor] = []
    for p in parameters:
        assert p.grad is not None
        out.append(p.grad)
    return out


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of state and algebra."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide_shape(factor: Factor) -> tuple[int, int]:
    rows, columns = factor.parameters[0].shape
    return (columns, rows) if factor.transposed else (rows, columns)


def stack_wide(tensors: Sequence[Tensor], transposed: bool) -> Tensor:
    """(n, r, d), a fresh copy in float32 or wider; scalars as (n, 1, 1)."""
    stacked = torch.stack([read_full(t) for t in tensors])
    stacked = stacked.to(wide_dtype(stacked.dtype))
    if stacked.ndim == 1:
        return stacked[:, None, None]
    return stacked.mT if transposed else stacked


def unstack_(tensors: list[Tensor], stacked: Tensor, transposed: bool) -> None:
    """The inverse of `stack_wide`, in place."""
    if tensors[0].ndim == 0:
        stacked = stacked.reshape(-1)
    elif transposed:
        stacked = stacked.mT
    parts = list(stacked.unbind(0))
    if any(isinstance(t, DTensor) for t in tensors):
        for t, part in zip(tensors, parts, strict=True):
            copy_(t, part)
    else:
        foreach.copy_(tensors, parts)
