"""A line chart, laid out in fractions of its plot: the page scales it to any width, and the text
beside it keeps its size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 500  # points of a line; of more, evenly spaced ones are drawn
NOISY = 40  # points from which a mean line is drawn over a measured one
_LOG = 12.0  # largest over smallest value from which the scale is logarithmic
_SPAN = 1000.0  # of the SVG's own units, both ways

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (step, value), by step; only finite values.
        colour: which of the page's colours, from 0.
        dots: mark every point.
        faint: drawn behind the others, without an entry in the legend.
    """

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    dots: bool = False
    faint: bool = False


def line(name: str, points: Sequence[tuple[Any, Any]], colour: int = 0, **how: bool) -> Line:
    """A line through those points that are finite numbers, at most `MOST` of them."""
    kept = [(float(x), float(y)) for x, y in points if _finite(x) and _finite(y)]
    if len(kept) > MOST:
        last = len(kept) - 1
        kept = [kept[round(i * last / (MOST - 1))] for i in range(MOST)]
    return Line(name, tuple(kept), colour, **how)


def smoothed(measured: Line) -> list[Line]:
    """A noisy line as two: faint as it is, and its running mean."""
    if len(measured.points) < NOISY:
        return [measured]
    width = max(5, len(measured.points) // 20)
    points, total = [], 0.0
    for i, (x, y) in enumerate(measured.points):
        total += y - (measured.points[i - width][1] if i >= width else 0.0)
        points.append((x, total / min(i + 1, width)))
    name = f"{measured.name}, mean of {width} points"
    return [
        Line(measured.name, measured.points, measured.colour, faint=True),
        Line(name, tuple(points), measured.colour),
    ]


@dataclass(frozen=True)
class Chart:
    """A chart of lines over the steps.

    Attributes:
        title: above it.
        note: one sentence below the title.
        lines: with one point at least.
        form: a value as text, for the axis and where it is pointed at.
        last: the last step on the axis.
        wide: takes the whole width of the page.
        floor: a value that the axis begins with; None: it follows the values.
        bytes: ticks are multiples of binary units.
    """

    title: str
    note: str
    lines: tuple[Line, ...]
    form: Callable[[float], str]
    last: float
    wide: bool = False
    floor: float | None = None
    bytes: bool = False

    @property
    def named(self) -> list[Line]:
        """The lines of the legend."""
        return [line for line in self.lines if not line.faint]

    @property
    def logarithmic(self) -> bool:
        low, high = self._extent
        return self.floor is None and low > 0 and high / low >= _LOG

    @property
    def _extent(self) -> Point:
        values = [y for line in self.lines for _, y in line.points]
        return min(values), max(values)

    @property
    def _values(self) -> list[float]:
        """Where the value axis has its ticks; the first and the last bound the plot."""
        low, high = self._extent
        if self.logarithmic:
            return _log_ticks(low, high)
        low = low if self.floor is None else min(self.floor, low)
        return _ticks(low, high, 4, 1024.0 if self.bytes else 10.0)

    def _place(self, x: float, y: float) -> Point:
        """(from the left, from the top), both in 0..1."""
        ticks = self._values
        low, high = ticks[0], ticks[-1]
        if self.logarithmic:
            low, high, y = math.log(low), math.log(high), math.log(y)
        return x / max(self.last, 1e-12), (high - y) / ((high - low) or 1.0)

    @property
    def y_ticks(self) -> list[dict[str, Any]]:
        """Marks of the value axis: `top` in percent, and `text`."""
        ticks = self._values
        if self.logarithmic and len(ticks) > 6:  # the tens alone, or every other one
            keep = [t for t in ticks if _is_power(t)]
            ticks = keep if len(keep) > 1 else ticks[::2]
        return [{"top": 100 * self._place(0, t)[1], "text": self.form(t)} for t in ticks]

    @property
    def x_ticks(self) -> list[dict[str, Any]]:
        """Marks of the step axis: `left` in percent, and `text`."""
        ticks = [t for t in _ticks(0, self.last, 5) if t <= self.last and t == int(t)]
        return [{"left": 100 * t / max(self.last, 1e-12), "text": f"{int(t):,}"} for t in ticks]

    def path(self, line: Line) -> str:
        """The line as an SVG path in a square of 1000 units."""
        at = [self._place(x, y) for x, y in line.points]
        return "M" + "L".join(f"{_SPAN * x:.1f} {_SPAN * y:.1f}" for x, y in at)

    def marks(self, line: Line) -> str:
        """Its points as an SVG path of strokes without length, which round caps make dots."""
        at = [self._place(x, y) for x, y in line.points]
        return "".join(f"M{_SPAN * x:.1f} {_SPAN * y:.1f}h0" for x, y in at)

    @property
    def readings(self) -> str:
        """What a pointer shows, as JSON: a line has `name`, `colour` and `points`, each (left, top,
        step, value as text)."""
        return json.dumps(
            [
                {
                    "name": line.name,
                    "colour": line.colour,
                    "points": [
                        [*(round(v, 4) for v in self._place(x, y)), f"{x:,.0f}", self.form(y)]
                        for x, y in line.points
                    ],
                }
                for line in self.named
            ]
        )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ticks(low: float, high: float, about: int, base: float = 10.0) -> list[float]:
    """Round numbers that enclose a range, some `about` of them.

    Example:
        >>> _ticks(0, 240, 5)
        [0, 50, 100, 150, 200, 250]
    """
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    rough = (high - low) / about
    unit = base ** math.floor(math.log(rough, base))
    steps = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if base > 10 else (1, 2, 5, 10)
    step = next((unit * k for k in steps if unit * k >= rough * 0.999), unit * steps[-1])
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(step * k, 12) for k in range(first, last + 1)]
    return [int(t) if t == int(t) else t for t in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [k * 10.0**e for e in range(first, last + 1) for k in (1, 2, 5)]
    floor = max(t for t in ticks if t <= low * (1 + 1e-9))
    roof = min(t for t in ticks if t >= high * (1 - 1e-9))
    return [t for t in ticks if floor <= t <= roof]


def _is_power(value: float) -> bool:
    return abs(math.log10(value) - round(math.log10(value))) < 1e-9
