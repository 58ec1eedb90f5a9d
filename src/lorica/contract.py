"""The start-up contract: what trains, what is frozen, what it costs, and which defaults were filled
in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


@dataclass
class Contract:
    """What `attach` promises; `as_dict` is JSON-ready, `str` is for people.

    Counts are elements, memory is bytes. `materialise_from` maps a layer shape "out x in" to the
    number of tokens in a call from which W + ΔW is formed (None: never).
    """

    method: str
    total: int = 0
    trained: dict[str, dict[str, int]] = field(default_factory=dict)  # group -> tensors, elements
    frozen: dict[str, dict[str, int]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # shape -> count, r, scale, cost
    saved: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unadapted: dict[str, float] = field(default_factory=dict)  # matrix -> share of all parameters
    tied: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> value, from
    materialise_from: dict[str, int | None] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        return sum(g["elements"] for g in self.trained.values())

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "trainable": self.trainable}

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        lines = [
            f"{self.method}: {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"
        ]
        for title, groups in (("trains", self.trained), ("frozen", self.frozen)):
            lines += [
                f"  {title:<8}{name:<18}{g['tensors']:>5} tensors {g['elements']:>15,}"
                for name, g in groups.items()
            ]
        for shape, info in self.layers.items():
            start = info["materialise_from"]
            order = "factors only" if start is None else f"W + ΔW formed from {start:,} tokens on"
            lines.append(
                f"  layers  {info['count']:>4} x ({shape})  r={info['r']}  s={info['scale']:g} "
                f" {order}"
            )
        for name in self.saved:
            fresh = " (fresh: not in the checkpoint)" if name in self.fresh else ""
            lines.append(f"  in full {name}{fresh}")
        rest = sorted(self.unadapted.items(), key=lambda kv: -kv[1])
        for name, part in rest[:6]:
            lines.append(f"  left    {name}  {part:.1%} of the parameters, not adapted")
        if len(rest) > 6:
            lines.append(
                f"  left    and {len(rest) - 6} smaller ones, {sum(p for _, p in rest[6:]):.1%}"
            )
        for name, other in self.tied.items():
            lines.append(f"  tied    {name} shares its weight with {other}; merging unties them")
        lines.append("  memory  " + ", ".join(f"{k} {human(v)}" for k, v in self.memory.items()))
        for name, d in self.defaults.items():
            lines.append(f"  default {name}={d['value']} (from {d['from']})")
        return "\n".join(lines)
