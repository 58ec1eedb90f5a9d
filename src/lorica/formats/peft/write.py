"""Writes an adapter in PEFT's form, wherever PEFT computes the same from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.models.auto import modeling_auto as auto

from lorica.embedded import named
from lorica.formats.lorica_json import frozen_ranks
from lorica.formats.peft.names import plain_modules, shadows, shortest, trained_names
from lorica.formats.peft.places import (
    LORA,
    Place,
    combine_of,
    factors_of,
    own_form,
    places,
    written,
)
from lorica.formats.peft.tables import indices_of
from lorica.formats.safe_files import PEFT_CONFIG
from lorica.methods.ranks.base import ENDS, flaw
from lorica.model.adapters import Adapters
from lorica.model.bases.dense import ScaledEmbedding
from lorica.patterns import find
from lorica.tensors.dtensor_ops import read_full

T = TypeVar("T")
# PEFT (0.21) refuses its LORA on these layers in these families, for their fast kernels read
# the weights past the layer.
_REFUSED_LAYERS = ("out_proj", "conv1d")
_REFUSED_FAMILIES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


# PEFT (0.21) takes such names in `target_modules`, in families that transformers converts as these,
# for the experts' weights of before they were fused, and no longer for layers.
_TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def obstacle(adapters: Adapters) -> str | None:
    """Why PEFT can't compute what these adapters compute, or None where it can."""
    recipe = adapters.recipe
    if adapters.direct or not adapters.base_unchanged:
        return f"`{recipe.text()}` trains the base itself"
    combine = combine_of(adapters)
    if combine.peft_flags is None:
        return f"PEFT has no form of `{combine.name}`"
    form = own_form(adapters, frozen_ranks(adapters))
    if form is None and (why := refused_layer(adapters)) is not None:
        return why
    for site, layer in adapters:
        if form is None and layer.update.delta.factors() is None:
            return f"`{recipe.delta.name}` is no product of two factors ({site!r})"
        if isinstance(layer.store, ScaledEmbedding) and not layer.store.peft_knows:
            return f"PEFT does not know the constant that {site!r} multiplies its output by"
        if layer.site.experts and combine.peft_flags:
            return f"PEFT has no form of `{combine.name}` for the expert tensor {site!r}"
        unknown = {n for n, _ in layer.combine.named_parameters()} - set(combine.peft_tensors)
        if unknown:
            return f"PEFT has no place for {sorted(unknown)} of `{combine.name}` ({site!r})"
    if _saved_names(adapters) is None:
        return (
            "PEFT's `modules_to_save` matches by the end of a path and cannot single out"
            f" {', '.join(_in_full(adapters))}"
        )
    try:
        indices_of(adapters)
    except LookupError as why:
        return str(why)
    return None


def refused_layer(adapters: Adapters) -> str | None:
    """Why PEFT would not put its LORA onto these layers, whatever it holds; None: it would."""
    model = adapters.model
    family: str = model.config.model_type if isinstance(model, PreTrainedModel) else ""
    if family in _REFUSED_FAMILIES:
        for site in adapters.layers:
            if site.rpartition(".")[2] in _REFUSED_LAYERS:
                return f"PEFT refuses {LORA} on {site!r} of a {family} model"
    return None


def _taken_for_experts(adapters: Adapters) -> list[str]:
    """The layers that PEFT would take for expert tensors; it knows them by their weight's name."""
    model = adapters.model
    kind: str = model.config.model_type if isinstance(model, PreTrainedModel) else ""
    patterns: dict[str, str] = vars(conversion_mapping)["_MODEL_TO_CONVERSION_PATTERN"]
    names = _TAKEN_FOR_EXPERTS.get(patterns.get(kind, kind), ())
    single = [site for site, layer in adapters if not layer.site.experts]
    return [site for site in single if site.rpartition(".")[2] in names]


def _in_full(adapters: Adapters) -> list[str]:
    return [name for name, module in adapters.saved.items() if module.only is None]


def _saved_names(adapters: Adapters) -> tuple[str, ...] | None:
    modules = plain_modules(adapters.model)
    return trained_names(_in_full(adapters), modules, adapters.layers)


@torch.no_grad()
def file_tensors(adapters: Adapters, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors, on the CPU, in the dtype they train in; `state`: all of the adapters'."""
    ranks = frozen_ranks(adapters)
    parts: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, place in places(adapters, ranks).items():
        parts.setdefault(place.key, []).append((place, state[name]))
    out: dict[str, Tensor] = {}
    for key, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0].start)
        first = pieces[0][0]
        tensors = [t.cpu() for _, t in pieces]
        whole = tensors[0] if first.axis is None else torch.cat(tensors, first.axis)
        out[key] = first.folded(whole)
    for _, layer in adapters if own_form(adapters, ranks) is None else ():
        a, b = factors_of(adapters, layer)
        if a.key not in out:
            factors = written(layer)
            assert factors is not None
            out[a.key] = a.folded(read_full(factors.A).cpu())
            out[b.key] = b.folded(read_full(factors.B).cpu())
    # A copy each: the format knows no shared memory, and some are views.
    out = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in out.items()}
    for _, layer in adapters:  # PEFT computes with the padding's column, where it is not zero
        key = factors_of(adapters, layer)[0].key
        if layer.store.padding is not None and key in out:
            out[key][:, layer.store.padding] = 0
    return out


def config(
    adapters: Adapters,
    ranks: Mapping[str, int] | None = None,
    scales: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`adapter_config.json`: what PEFT needs to compute the same, no more.

    The user's r, alpha and `use_rslora` stay where they are true of the file; where something is
    frozen, or s differs between layers, alpha = s·rank is written for each layer. `ranks` and
    `scales` (of every layer) replace the adapters' own where the factors were written otherwise.
    """
    recipe = adapters.recipe
    if ranks is not None and scales is not None:
        alphas, rooted = {n: _whole(scales[n] * ranks[n]) for n in ranks}, False
    elif (form := own_form(adapters, frozen_ranks(adapters))) is not None:
        bias = form.bias if recipe.bias == "lora_only" else recipe.bias
        own = {"r": next(layer.site.r for _, layer in adapters), form.dropout: recipe.lora_dropout}
        own |= {form.transposed: _transposed(adapters)} if form.transposed is not None else {}
        return {**_about(adapters, form.peft_type), **own, **form.fields, "bias": bias}
    else:
        ranks, alphas, rooted = _numbers(adapters)
    r, alpha = _commonest(ranks), _commonest(alphas)
    parameters = _parameters(adapters)
    ranks = {parameters.get(n, n): rank for n, rank in ranks.items()}
    alphas = {parameters.get(n, n): a for n, a in alphas.items()}
    return {
        **_about(adapters, LORA),
        "r": r,
        "lora_alpha": alpha,
        # PEFT knows no dropout on the input of parameters, and refuses it beside them.
        "lora_dropout": 0.0 if parameters else recipe.lora_dropout,
        "use_rslora": rooted,
        # The start is in the factors; any other value would make PEFT change the base.
        "init_lora_weights": True,
        "bias": recipe.bias,
        "fan_in_fan_out": _transposed(adapters),
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
        **(combine_of(adapters).peft_flags or {}),
        **({"trainable_token_indices": indices_of(adapters)} if adapters.tables else {}),
    }


def _transposed(adapters: Adapters) -> bool:
    """Whether a linear layer stores its weight as (in, out)."""
    return any(layer.store.transposed and not layer.store.lookup for _, layer in adapters)


def _about(adapters: Adapters, peft_type: str) -> dict[str, Any]:
    """What every type says: of which model the adapter is, and which modules it means."""
    modules = plain_modules(adapters.model)
    base = adapters.model.config if isinstance(adapters.model, PreTrainedModel) else None
    stacks = _parameters(adapters)
    targets = shortest([n for n in adapters.layers if n not in stacks], modules)
    return {
        "peft_type": peft_type,
        "auto_mapping": None,
        "base_model_name_or_path": (named(base.name_or_path) or None) if base is not None else None,
        "revision": None,
        "task_type": _task(adapters, modules),
        "inference_mode": True,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        **({"target_parameters": [*stacks.values()]} if stacks else {}),
        "modules_to_save": list(_saved_names(adapters) or ()) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _parameters(adapters: Adapters) -> dict[str, str]:
    """{path of a layer that PEFT knows by a parameter: that parameter}: expert tensors, and what it
    would take for them."""
    stacks = {site: site for site, layer in adapters if layer.site.experts}
    return {**stacks, **{site: f"{site}.weight" for site in _taken_for_experts(adapters)}}


def _numbers(adapters: Adapters) -> tuple[dict[str, int], dict[str, float], bool]:
    """Rank and alpha of every layer as written, and `use_rslora`."""
    recipe = adapters.recipe
    rank, scale = recipe.rank, recipe.scale
    assert rank is not None and scale is not None, "a LORA has both"
    factors = {name: written(layer) for name, layer in adapters}
    ranks = {name: f.A.shape[-2] for name, f in factors.items() if f is not None}
    scales = {name: f.scale for name, f in factors.items() if f is not None}
    given = rank.assign(list(adapters.layers), recipe)
    alphas = {n: _whole(alpha) for n, (_, alpha) in given.items() if alpha is not None}
    rooted = scale.peft_rslora
    true = len(set(scales.values())) == 1 and all(
        given[n][0] == ranks[n] and scale.factor(given[n][1], given[n][0]) == scales[n]
        for n in ranks
    )
    if rooted is not None and true and len(alphas) == len(ranks):
        return ranks, alphas, rooted
    return ranks, {n: _whole(scales[n] * ranks[n]) for n in ranks}, False


def _whole(alpha: float) -> float:
    """An integer where it is one up to rounding: some consumers of the file parse nothing else."""
    near = round(alpha)
    return near if near and abs(alpha - near) <= 1e-12 * near else alpha


def _commonest(values: Mapping[str, T]) -> T:
    return Counter(values.values()).most_common(1)[0][0]


def exceptions(values: Mapping[str, T], usual: T) -> dict[str, T]:
    """Patterns that match one module each, so that their order means nothing (PEFT sorts them)."""
    others = sorted(n for n, v in values.items() if v != usual)
    ended = find([n for n in others if flaw(n) is None], values, form=ENDS)
    alone = {n for n, found in ended.items() if list(found) == [n]}
    return {n if n in alone else f"^{re.escape(n)}": values[n] for n in others}


_TASKS: dict[str, Mapping[Any, Any]] = {
    "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
}
# What PEFT trains in full by itself under a task, whatever `modules_to_save` says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _task(adapters: Adapters, modules: Mapping[str, nn.Module]) -> str | None:
    """PEFT's task, from transformers' own tables; None where PEFT would then look for a head that
    the file doesn't hold."""
    name = type(adapters.model).__name__
    for task, table in _TASKS.items():
        classes = {c for v in table.values() for c in ((v,) if isinstance(v, str) else v)}
        if name not in classes:
            continue
        heads = _HEADS.get(task, ())
        found = {m for m in modules if any(m.endswith(h) for h in heads)}
        held = found <= set(_in_full(adapters))
        return task if held and not any(shadows(h, adapters.layers) for h in heads) else None
    return None


def write_config(data: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(data, indent=2, sort_keys=True)
    (folder / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
