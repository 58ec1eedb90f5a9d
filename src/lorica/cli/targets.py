"""List the layers of a model that can be adapted, and what a rank costs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lorica.cli._outcome import Outcome, VerbOptions, cell
from lorica.run.options import (
    HINT,
    METHOD,
    MODULES,
    NUMBER,
    PATH,
    WHOLE,
    WHOLES,
    QuantizationOptions,
    RemoteCodeOptions,
    UsageError,
)

if TYPE_CHECKING:
    from lorica.model.bases.base import AbstractBase

RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class Options(QuantizationOptions, RemoteCodeOptions, VerbOptions):
    """List the layers that a method can adapt, and what that costs. Reads no weights.

    Parameters are counted as values, however they are stored: with `--load-in-4bit` or of a
    quantised checkpoint, the table shows which weights are packed.

    Args:
        model: folder or hub id of a transformers model; only its configuration is read.
            Default: the embedded model.
        method: count what this method would train. Default: lora.
        r: rank. Default: the method's own, usually 16.
        lora_alpha: alpha in the scale. Default: the method's own.
        target_modules: names, one regular expression, or `all-linear`.
        target_parameters: expert tensors to adapt, by the end of their path. Default: all of them
            beside `all-linear`, otherwise none.
        exclude_modules: layers to leave out, in the same forms.
        adapt_towers: let `all-linear` adapt vision and audio towers too, and what connects them to
            the language model. Default: only the language model.
        layers_to_transform: indices of the transformer blocks.
    """

    model: tyro.conf.Positional[Annotated[str | None, PATH, HINT]] = None
    method: Annotated[str, METHOD, HINT] = "lora"
    r: Annotated[int | None, WHOLE, HINT] = None
    lora_alpha: Annotated[float | None, NUMBER, HINT] = None
    target_modules: Annotated[str | tuple[str, ...], MODULES, HINT] = "all-linear"
    target_parameters: Annotated[tuple[str, ...] | None, MODULES, HINT] = None
    exclude_modules: Annotated[str | tuple[str, ...] | None, MODULES, HINT] = None
    adapt_towers: bool = False
    layers_to_transform: Annotated[tuple[int, ...] | None, WHOLES, HINT] = None


def run(options: Options) -> Outcome:
    import lorica
    from lorica.recipe.recipe import Recipe
    from lorica.run.load_model import base_name, empty_model
    from lorica.run.quantization import check_method, packed_layers

    name = base_name(options.model)
    model = empty_model(name, trust_remote_code=options.trust_remote_code)
    groups = survey(model)
    given = {"r": options.r, "lora_alpha": options.lora_alpha}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        recipe = Recipe.parse(
            options.method,
            target_modules=options.target_modules,
            target_parameters=options.target_parameters,
            exclude_modules=options.exclude_modules,
            adapt_towers=options.adapt_towers,
            layers_to_transform=options.layers_to_transform,
            **fields,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    wanted = options.quantization_config()
    check_method(recipe, wanted, model.config, name)
    stored, packed = packed_layers(
        name, model.config, wanted, trust_remote_code=options.trust_remote_code
    )
    adapters = lorica.attach(model, recipe, verbose=False)
    contract = adapters.summary
    adapted = set(adapters.layers) or {name.rsplit(".", 1)[0] for name in adapters.direct}
    for group in groups:
        group["adapted"] = sum(path in adapted for path in group["paths"])
        group["packed"] = sum(path in packed for path in group["paths"])
    per_rank = sum(g["parameters_per_rank"] * g["adapted"] for g in groups)
    data = {
        "model": name,
        "class": type(model).__name__,
        "method": contract.method,
        "r": adapters.recipe.r,
        "parameters": contract.total - (contract.trainable if adapters.layers else 0),
        "trainable": contract.trainable,
        "parameters_per_rank": per_rank,
        "layers": groups,
        "quantization": stored or None,
        "tied": contract.tied,
        "left_out": contract.left_out,
    }
    return Outcome(data, (_table(data), *_words(data)))


def survey(model: Any) -> list[dict[str, Any]]:
    """Layers that can be adapted, gathered by name and shape, in model order.

    `parameters_per_rank` is in + out, of a stack for each expert: what one more rank of two factors
    costs in one layer.
    """
    from lorica.model.bases.base import base_for
    from lorica.model.bases.experts import ExpertTensor, expert_tensors
    from lorica.model.heads import head_names

    heads = head_names(model)
    stores: dict[str, AbstractBase] = {}
    for path, module in model.named_modules():
        kind = base_for(module) if path else None
        if kind is not None:
            stores[path] = kind(module)
        stores |= {f"{path}.{leaf}": ExpertTensor(module, leaf) for leaf in expert_tensors(module)}
    groups: dict[tuple, dict[str, Any]] = {}
    for path, store in stores.items():
        role = "embedding" if store.lookup else "head" if path in heads else "linear"
        role = "experts" if store.experts else role
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        key = (pattern, store.out_features, store.in_features, store.experts, role)
        count = max(store.experts, 1)
        group = groups.setdefault(
            key,
            {
                "name": path.rsplit(".", 1)[-1],
                "pattern": pattern,
                "role": role,
                "out": store.out_features,
                "in": store.in_features,
                "experts": store.experts,
                "bias": store.bias() is not None,
                "count": 0,
                "parameters": 0,
                "parameters_per_rank": count * (store.in_features + store.out_features),
                "paths": [],
            },
        )
        group["count"] += 1
        group["parameters"] += count * store.in_features * store.out_features
        group["paths"].append(path)
    return list(groups.values())


def _table(data: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = ("packed",) if any(g["packed"] for g in data["layers"]) else ()
    for column in ("adapted", "layers", "out x in", "role", "parameters", "per rank, each", *shown):
        right = column in ("adapted", "out x in", "parameters", "per rank, each")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for g in data["layers"]:
        table.add_row(
            f"{g['adapted']} of {g['count']}",
            cell(g["pattern"]),
            f"{g['experts']} x " * bool(g["experts"]) + f"{g['out']} x {g['in']}",
            g["role"],
            f"{g['parameters']:,}",
            f"{g['parameters_per_rank']:,}",
            *(_part(g["packed"], g["count"]) for _ in shown),
        )
    return table


def _part(some: int, every: int) -> str:
    return {0: "no", every: "yes"}.get(some, f"{some} of {every}")


def _words(data: dict[str, Any]) -> list[str]:
    share = data["trainable"] / max(data["parameters"], 1)
    rank = "" if data["r"] is None else f", r={data['r']}"
    lines = [
        "",
        f"{data['class']}: {data['parameters']:,} parameters",
        f"{data['method']}{rank}: {data['trainable']:,} train ({share:.2%})",
    ]
    if data["quantization"]:
        lines.append(f"quantised by {data['quantization']}; the numbers count values")
    if data["r"] is not None:
        costs = ", ".join(f"r={r}: {data['parameters_per_rank'] * r:,}" for r in RANKS)
        lines.append(f"two factors a layer, by rank: {costs}")
    left_out: dict[str, str] = data["left_out"]
    for why in dict.fromkeys(left_out.values()):
        count = sum(w == why for w in left_out.values())
        lines.append(f"`all-linear` leaves out {count} layer(s): {why}")
    lines += [f"{a} shares its weight with {b}" for a, b in data["tied"].items()]
    return lines
