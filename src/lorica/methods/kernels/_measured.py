"""Orders by measurement, for machines on which the number of multiplies doesn't predict the time.

    python -m lorica.methods.kernels FILE                    measures, and writes the table
    with lorica.methods.kernels.base.measured(FILE): ...     uses it

The environment variable LORICA_ORDERS=FILE uses it everywhere. A table belongs to a machine, not to
an adapter, so no method's text names one. A call takes the order of the entry that is nearest in
tokens, sizes and rank, each within a factor of two, and equal in everything else; a call without
such an entry counts multiplies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorica.methods.kernels._orders import WIDE, Call, Order, sums_kept
from lorica.text import parse_json, refusal

VARIABLE = "LORICA_ORDERS"
_SIZES = ("tokens", "in_features", "out_features", "r")
_DTYPES = {str(t): t for t in (*WIDE, torch.bfloat16, torch.float16)}
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Measured orders.

    Args:
        entries: (call, its fastest order).
    """

    entries: tuple[tuple[Call, Order], ...]

    def order(self, call: Call) -> Order | None:
        """That of the nearest entry, or None."""
        best: Order | None = None
        least = 0
        for entry, order in self.entries:
            if _alike(call, entry) and _near(call, entry):
                far = _far(call, entry)
                if best is None or far < least:
                    best, least = order, far
        return best

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """Reads what `write` wrote.

        Raises:
            ValueError: no file, or no table of orders in it.
        """
        try:
            data = parse_json(Path(path).read_text(encoding="utf-8"))
            return cls(tuple((_call(e["call"]), _order(e["order"])) for e in data["orders"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = refusal(error) or repr(error)
            raise ValueError(
                f"`{path}` is no table of orders ({why}); one is written by `python -m"
                " lorica.methods.kernels FILE`"
            ) from None

    def write(self, path: str | Path) -> None:
        entries = [
            {
                "call": {**dataclasses.asdict(call), "dtype": str(call.dtype)},
                "order": dataclasses.asdict(order),
            }
            for call, order in self.entries
        ]
        Path(path).write_text(json.dumps({"orders": entries}, indent=1) + "\n", encoding="utf-8")


def _alike(call: Call, entry: Call) -> bool:
    """Whether all but the sizes agree."""
    if call.dropping:  # not compared: for a compiler it may be a symbol, which equals nothing
        if not entry.dropping:
            return False
    elif entry.dropping:
        return False
    one, other = (
        (min(c.frozen_rank, 1), c.dtype, c.device, c.exact, *_needs(c)) for c in (call, entry)
    )
    return one == other


def _needs(call: Call) -> tuple[bool, ...]:
    return call.needs_x, call.needs_w, call.needs_a, call.needs_b


# Only integer arithmetic: the sizes may be a compiler's symbols.


def _sizes(call: Call) -> tuple[int, ...]:
    return tuple(getattr(call, name) for name in _SIZES)


def _near(one: Call, other: Call) -> bool:
    """Whether each size differs by a factor of two at most."""
    for a, b in zip(_sizes(one), _sizes(other), strict=True):
        if a > 2 * b or b > 2 * a:
            return False
    return True


def _far(call: Call, entry: Call) -> int:
    """The sum of the sizes' differences, in thousandths of the entry's sizes."""
    far = 0
    for a, b in zip(_sizes(call), _sizes(entry), strict=True):
        far += (a - b if a > b else b - a) * 1000 // max(b, 1)
    return far


def _call(data: Mapping[str, Any]) -> Call:  # Any: a JSON file's values
    rest = {key: value for key, value in data.items() if key != "dtype"}
    call = Call(dtype=_DTYPES[data["dtype"]], **rest)
    if not all(type(getattr(call, name)) is int for name in (*_SIZES, "frozen_rank")):
        raise ValueError("sizes are whole numbers")
    return call


def _order(data: Mapping[str, Any]) -> Order:  # Any: a JSON file's values
    order = Order(**data)
    if not all(type(value) is bool for value in dataclasses.astuple(order)):
        raise ValueError("an order is three times true or false")
    return order


_table: Table | None = None
_known: str | None = None


def current() -> Table | None:
    """The table in use: that of the innermost `measured`, else the environment's."""
    global _table, _known
    if _known is None:
        _known = os.environ.get(VARIABLE, "")
        _table = Table.read(_known) if _known else None
    return _table


@contextlib.contextmanager
def measured(path: str | Path | None) -> Generator[None]:
    """Within this context calls take their order from the table in this file; None: they count
    multiplies.

    Raises:
        ValueError: no file, or no table of orders in it.
    """
    global _table
    table, before = None if path is None else Table.read(path), current()
    _table = table
    try:
        yield
    finally:
        _table = before


# -- measuring -------------------------------------------------------------------------------------


def seconds(call: Call, rounds: int = 5, seed: int = 0) -> dict[Order, tuple[float, float]]:
    """{order: (forward, backward)} in seconds, the fastest of interleaved rounds, for every lawful
    order."""
    from lorica.methods.kernels._linear import linear

    generator = torch.Generator(call.device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=call.dtype, device=call.device)

    N, m, n = call.tokens, call.in_features, call.out_features
    x = draw(N, m).requires_grad_(call.needs_x)
    w = (draw(n, m) / m**0.5).requires_grad_(call.needs_w)
    a = draw(call.r, m).requires_grad_(call.needs_a)
    b = draw(n, call.r).requires_grad_(call.needs_b)
    a2, b2 = draw(call.frozen_rank, m), draw(n, call.frozen_rank)
    pair = (a2, b2) if call.frozen_rank else (None, None)
    wanted, dy = [t for t in (x, w, a, b) if t.requires_grad], draw(N, n)

    def forward_in(order: Order) -> torch.Tensor:
        rest = (order.forward_sum, order.input_sum, order.outer, False, p, 1, False, "output")
        return linear(x, w, None, a, b, None, *pair, 1.0, *rest, call.dtype, True)

    def backward_of(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, wanted, dy)

    p = 0.05 if call.dropping else 0.0
    out: dict[Order, tuple[float, float]] = {}
    for i in range(-1, rounds):
        for order in lawful(call):
            y, forward = _timed(functools.partial(forward_in, order), call.device)
            backward = 0.0
            if wanted:
                _, backward = _timed(functools.partial(backward_of, y), call.device)
            if i >= 0:
                best = out.get(order, (math.inf, math.inf))
                out[order] = min(best[0], forward), min(best[1], backward)
    return out


def lawful(call: Call) -> list[Order]:
    """Orders that compute this call: all, or those without sums where rounding or dropout rule sums
    out."""
    if not sums_kept(call):
        return [Order()]
    pick = (False, True)
    return [Order(f, s, o) for f in pick for s in pick for o in pick]


def fastest(times: dict[Order, tuple[float, float]]) -> Order:
    """Forward and backward are chosen separately, because neither depends on the other's order."""
    first = min(times, key=lambda order: times[order][0])
    second = min(times, key=lambda order: times[order][1])
    return Order(first.forward_sum, second.input_sum, second.outer)


def _timed(call: Callable[[], T], device: str) -> tuple[T, float]:
    """What the call returns, and its seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    out = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return out, time.perf_counter() - began


def tabulate(calls: Iterable[Call], rounds: int = 5) -> Table:
    """Measure these calls on this machine, with as many threads as torch has now."""
    return Table(tuple((call, fastest(seconds(call, rounds))) for call in calls))


def usual(device: str) -> list[Call]:
    """Shapes of transformers in float32: on a CPU small ones, which take about two minutes."""
    large = device != "cpu"
    return [
        Call(tokens=tokens, in_features=m, out_features=n, r=r, device=device)
        for width in (256, 512, 1024, *((2048, 4096) if large else ()))
        for m, n in ((width, width), (width, 8 * width // 3), (8 * width // 3, width))
        for tokens in (64, 256, 1024, *((4096, 16384) if large else ()))
        for r in (8, 64)
    ]
