"""Names of modules from before a model's classes were renamed.

transformers 5 moved the modules of many families (LLaVA's language model, ViT's attention), and
has for each family the renamings under which it still reads old checkpoints. An adapter's keys
have the same old names, and go the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorica.formats.peft.config import Config, suffixes
from lorica.formats.peft.names import plain_modules, shortest
from lorica.formats.peft.places import PREFIX
from lorica.methods.ranks.base import ENDS
from lorica.patterns import find

T = TypeVar("T")
# They end a module's path in a key; what belongs to an adapter comes from `suffixes`, too.
_MARKS = (".base_layer.", ".token_adapter.", ".modules_to_save.", ".original_module.")


def on_model(
    model: nn.Module, data: Config, tensors: Mapping[str, Tensor]
) -> tuple[Config, Mapping[str, Tensor]]:
    """A file of PEFT's under the names that this model's modules have; one that has them already
    is returned as it is.

    Where a name has changed, the configuration's patterns are of old names too: they are replaced
    by the modules that they meant.
    """
    if not isinstance(model, PreTrainedModel):
        return data, tensors
    modules, own = plain_modules(model), suffixes(data)
    owners = {key: _owner(key, (*own, *_MARKS)) for key in tensors if key.startswith(PREFIX)}
    moved = _moved(model, modules, {o for o in owners.values() if o not in modules})
    if not moved:
        return data, tensors
    now = {old: moved.get(old, old) for old in owners.values()}
    adapted = {owners[key]: None for key in owners if any(mark in key for mark in own)}
    renamed = {key: t for key, t in tensors.items() if key not in owners} | {
        PREFIX + now[old] + key.removeprefix(PREFIX)[len(old) :]: tensors[key]
        for key, old in owners.items()
    }
    names = shortest([now[old] for old in adapted], modules)
    changed: dict[str, Any] = {  # Any: values of the configuration
        "target_modules": names if isinstance(names, str) else [*names],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _in_full(data.get("modules_to_save") or (), now) or None,
    }
    for key in ("rank_pattern", "alpha_pattern"):
        changed[key] = _for_each(data.get(key) or {}, adapted, now)
    if isinstance(rows := data.get("trainable_token_indices"), Mapping):
        named: Mapping[str, list[int]] = rows
        changed["trainable_token_indices"] = {
            now[old]: ids for name, ids in named.items() for old in now if old.endswith(name)
        }
    return {**data, **changed}, renamed


def _owner(key: str, marks: Iterable[str]) -> str:
    """The path of the module that a key belongs to."""
    path = key.removeprefix(PREFIX)
    ends = [path.index(mark) for mark in marks if mark in path]
    return path[: min(ends)] if ends else path.rpartition(".")[0]


def _in_full(patterns: Iterable[str], now: Mapping[str, str]) -> list[str]:
    """Today's paths of the modules that train in full: those with tensors in the file, or what
    holds them, as PEFT's names mean it."""
    found: dict[str, None] = {}
    for old, new in now.items():
        parts = old.split(".")
        for i in range(1, len(parts) + 1):
            below = "".join(f".{part}" for part in parts[i:])
            if ".".join(parts[:i]).endswith(tuple(patterns)):
                found[new.removesuffix(below) if new.endswith(below) else new] = None
                break
    return [*found]


def _moved(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], old: Iterable[str]
) -> dict[str, str]:
    """{old path: the model's own} of those that transformers renames to a module of the model."""
    every = get_model_conversion_mapping(model)
    renamings = [r for r in every if isinstance(r, WeightRenaming)]
    found = {p: rename_source_key(f"{p}.weight", renamings, [])[0] for p in old}
    return {p: n.removesuffix(".weight") for p, n in found.items() if n[:-7] in modules}


def _for_each(
    patterns: Mapping[str, T], adapted: Iterable[str], now: Mapping[str, str]
) -> dict[str, T]:
    """{module's path: value} of patterns that are matched with old paths; the first counts."""
    out: dict[str, T] = {}
    for pattern, ended in find(patterns, [*adapted], form=ENDS).items():
        for old in ended:
            out.setdefault(now[old], patterns[pattern])
    return out
