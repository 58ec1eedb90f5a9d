"""The summary that `lorica.attach` prints: what trains, what is frozen, how much memory that takes,
and where each default comes from."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorica.model.adapters import Adapters
from lorica.model.heads import head_names
from lorica.model.layer import AdaptedLayer
from lorica.model.quantised import floating_dtype, quantised, sizes
from lorica.model.targets import Targets
from lorica.model.token_rows import shown
from lorica.recipe.recipe import Recipe
from lorica.tensors.modules import named_modules
from lorica.text import by_pattern, human, printable

logger = logging.getLogger("lorica")
SHOWN = 6  # kinds of weights that are not adapted; the smaller ones are added up
LISTED = 3  # layers that are left out for one reason, by name
IN_FULL = "modules in full"
# Keys of `Summary.memory` that a reader would not understand alone.
_KINDS = {
    "trained": "trained parameters",
    "optimizer": "optimizer state",
    "schedules": "schedule state",
}


@dataclass
class Summary:
    """What `lorica.attach` did to a model. `str` is for people, `as_dict` is ready for JSON.

    Attributes:
        method: text of the method.
        total: parameters of the model, adapters included.
        trained, frozen: {kind: number of tensors and of their elements}.
        layers: {weight shape "out x in": number of adapted layers, r, scale}; layers of one shape
            that differ in rank or scale have an entry each.
        saved: paths of the modules that train in full.
        heads: {path: why it trains in full} of those that no option names.
        tokens: {table, tied ones joined by " = ": ids of the tokens whose rows train}.
        left_out: {layer that `all-linear` leaves out: why}.
        unadapted: {weight matrix: share of all parameters} that neither trains nor is adapted.
        reasons: {weight matrix: why} of those.
        tied: {adapted module: module that shares its weight}.
        quantised: {format: number of weights in it}.
        dtypes: of `trained` parameters and of the `rest` of a quantised base; else empty.
        memory: bytes of each kind.
        defaults: {field: value, and the method it comes from}, where the user gave none.
        materialise_from: {weight shape: number of tokens in a batch from which the layer multiplies
            with W + ΔW instead of the factors}; None: never.
    """

    method: str
    total: int = 0
    trained: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    frozen: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    # Any: whole numbers, floats and None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    saved: list[str] = field(default_factory=list[str])
    heads: dict[str, str] = field(default_factory=dict[str, str])
    tokens: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    unadapted: dict[str, float] = field(default_factory=dict[str, float])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    tied: dict[str, str] = field(default_factory=dict[str, str])
    quantised: dict[str, int] = field(default_factory=dict[str, int])  # format -> weights in it
    dtypes: dict[str, str] = field(default_factory=dict[str, str])
    memory: dict[str, int] = field(default_factory=dict[str, int])
    defaults: dict[str, dict[str, float | str]] = field(
        default_factory=dict[str, dict[str, float | str]]
    )
    materialise_from: dict[str, int | None] = field(default_factory=dict[str, int | None])

    @property
    def trainable(self) -> int:
        return sum(g["elements"] for g in self.trained.values())

    def as_dict(self) -> dict[str, Any]:  # Any: a JSON file's values
        return {**dataclasses.asdict(self), "trainable": self.trainable}

    def __str__(self) -> str:
        """One screen: what trains, what does not and why, memory, defaults."""
        lines = [self._first(), *self._adapted(), *self._beside()]
        lines += [f"  not adapted  {line}" for line in self._not_adapted()]
        tied = list(self.tied.items())
        for name, other in tied[:1]:
            more = f" (and {len(tied) - 1} more)" if len(tied) > 1 else ""
            lines.append(f"  tied         {name} shares its weight with {other}{more}")
        parts = [f"{_KINDS.get(k, k)} {human(v)}" for k, v in self.memory.items() if v]
        whole = human(sum(self.memory.values()))
        lines.append(f"  memory       {whole} and the activations: {', '.join(parts)}")
        chosen = [f"{name}={d['value']} ({d['from']})" for name, d in self.defaults.items()]
        if chosen:
            lines.append("  defaults     " + ", ".join(chosen))
        return "\n".join(lines)

    def _first(self) -> str:
        share = self.trainable / max(self.total, 1)
        return f"{self.method}: {self.trainable:,} of {self.total:,} parameters train ({share:.2%})"

    def _adapted(self) -> list[str]:
        """How many weights have an update, by rank and scale."""
        kinds: dict[str, int] = {}
        for info in self.layers.values():
            rank = f"r={info['r']}, " if info["r"] else ""
            kind = f"{rank}scale {info['scale']:g}"
            kinds[kind] = kinds.get(kind, 0) + info["count"]
        many = [f"{n:,} weight{'s' if n != 1 else ''}, {kind}" for kind, n in kinds.items()]
        if len(many) > LISTED:
            many = many[:LISTED] + [f"{len(many) - LISTED} more ranks and scales"]
        return ["  adapted      " + "; ".join(many)] if many else []

    def _beside(self) -> list[str]:
        """How a quantised base is stored, and what trains in full or in part."""
        whole: list[str] = []
        for pattern, names in by_pattern(self.saved).items():
            why = self.heads.get(names[0])
            count = f" ({len(names)} modules)" if len(names) > 1 else ""
            whole.append(f"  in full      {pattern}{count}" + f" ({why})" * bool(why))
        rows = [
            f"  tokens       {name}: {len(ids):,} rows train ({shown(ids)})"
            for name, ids in self.tokens.items()
        ]
        return [*self._stored(), *whole, *rows]

    def _stored(self) -> list[str]:
        """How a quantised base is stored, and what is beside its packed weights."""
        lines = [
            f"  quantised    {count} weight{'s' if count != 1 else ''} in {kind}"
            for kind, count in self.quantised.items()
        ]
        if lines:
            lines.append(
                f"  beside them  the rest of the base stays in {self.dtypes['rest']}, what trains"
                f" is {self.dtypes['trained']}, and checkpointed blocks pass gradients on"
            )
        return lines

    def _not_adapted(self) -> list[str]:
        """Kinds of weights that neither train nor are adapted, largest first, with the reason."""
        groups = by_pattern(self.unadapted)
        shares = {p: sum(self.unadapted[n] for n in names) for p, names in groups.items()}
        order = sorted(groups, key=lambda pattern: -shares[pattern])
        lines: list[str] = []
        for pattern in order[:SHOWN]:
            count = f", {len(groups[pattern]):,} weights" if len(groups[pattern]) > 1 else ""
            why = self.reasons.get(groups[pattern][0])
            told = f": {why}" if why else ""
            lines.append(f"{pattern}{count} ({shares[pattern]:.1%} of all parameters){told}")
        if len(order) > SHOWN:
            rest = sum(shares[pattern] for pattern in order[SHOWN:])
            lines.append(f"{len(order) - SHOWN} smaller kinds ({rest:.1%} together)")
        told_of = {name.removesuffix(".weight") for name in self.unadapted}
        others = {n: why for n, why in self.left_out.items() if n not in told_of}
        for pattern, names in by_pattern(others).items():
            count = f", {len(names):,} layers" if len(names) > 1 else ""
            lines.append(f"{pattern}{count}: {others[names[0]]}")
        return lines

    def details(self) -> str:
        """Every kind of parameter, shape of layer, and weight, one a line."""
        lines = [self._first()]
        for title, groups in (("trained", self.trained), ("frozen", self.frozen)):
            for name, g in groups.items():
                tensors = f"{g['tensors']:>5} tensor{'s' if g['tensors'] != 1 else ' '}"
                lines.append(f"  {title:<13}{name:<24}{tensors} {g['elements']:>15,} parameters")
        for shape, info in self.layers.items():
            rank = f" r={info['r']}," if info["r"] else ""  # 0: the delta has none
            count = f"{info['count']} weight{'s' if info['count'] != 1 else ''}"
            lines.append(
                f"  adapted      {count} of shape {shape.split(',')[0]},{rank} s={info['scale']:g}"
            )
        lines += self._stored()
        for name in self.saved:
            why = self.heads.get(name)
            lines.append(f"  in full      {name}" + f" ({why})" * bool(why))
        for name, ids in self.tokens.items():
            lines.append(f"  tokens       {name}: {len(ids):,} rows train ({shown(ids)})")
        for why in dict.fromkeys(self.left_out.values()):
            names = [n for n, w in self.left_out.items() if w == why]
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            lines.append(f"  left out     {', '.join(names[:LISTED])}{more} ({why})")
        rest = sorted(self.unadapted.items(), key=lambda kv: -kv[1])
        for name, part in rest[:SHOWN]:
            lines.append(f"  not adapted  {name} ({part:.1%} of all parameters)")
        if len(rest) > SHOWN:
            share = sum(part for _, part in rest[SHOWN:])
            lines.append(f"  not adapted  {len(rest) - SHOWN} smaller ones ({share:.1%} together)")
        for name, other in self.tied.items():
            lines.append(
                f"  tied         {name} shares its weight with {other}; merging unties them"
            )
        parts = [f"{_KINDS.get(k, k)} {human(v)}" for k, v in self.memory.items() if v]
        lines.append("  memory       " + ", ".join(parts))
        for name, d in self.defaults.items():
            lines.append(f"  default      {name}={d['value']} (from {d['from']})")
        return "\n".join(lines)


def fill(summary: Summary, adapters: Adapters, targets: Targets) -> Summary:
    """Add counts, bytes and defaults, read from the adapted model."""
    recipe, model = adapters.recipe, adapters.model
    trained = adapters.trained()
    ids = {id(t.parameter) for t in trained}
    base = {n: p for n, p in model.named_parameters() if id(p) not in ids}
    frozen_factors = [p for layer in adapters.layers.values() for _, p in layer.frozen()]
    own = {id(p) for p in frozen_factors}
    shared = [t for _, t in adapters.shared]
    for t in trained:
        _count(summary.trained, t.role if t.role != "module" else IN_FULL, t.parameter.numel())
    packed = sizes(model)
    for store in quantised(model).values():
        summary.quantised[store.format] = summary.quantised.get(store.format, 0) + 1
    if packed:
        rest, own_dtype = floating_dtype(model), adapters.dtype
        summary.dtypes = {"rest": _named(rest), "trained": _named(own_dtype)}
    for p in base.values():
        elements, _ = packed.get(id(p), (p.numel(), 0))
        _count(summary.frozen, "frozen factors" if id(p) in own else "base", elements)
    for t in shared:
        _count(summary.frozen, "frozen factors", t.numel())
    summary.total = sum(packed.get(id(p), (p.numel(),))[0] for p in model.parameters())
    summary.total += sum(t.numel() for t in shared)
    summary.saved = list(adapters.saved)
    groups: dict[int, list[str]] = {}
    for name, table in adapters.tables.items():
        groups.setdefault(id(table.rows), []).append(name)
    for names in groups.values():
        ids = [*adapters.tables[names[0]].tokens]
        summary.tokens[" = ".join(names)] = ids
    if not adapters.direct or adapters.layers:
        left = {
            n: k for n, k in targets.unadapted.items() if n.split(" = ")[0] not in adapters.direct
        }
        summary.unadapted = {n: k / summary.total for n, k in left.items()}
        summary.reasons = _reasons(model, left, targets)
    for layer in adapters.layers.values():
        site = layer.site
        shape = f"{site.out_features} x {site.in_features}"
        shape = f"{site.experts} experts x {shape}" if site.experts else shape
        start_at = _merged_from(layer, recipe)
        # Layers of one shape share an entry, until they differ in rank or scale.
        same = {"r": site.r, "scale": site.scale}
        for key in (shape, f"{shape}, r={site.r}", f"{shape}, r={site.r}, s={site.scale:g}"):
            info = summary.layers.setdefault(
                key, {"count": 0, **same, "materialise_from": start_at}
            )
            if same.items() <= info.items():
                break
        info["count"] += 1
        summary.materialise_from[key] = start_at
    size = sum(t.parameter.numel() * t.parameter.element_size() for t in trained)
    summary.memory = {
        "base": sum(
            packed.get(id(p), (0, p.numel() * p.element_size()))[1]
            for p in base.values()
            if id(p) not in own
        ),
        "trained": size,
        "frozen factors": sum(p.numel() * p.element_size() for p in (*frozen_factors, *shared)),
        "gradients": size,
        "optimizer": recipe.rule.state_elements(adapters) * 4,
    }
    kept = sum(schedule.state_bytes(adapters) for schedule in recipe.schedules)
    summary.memory |= {"schedules": kept} if kept else {}
    summary.defaults = {k: {"value": v, "from": w} for k, (v, w) in recipe.filled.items()}
    if (rate := recipe.learning_rate) is not None:
        summary.defaults["learning_rate"] = {"value": rate[0], "from": rate[1]}
    return summary


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reasons(model: nn.Module, names: Iterable[str], targets: Targets) -> dict[str, str]:
    """{weight matrix: why it is not adapted}, where that can be told."""
    modules, heads = dict(named_modules(model)), head_names(model)
    found: dict[str, str] = {}
    for name in names:
        places = [path.rpartition(".")[0] for path in name.split(" = ")]
        if why := [targets.left_out[p] for p in places if p in targets.left_out]:
            found[name] = why[0]
        elif any(isinstance(modules.get(p), nn.Embedding) for p in places):
            found[name] = "an embedding"
        elif any(p in heads for p in places):
            found[name] = "the output head"
    return found


def _merged_from(layer: AdaptedLayer, recipe: Recipe) -> int | None:
    """Tokens in a batch from which this layer multiplies with W + ΔW; None: never."""
    site, kernel = layer.site, recipe.kernel
    wide = layer.store.dense and layer.store.dtype in (torch.float32, torch.float64)
    if kernel is None or not wide or site.lookup or recipe.lora_dropout:
        return None
    if layer.update.delta.pair() is None or site.experts:
        return None
    return kernel.threshold(site.in_features, site.out_features)


def _count(groups: dict[str, dict[str, int]], name: str, elements: int) -> None:
    group = groups.setdefault(name, {"tensors": 0, "elements": 0})
    group["tensors"] += 1
    group["elements"] += elements


def say(text: str) -> None:
    if logger.hasHandlers():
        logger.info(text)
    else:
        print(printable(text), file=sys.stderr)
