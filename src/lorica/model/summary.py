"""The start-up contract: what trains, what is frozen, what it costs, and which defaults were filled
in."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("lorica")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


@dataclass
class Summary:
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


def fill(contract: Summary, adapters: Any, targets: Any) -> Summary:
    """Counts, bytes and defaults, from the model as it now stands."""
    recipe, model = adapters.recipe, adapters.model
    trained = adapters.trained()
    ids = {id(t.parameter) for t in trained}
    base = {n: p for n, p in model.named_parameters() if id(p) not in ids}
    carried = [p for layer in adapters.layers.values() for _, p in layer.frozen()]
    own = {id(p) for p in carried}
    for t in trained:
        _count(contract.trained, f"{t.role}" if t.role != "module" else "in full", t.parameter)
    for p in base.values():
        _count(contract.frozen, "frozen factors" if id(p) in own else "base", p)
    contract.total = sum(p.numel() for p in model.parameters())
    contract.saved = list(adapters.saved)
    if not adapters.direct or adapters.layers:
        left = {
            n: k for n, k in targets.unadapted.items() if n.split(" = ")[0] not in adapters.direct
        }
        contract.unadapted = {n: k / contract.total for n, k in left.items()}
    for layer in adapters.layers.values():
        site = layer.site
        shape = f"{site.out_features} x {site.in_features}"
        rule: Any = recipe.kernel
        start_at = (
            None
            if site.lookup or recipe.lora_dropout or layer.update.delta.pair() is None
            else rule.threshold(site.in_features, site.out_features)
        )
        if layer.store.parameter.dtype not in (torch.float32, torch.float64):
            start_at = None
        key = (
            f"{shape}, r={site.r}"
            if f"{shape}" in contract.layers and contract.layers[shape]["r"] != site.r
            else shape
        )
        info = contract.layers.setdefault(
            key, {"count": 0, "r": site.r, "scale": site.scale, "materialise_from": start_at}
        )
        info["count"] += 1
        contract.materialise_from[key] = start_at
    size = sum(t.parameter.numel() * t.parameter.element_size() for t in trained)
    state: Any = recipe.rule
    contract.memory = {
        "base": sum(p.numel() * p.element_size() for p in base.values() if id(p) not in own),
        "trained": size,
        "frozen factors": sum(p.numel() * p.element_size() for p in carried),
        "gradients": size,
        "optimizer": state.state_elements(adapters) * 4,
    }
    kept = sum(schedule.state_bytes(adapters) for schedule in recipe.schedules)
    contract.memory |= {"schedules": kept} if kept else {}
    contract.defaults = {k: {"value": v, "from": w} for k, (v, w) in recipe.filled.items()}
    if (rate := recipe.learning_rate) is not None:
        contract.defaults["learning_rate"] = {"value": rate[0], "from": rate[1]}
    return contract


def _count(groups: dict[str, dict[str, int]], name: str, p: nn.Parameter) -> None:
    group = groups.setdefault(name, {"tensors": 0, "elements": 0})
    group["tensors"] += 1
    group["elements"] += p.numel()


def say(text: str) -> None:
    if logger.hasHandlers():
        logger.info(text)
    else:
        print(text, file=sys.stderr)
