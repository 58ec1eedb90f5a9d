"""Resolves a PEFT adapter on a model: its modules, its recipe, and the copies its file holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.formats.peft.config import (
    CONVERT,
    USED_AS,
    Config,
    Unsupported,
    build_recipe,
    method_of,
    of_file,
)
from lorica.formats.peft.names import SHADOWS, plain_modules, shortest
from lorica.formats.peft.places import PREFIX, factor_keys
from lorica.formats.peft.tables import tables_of
from lorica.methods.ranks.base import ENDS
from lorica.model.adapters import Adapters
from lorica.model.bases.base import base_for
from lorica.model.bases.experts import expert_paths
from lorica.model.targets import matches
from lorica.model.token_rows import embedding_paths
from lorica.patterns import find, matching
from lorica.recipe.recipe import Recipe
from lorica.tensors.dtensor_ops import read_full
from lorica.tensors.modules import named_parameters
from lorica.text import shorten

T = TypeVar("T")
_FIRST = re.compile(r".*?\.[^.]*\.(\d+)\.")


def recipe_for(
    model: nn.Module, data: Config, tensors: Mapping[str, Tensor], file: Path
) -> tuple[Recipe, bool]:
    """The recipe that computes on this model what PEFT computes with a checked configuration.

    Returns:
        The recipe, and whether its start has to be computed from the base and frozen beside it, as
        PEFT would take it out of the base.

    Raises:
        ValueError: it means no module of the model, or PEFT's own start can't be relied on there.
    """
    method = method_of(data, file)
    modules = dict(model.named_modules())
    modules.pop("", None)
    stacks, named = _parameters(model, modules, data, file)
    with of_file(file):
        layers = _targets(model, modules, data, file) if data.get("target_modules") else []
    layers += [n for n in named if n not in layers]
    if data.get("ensure_weight_tying"):  # what is tied with a target has an adapter, too
        tied = (n for n in embedding_paths(model) if n not in layers)
        layers += [n for n in tied if factor_keys(f"{PREFIX}{n}", False)[0] in tensors]
    transposed = [
        n for n in layers if (b := base_for(modules[n])) and b.transposed and not b.lookup
    ]
    if method.frozen_start and transposed:
        raise ValueError(
            f"{file}: `init_lora_weights={data['init_lora_weights']!r}` on the transposed layer"
            f" {transposed[0]!r}: PEFT's correction of such a base can't be relied on; {CONVERT}"
        )
    with of_file(file):
        patterns = {
            key: _used(method.fields[key], [*layers, *stacks])
            for key in ("rank_pattern", "alpha_pattern")
            if key in method.fields
        }
    tables = tables_of(model, data, tensors, file)
    recipe = build_recipe(
        data,
        method,
        file,
        target_modules=shortest(layers, modules) if layers else (),
        target_parameters=tuple(stacks) or None,
        modules_to_save=_exact(tables.in_full, modules),
        trainable_token_indices={n: ids for n, (ids, _) in tables.rows.items()} or None,
        **patterns,
    )
    return recipe, method.frozen_start


def _parameters(
    model: nn.Module, modules: Mapping[str, nn.Module], data: Config, file: Path
) -> tuple[list[str], list[str]]:
    """The expert tensors that PEFT's `target_parameters` means, and the layers whose weight it
    means.

    Raises:
        Unsupported: it means another parameter, or nothing.
    """
    names = data.get("target_parameters") or ()
    every = [n for n, _ in named_parameters(model)]
    stacks = expert_paths(modules)
    linear = [n for n, m in modules.items() if base_for(m) is not None and not _lookup(m)]
    weights = {f"{n}.weight": n for n in linear}
    for name in names:
        found = [n for n in every if matches(name, n)]
        if not found or any(n not in stacks and n not in weights for n in found):
            what = f"means {found[0]!r}, which is no" if found else "matches no"
            raise Unsupported(
                f"{file}: `target_parameters`: {shorten(name)} {what} stack of experts' weights"
                f" (experts, out, in) of this {type(model).__name__}; merge the adapter with PEFT,"
                " or load the model that it was trained on"
            )
    meant = [n for n in (*stacks, *weights) if any(matches(name, n) for name in names)]
    return [n for n in meant if n in stacks], [weights[n] for n in meant if n in weights]


def _lookup(module: nn.Module) -> bool:
    base = base_for(module)
    return base is not None and base.lookup


def _exact(wanted: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    names = shortest(wanted, modules)
    return tuple(wanted) if isinstance(names, str) else names


def _used(patterns: Mapping[str, T], layers: Sequence[str]) -> dict[str, T]:
    """Patterns that match something: PEFT overlooks the others, a recipe does not."""
    return {p: patterns[p] for p, ended in find(patterns, layers, form=ENDS).items() if ended}


def _targets(
    model: nn.Module, modules: Mapping[str, nn.Module], data: Config, file: Path
) -> list[str]:
    """The modules PEFT would adapt, by its own rules."""
    spec = data["target_modules"]
    if isinstance(spec, str) and spec.lower() == "all-linear":
        found = _all_linear(model, modules, data.get("task_type"))
    elif isinstance(spec, str):
        found = matching(spec, modules)
    else:
        found = _in_layers([n for n in modules if any(matches(str(p), n) for p in spec)], data)
    excluded = data.get("exclude_modules")
    if isinstance(excluded, str):
        out = set(matching(excluded, found))
    else:
        out = {n for n in found if any(matches(str(p), n) for p in excluded or ())}
    for below in find(data.get("modules_to_save") or (), found, form=SHADOWS, how="match").values():
        out.update(below)
    found = [n for n in found if n not in out]
    if not found:
        endings = sorted({n.rsplit(".", 1)[-1] for n in modules} - {str(i) for i in range(1000)})
        raise ValueError(
            f"{file}: `target_modules={shorten(spec)}` means no module of this"
            f" {type(model).__name__}, whose modules end in {', '.join(endings)}. The adapter is"
            f" for {shorten(data.get('base_model_name_or_path'))}; load that model"
        )
    return found


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], task: str | None) -> list[str]:
    """Every linear layer but the output embeddings, or but the first head of a classifier."""
    found = [n for n, m in modules.items() if base_for(m) is not None and not _lookup(m)]
    if not isinstance(model, PreTrainedModel):
        return found
    head = model.get_output_embeddings()
    if head is None and task == "SEQ_CLS":
        head = next((modules[h] for h in ("score", "classifier") if h in modules), None)
    return [n for n in found if modules[n] is not head]


def _in_layers(names: Sequence[str], data: Config) -> list[str]:
    """PEFT's `layers_to_transform`: the first number in a path, or the one after a container's
    name."""
    wanted = data.get("layers_to_transform")
    if wanted is None or wanted == []:
        return list(names)
    wanted = [wanted] if isinstance(wanted, int) else wanted
    containers = data.get("layers_pattern") or []
    containers = [containers] if isinstance(containers, str) else containers
    index: dict[str, str | None] = {}
    for hits in find(containers, names, **USED_AS["layers_pattern"]._asdict()).values():
        for name, groups in hits.items():
            index.setdefault(name, groups[-1])
    if not containers:
        firsts = ((name, _FIRST.match(name)) for name in names)
        index = {name: first[1] for name, first in firsts if first is not None}
    return [n for n in names if n in index and int(index[n] or -1) in wanted]


@torch.no_grad()
def spare(adapters: Adapters, tensors: Mapping[str, Tensor], used: set[str]) -> list[str]:
    """Problems with the tensors of PEFT's file that nothing here reads.

    PEFT stores copies of frozen things too (an adapted embedding's table, a frozen head's bias);
    they are compared with the base, and whatever else is left over is reported.
    """
    modules = plain_modules(adapters.model)
    problems = []
    for key in sorted(set(tensors) - used):
        path = key.removeprefix(PREFIX)
        owner, _, leaf = path.rpartition(".")
        owner, _, wrapper = owner.rpartition(".")
        module = modules.get(owner)
        if wrapper == "modules_to_save" and f"{PREFIX}{owner}.{leaf}" in tensors:
            if not torch.equal(tensors[key], tensors[f"{PREFIX}{owner}.{leaf}"]):
                problems.append(f"{key} differs from {PREFIX}{owner}.{leaf}")
            continue
        if wrapper == "original_module" and owner in adapters.saved:
            continue  # the frozen original of a trained copy
        frozen = dict(module.named_parameters(recurse=False)) if module is not None else {}
        if wrapper != "base_layer" or leaf not in frozen:
            problems.append(f"{key} belongs to nothing in this model")
        elif not _same(tensors[key], adapters, owner, leaf, frozen[leaf]):
            problems.append(
                f"{key} {tuple(tensors[key].shape)} is not the base's own {owner}.{leaf}"
                f" {tuple(frozen[leaf].shape)}: the adapter was trained on another base, or on one"
                " with a resized vocabulary"
            )
    return problems


def _same(stored: Tensor, adapters: Adapters, owner: str, leaf: str, base: Tensor) -> bool:
    base = read_full(base).cpu()
    if stored.shape != base.shape:
        return False
    layer = adapters.layers.get(owner)
    if (
        layer is not None
        and leaf == "weight"
        and (carried := layer.update.frozen_factors) is not None
    ):
        # PEFT stores the table from which it has taken the start.
        delta = carried.weight().cpu()
        base = base.float() + (delta.T if layer.store.transposed else delta)
        return torch.allclose(stored.float(), base, rtol=1e-2, atol=1e-3 * float(base.abs().max()))
    return torch.equal(stored.to(base.dtype), base) or torch.equal(stored, base.to(stored.dtype))
