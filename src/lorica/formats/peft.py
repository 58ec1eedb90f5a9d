"""PEFT's files: written where PEFT's formula is exact, read whoever wrote them.

    ΔW = s·B'A',  A' = [A; A₀] (r + k, in),  B' = [B, B₀] (out, r + k)

with what a layer carries stacked under what trains: one plain LoRA, whatever the start was. Keys
are `base_model.model.` + module path + suffix; s is written as alpha = s·(r + k).

A delta may declare a type of PEFT's own (`PeftForm`). It is taken where it holds all there is: one
rank, plain linear layers, nothing carried, a plain sum W + ΔW. Elsewhere the delta's factors make a
LORA, if it has any.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from lorica.formats.module_names import plain_modules, shadows, shortest, trained_names
from lorica.formats.safe_files import PEFT_CONFIG, check_items, check_patterns, check_types
from lorica.interfaces import Factors
from lorica.methods.choice import AXES
from lorica.methods.deltas.base import DeltaChoice, PeftForm
from lorica.methods.optional import ReadsAsLora
from lorica.methods.ranks.base import first_match, flaw
from lorica.model.adapters import Adapters
from lorica.model.bases.base import base_for
from lorica.model.layer import AdaptedLinear
from lorica.model.targets import matches
from lorica.recipe.compatibility import MOST, MOST_R
from lorica.recipe.recipe import Recipe
from lorica.recipe.registry import find, names
from lorica.tensors.dtensor_ops import read_full
from lorica.text import shorten

PREFIX = "base_model.model."
LORA = "LORA"

# -- where a tensor of ours lies in PEFT's file ----------------------------------------------------


@dataclass(frozen=True)
class Place:
    """`length` rows (axis 0) or columns (axis 1) of the tensor `key`, from `start` on; axis None is
    all of it."""

    key: str
    axis: int | None = None
    start: int = 0
    length: int = 0

    def cut(self, tensors: Mapping[str, Tensor]) -> Tensor:
        whole = tensors[self.key]
        return whole if self.axis is None else whole.narrow(self.axis, self.start, self.length)


def carried_ranks(adapters: Adapters) -> dict[str, int]:
    """{module path: rank of what its layer carries}."""
    return {
        name: 0 if layer.update.frozen_A is None else layer.update.frozen_A.shape[0]
        for name, layer in adapters
    }


def own_form(adapters: Adapters, carried: Mapping[str, int]) -> PeftForm | None:
    """The type of PEFT's own that holds all of this, or None: then it is LORA, if anything."""
    recipe: Any = adapters.recipe
    form: PeftForm | None = recipe.delta.peft_form()
    if form is None or any(carried.values()) or recipe.combine.peft_flags != {}:
        return None
    layers = [layer for _, layer in adapters]
    plain = not any(layer.store.transposed or layer.store.lookup for layer in layers)
    one = len({layer.site.r for layer in layers}) == 1
    return form if plain and one and all(recipe.delta.peft_serves(x.site) for x in layers) else None


def places(adapters: Adapters, carried: Mapping[str, int]) -> dict[str, Place]:
    """{name in `adapters.state_dict()`, or of a buffer of a module trained in full: its place}.

    What is not in it is not in PEFT's file as such (a delta whose factors are computed).
    """
    combine: Any = adapters.recipe.combine
    form = own_form(adapters, carried)
    out: dict[str, Place] = {}
    for site, layer in adapters:
        key = f"{PREFIX}{site}"
        a, b = factor_keys(key, layer.site.lookup)
        names = {id(p): n for n, p in layer.named_parameters()}
        pair = layer.update.delta.pair()
        if form is not None:
            for name, suffix in form.tensors.items():
                out[f"{site}.update.delta.{name}"] = Place(f"{key}.{suffix}")
        elif pair is not None and _is_own(layer):
            r, k = pair.A.shape[0], carried[site]
            out[f"{site}.{names[id(pair.A)]}"] = Place(a, 0, 0, r)
            out[f"{site}.{names[id(pair.B)]}"] = Place(b, 1, 0, r)
            if k:
                out[f"{site}.update.frozen_A"] = Place(a, 0, r, k)
                out[f"{site}.update.frozen_B"] = Place(b, 1, r, k)
        for name, suffix in combine.peft_tensors.items():
            out[f"{site}.combine.{name}"] = Place(f"{key}.{suffix}")
        for name, _ in layer.own.named_parameters():
            out[f"{site}.own.{name}"] = Place(f"{key}.base_layer.{name}")
    for site, module in adapters.saved.items():
        for name in module.copy.state_dict() if module.only is None else sorted(module.only):
            out[f"{site}.copy.{name}"] = Place(f"{PREFIX}{site}.{name}")
    return out


def _is_own(layer: AdaptedLinear) -> bool:
    """Whether the delta's factors are the trained pair itself, not computed from it."""
    pair, own = layer.update.delta.pair(), layer.update.delta.factors()
    return pair is not None and own is not None and own.A is pair.A and own.B is pair.B


@torch.no_grad()
def written(layer: AdaptedLinear) -> Factors | None:
    """The update's factors as a LORA file holds them: of computed ones, ranks that are nothing (a
    row of A or a column of B of zeros) are left out, all but one."""
    factors = layer.update.factors()
    if factors is None or _is_own(layer):
        return factors
    A, B = read_full(factors.A), read_full(factors.B)
    keep = A.any(1) & B.any(0)
    keep[0] |= ~keep.any()
    return Factors(A[keep], B[:, keep], factors.scale)


def factor_keys(key: str, lookup: bool) -> tuple[str, str]:
    if lookup:
        return f"{key}.lora_embedding_A", f"{key}.lora_embedding_B"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight"


# -- writing ---------------------------------------------------------------------------------------


def obstacle(adapters: Adapters) -> str | None:
    """Why PEFT can't compute what these adapters compute, or None where it can."""
    recipe: Any = adapters.recipe
    if adapters.direct or not adapters.base_unchanged:
        return f"`{recipe.text()}` trains the base itself"
    if recipe.combine.peft_flags is None:
        return f"PEFT has no form of `{recipe.combine.name}`"
    form = own_form(adapters, carried_ranks(adapters))
    for site, layer in adapters:
        if form is None and layer.update.delta.factors() is None:
            return f"`{recipe.delta.name}` is no product of two factors ({site!r})"
        unknown = {n for n, _ in layer.combine.named_parameters()} - set(
            recipe.combine.peft_tensors
        )
        if unknown:
            return f"PEFT has no place for {sorted(unknown)} of `{recipe.combine.name}` ({site!r})"
    if _saved_names(adapters) is None:
        return (
            "PEFT's `modules_to_save` matches by the end of a path and cannot single out"
            f" {', '.join(_in_full(adapters))}"
        )
    return None


def _in_full(adapters: Adapters) -> list[str]:
    return [name for name, module in adapters.saved.items() if module.only is None]


def _saved_names(adapters: Adapters) -> tuple[str, ...] | None:
    modules = plain_modules(adapters.model)
    return trained_names(_in_full(adapters), modules, adapters.layers)


@torch.no_grad()
def file_tensors(adapters: Adapters, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors, on the CPU, in the dtype they train in; `state`: all of the adapters'."""
    carried = carried_ranks(adapters)
    parts: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, place in places(adapters, carried).items():
        parts.setdefault(place.key, []).append((place, state[name]))
    out: dict[str, Tensor] = {}
    for key, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0].start)
        axis = pieces[0][0].axis
        tensors = [t.cpu() for _, t in pieces]
        out[key] = tensors[0] if axis is None else torch.cat(tensors, axis)
    for site, layer in adapters if own_form(adapters, carried) is None else ():
        a, b = factor_keys(f"{PREFIX}{site}", layer.site.lookup)
        if a not in out:
            factors = written(layer)
            assert factors is not None
            out[a], out[b] = read_full(factors.A).cpu(), read_full(factors.B).cpu()
    # A copy each: the format knows no shared memory, and some are views.
    return {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in out.items()}


def config(
    adapters: Adapters,
    ranks: Mapping[str, int] | None = None,
    scales: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`adapter_config.json`: what PEFT needs to compute the same, no more.

    The user's r, alpha and `use_rslora` stay where they are true of the file; where something is
    carried, or s differs between layers, alpha = s·rank is written for each layer. `ranks` and
    `scales` (of every layer) stand for the adapters' own where the factors were written otherwise.
    """
    recipe: Any = adapters.recipe
    if ranks is not None and scales is not None:
        alphas, rooted = {n: _whole(scales[n] * ranks[n]) for n in ranks}, False
    elif (form := own_form(adapters, carried_ranks(adapters))) is not None:
        bias = form.bias if recipe.bias == "lora_only" else recipe.bias
        own = {"r": next(layer.site.r for _, layer in adapters), form.dropout: recipe.lora_dropout}
        return {**_about(adapters, form.peft_type), **own, **form.fields, "bias": bias}
    else:
        ranks, alphas, rooted = _numbers(adapters)
    r, alpha = _commonest(ranks), _commonest(alphas)
    return {
        **_about(adapters, LORA),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": recipe.lora_dropout,
        "use_rslora": rooted,
        # The start is in the factors; any other value would make PEFT change the base.
        "init_lora_weights": True,
        "bias": recipe.bias,
        "fan_in_fan_out": any(
            layer.store.transposed and not layer.store.lookup for _, layer in adapters
        ),
        "rank_pattern": _exceptions(ranks, r),
        "alpha_pattern": _exceptions(alphas, alpha),
        **recipe.combine.peft_flags,
    }


def _about(adapters: Adapters, peft_type: str) -> dict[str, Any]:
    """What every type says: of which model the adapter is, and which modules it means."""
    modules = plain_modules(adapters.model)
    base = adapters.model.config if isinstance(adapters.model, PreTrainedModel) else None
    targets = shortest(adapters.layers, modules)
    return {
        "peft_type": peft_type,
        "auto_mapping": None,
        "base_model_name_or_path": (base.name_or_path or None) if base is not None else None,
        "revision": None,
        "task_type": _task(adapters, modules),
        "inference_mode": True,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(_saved_names(adapters) or ()) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _numbers(adapters: Adapters) -> tuple[dict[str, int], dict[str, float], bool]:
    """Rank and alpha of every layer as written, and `use_rslora`."""
    recipe: Any = adapters.recipe
    factors = {name: written(layer) for name, layer in adapters}
    ranks = {name: f.A.shape[0] for name, f in factors.items() if f is not None}
    scales = {name: f.scale for name, f in factors.items() if f is not None}
    given = recipe.rank.assign(list(adapters.layers), recipe)
    rooted: bool | None = recipe.scale.peft_rslora
    true = len(set(scales.values())) == 1 and all(
        given[n][0] == ranks[n] and recipe.scale.factor(given[n][1], given[n][0]) == scales[n]
        for n in ranks
    )
    if rooted is not None and true:
        return ranks, {n: _whole(alpha) for n, (_, alpha) in given.items()}, rooted
    return ranks, {n: _whole(scales[n] * ranks[n]) for n in ranks}, False


def _whole(alpha: float) -> float:
    """An integer where it is one up to rounding: some consumers of the file parse nothing else."""
    near = round(alpha)
    return near if near and abs(alpha - near) <= 1e-12 * near else alpha


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Patterns that match one module each, so that their order means nothing (PEFT sorts them)."""
    out = {}
    for name in sorted(n for n, v in values.items() if v != usual):
        alone = [n for n in values if first_match({name: 0}, n)] == [name]
        out[name if alone else f"^{re.escape(name)}"] = values[name]
    return out


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


# -- reading ---------------------------------------------------------------------------------------

TYPES: dict[str, tuple[type, ...]] = {  # of every type of PEFT's that is read
    "peft_type": (str,), "r": (int,), "target_modules": (list, str),
    "exclude_modules": (list, str), "modules_to_save": (list,), "layers_to_transform": (list, int),
    "layers_pattern": (list, str), "bias": (str,), "task_type": (str,), "peft_version": (str,),
    "base_model_name_or_path": (str,),
}  # fmt: skip
ITEMS: dict[str, type] = {
    "target_modules": str, "exclude_modules": str, "modules_to_save": str, "layers_pattern": str,
    "layers_to_transform": int,
}  # fmt: skip
_PAIR_TYPES: dict[str, tuple[type, ...]] = {
    "lora_alpha": (int, float), "lora_dropout": (int, float), "use_rslora": (bool,),
    "init_lora_weights": (bool, str), "rank_pattern": (dict,), "alpha_pattern": (dict,),
    "fan_in_fan_out": (bool,),
}  # fmt: skip
# Said about where the file comes from.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
}  # fmt: skip
# Said about a start that `init_lora_weights` speaks of.
_PAIR_IGNORED = {
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_STARTS = {True, False, "gaussian", "eva", "orthogonal", "mica"}  # leave the base as it is
_LOST = {  # start -> why the base that the adapter was trained on can't be had
    "corda": "its base was corrected by calibration data that the file doesn't hold",
    "lora_ga": "its base was corrected by gradients that the file doesn't hold",
    "loftq": "it was trained on a base quantised on the fly, whose bytes the file doesn't hold",
}
_RANDOM = "its base was corrected by a random decomposition that the file doesn't hold"
_CONVERT = (
    "convert it where it was trained: `model.save_pretrained(out,"
    " path_initial_model_for_weight_conversion=...)`"
)


def check_config(data: dict[str, Any], file: Path) -> None:
    """Every value has a type that PEFT gives it, whatever it switches on.

    Raises:
        ValueError: naming those that don't.
    """
    check_types(data, {**TYPES, **_PAIR_TYPES, **dict.fromkeys(_flags(), (bool,))}, file)
    check_items(data, {**ITEMS, "rank_pattern": int, "alpha_pattern": float}, file)
    ranks = [data.get("r"), *(data.get("rank_pattern") or {}).values()]
    if bad := [r for r in ranks if r is not None and not 1 <= r <= MOST_R]:
        raise ValueError(
            f"{file}: the rank {shorten(bad[0])} in `r` or `rank_pattern` is a whole number of at"
            " least 1, and of at most a layer's size. Correct the file, or copy it again from where"
            " it came"
        )
    alphas = [data.get("lora_alpha"), *(data.get("alpha_pattern") or {}).values()]
    if bad := [a for a in alphas if a is not None and not -MOST <= a <= MOST]:
        raise ValueError(
            f"{file}: the number {shorten(bad[0])} in `lora_alpha` or `alpha_pattern` is none that"
            " float32 holds. Correct the file, or copy it again from where it came"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in data.get(key) or {}:
            if (why := flaw(pattern)) is not None:
                raise ValueError(
                    f"{file}: `{key}` has {shorten(pattern)}, which is no regular expression ({why})."
                    " Correct the file, or copy it again from where it came"
                )


def read_config(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """A checked `adapter_config.json`, defaults filled in.

    Raises:
        ValueError: another method's file; a value of the wrong type; a switch that changes what is
            computed and isn't implemented here.
    """
    if (forms := _forms()).get(str(data.get("peft_type"))) is not None:
        return _read_own_config(data, forms[data["peft_type"]], file)
    check_config(data, file)
    if data.get("peft_type") != LORA:
        synonyms = {c.peft_synonym for c in _deltas() if issubclass(c, ReadsAsLora)}
        others = "".join(f" and {name}" for name in sorted({*forms, *synonyms}))
        raise ValueError(
            f"{file}: `peft_type` is {shorten(data.get('peft_type'))}; read are LORA files (LoRA,"
            f" DoRA, rsLoRA, OLoRA, PiSSA, ...){others}. Merge the adapter with PEFT, or train it"
            " again here"
        )
    _complete(data, {"r", "lora_alpha", "target_modules"}, file)
    _known(data, {*TYPES, *_PAIR_TYPES, *_IGNORED, *_PAIR_IGNORED, *_flags()}, file)
    start = data.get("init_lora_weights")
    data = {**data, "init_lora_weights": True if start is None else start}
    _anchor(data, file)
    return data


def _read_own_config(data: dict[str, Any], form: PeftForm, file: Path) -> dict[str, Any]:
    """The same for a type that a delta declares as PEFT's own."""
    check_config(data, file)
    check_types(data, {form.dropout: (int, float)}, file)
    _complete(data, {"r", "target_modules"}, file)
    _known(data, {*TYPES, *_IGNORED, *form.fields, form.dropout}, file)
    if own_choice(data) is None:
        given = ", ".join(f"`{k}={shorten(data.get(k))}`" for k in form.fields)
        raise ValueError(
            f"{file}: a {form.peft_type} adapter with {given} is not known here. Merge the adapter"
            " with PEFT, or train it again here"
        )
    return data


def _deltas() -> list[type[DeltaChoice]]:
    return [find(n, "deltas") for n in names("deltas")]  # type: ignore[misc]


def as_plain(
    data: dict[str, Any], tensors: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A file of a type that a delta knows for LORA in other clothes, as LORA; others as they are.

    Raises:
        ValueError: a value or a tensor that is not of that type.
    """
    for choice in _deltas():
        if issubclass(choice, ReadsAsLora) and data.get("peft_type") == choice.peft_synonym:
            try:
                return choice.as_plain(data, tensors)
            except ValueError as error:
                raise ValueError(
                    f"{file}: not what a file with `peft_type` {choice.peft_synonym!r} holds:"
                    f" {error}. Save the adapter again with PEFT, or merge it there"
                ) from None
    return data, tensors


def _forms() -> dict[str, PeftForm]:
    """{type of PEFT's own: the form of one of the deltas that it stands for}."""
    forms = [c().peft_form() for c in _deltas()]
    return {form.peft_type: form for form in forms if form is not None}


def own_choice(data: Mapping[str, Any]) -> DeltaChoice | None:
    """The delta that computes what PEFT does under this configuration, where that is not LORA."""
    found = (c.from_peft(data) for c in _deltas())
    return next((choice for choice in found if choice is not None), None)


def _complete(data: Mapping[str, Any], wanted: set[str], file: Path) -> None:
    if missing := sorted(wanted - {k for k, v in data.items() if v}):
        raise ValueError(f"{file}: {missing} must be given; PEFT writes them always")


def _known(data: Mapping[str, Any], known: set[str], file: Path) -> None:
    """Nothing else is switched on."""
    strange = {
        key: value
        for key, value in data.items()
        if key not in known and value and value != _DEFAULTS.get(key)
    }
    if strange:
        some = ", ".join(
            f"`{shorten(k)[1:-1]}={shorten(v)}`" for k, v in sorted(strange.items())[:8]
        )
        raise ValueError(
            f"{file}: {some} changes what"
            " the adapter computes and is not implemented here. Merge the adapter with PEFT, or"
            " train it without"
        )


def _flags() -> set[str]:
    combines: list[Any] = [find(n, "combine") for n in names("combine")]
    return {flag for c in combines for flag in c.peft_flags or {}}


def _anchor(data: Mapping[str, Any], file: Path) -> str | None:
    """The word of the init whose start PEFT takes out of the base as it loads this file."""
    start = data["init_lora_weights"]
    if start in _STARTS:
        return None
    inits: dict[str, Any] = {n: find(n, "inits") for n in names("inits")}
    why = _LOST.get(str(start))
    for word, cls in inits.items():
        anchor = cls.peft_frozen_start
        if anchor is not None and anchor == str(start).lower():
            return word
        if anchor is not None and str(start).startswith(
            f"{anchor}_"
        ):  # with a number of iterations
            why = _RANDOM
    why = why or "this start is unknown, and so is what it did to the base"
    raise ValueError(
        f"{file}: an adapter with `init_lora_weights={shorten(start)}` can't be read: {why};"
        f" {_CONVERT}"
    )


def recipe_for(model: nn.Module, data: Mapping[str, Any], file: Path) -> tuple[Recipe, bool]:
    """The recipe that computes what PEFT computes with this configuration, and whether its start is
    anchored.

    Raises:
        ValueError: no module of the model is meant.
    """
    modules = dict(model.named_modules())
    modules.pop("", None)
    patterns = data.get("modules_to_save") or []
    saved = [n for n in modules if any(n.endswith(p) for p in patterns)]
    saved = [n for n in saved if not any(n != o and n.startswith(o + ".") for o in saved)]
    layers = _targets(model, modules, data, file)
    if (choice := own_choice(data)) is not None:
        method, fields, anchored = choice.text(), _own_fields(choice, data), False
    else:
        method, fields, anchored = _pair_method(data, modules, layers, file)
    try:
        recipe = Recipe.parse(
            method,
            r=data["r"],
            target_modules=shortest(layers, modules),
            modules_to_save=_exact(saved, modules),
            **fields,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return recipe, anchored


def _own_fields(choice: DeltaChoice, data: Mapping[str, Any]) -> dict[str, Any]:
    form: Any = choice.peft_form()
    bias = data.get("bias") or "none"
    return {
        "lora_dropout": data.get(form.dropout) or 0.0,
        "bias": "lora_only" if bias == form.bias else bias,
    }


def _pair_method(
    data: Mapping[str, Any], modules: Mapping[str, nn.Module], layers: Sequence[str], file: Path
) -> tuple[str, dict[str, Any], bool]:
    """A LORA file's method, its own fields of a recipe, and whether its start is anchored."""
    anchor = _anchor(data, file)
    wanted = {k: data[k] for k in _flags() if data.get(k)}
    method = [
        _method("scales", lambda c: c.peft_rslora is bool(data.get("use_rslora"))),
        _method("combine", lambda c: c.peft_flags is not None and dict(c.peft_flags) == wanted),
        anchor or str(AXES["inits"][1]),
    ]
    transposed = [n for n in layers if (b := base_for(modules[n])) and b.transposed]
    if anchor is not None and any(not _lookup(modules[n]) for n in transposed):
        raise ValueError(
            f"{file}: `init_lora_weights={data['init_lora_weights']!r}` on the transposed layer"
            f" {transposed[0]!r}: PEFT's correction of such a base can't be relied on; {_CONVERT}"
        )
    fields = {
        "lora_alpha": data["lora_alpha"],
        "lora_dropout": data.get("lora_dropout") or 0.0,
        "lora_dropout_on": "delta" if anchor else "update",  # PEFT's base has no dropout
        "bias": data.get("bias") or "none",
        "rank_pattern": _used(data.get("rank_pattern") or {}, layers),
        "alpha_pattern": _used(data.get("alpha_pattern") or {}, layers),
    }
    return "+".join(method), fields, anchor is not None


def _method(axis: str, fits: Any) -> str:
    found = [n for n in names(axis) if fits(find(n, axis))]
    usual = AXES[axis].default
    return str(usual) if usual in found else found[0]


def _lookup(module: nn.Module) -> bool:
    base = base_for(module)
    return base is not None and base.lookup


def _exact(wanted: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    names = shortest(wanted, modules)
    return tuple(wanted) if isinstance(names, str) else names


def _used(patterns: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Patterns that match something: PEFT overlooks the others, a recipe does not."""
    return {p: v for p, v in patterns.items() if any(first_match({p: 0}, n) for n in layers)}


def _targets(
    model: nn.Module, modules: Mapping[str, nn.Module], data: Mapping[str, Any], file: Path
) -> list[str]:
    """The modules PEFT would adapt, by its own rules."""
    spec = data["target_modules"]
    check_patterns(patterns_of(data), modules, file)
    try:
        if isinstance(spec, str) and spec.lower() == "all-linear":
            found = _all_linear(model, modules, data.get("task_type"))
        elif isinstance(spec, str):
            found = [n for n in modules if re.fullmatch(spec, n)]
        else:
            found = [n for n in modules if any(matches(str(p), n) for p in spec)]
            found = [n for n in found if _in_layers(n, data)]
        excluded = data.get("exclude_modules")
        if isinstance(excluded, str):
            found = [n for n in found if not re.fullmatch(excluded, n)]
        elif excluded:
            found = [n for n in found if not any(matches(str(p), n) for p in excluded)]
        found = [
            n for n in found if not any(shadows(p, [n]) for p in data.get("modules_to_save") or [])
        ]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file}: {shorten(spec)}, or another of its patterns, is no regular expression"
            f" ({error}). Correct the file, or copy it again from where it came"
        ) from None
    if not found:
        endings = sorted({n.rsplit(".", 1)[-1] for n in modules} - {str(i) for i in range(1000)})
        raise ValueError(
            f"{file}: `target_modules={shorten(spec)}` means no module of this {type(model).__name__},"
            f" whose modules end in {', '.join(endings)}. The adapter is for"
            f" {shorten(data.get('base_model_name_or_path'))}; load that model"
        )
    return found


def patterns_of(data: Mapping[str, Any]) -> list[str]:
    """What a configuration, PEFT's or a recipe, gives to the matcher of regular expressions."""
    found = [data.get(key) for key in ("target_modules", "exclude_modules")]
    found = [spec for spec in found if isinstance(spec, str)]
    for key in ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern"):
        held = data.get(key) or ()
        found += [held] if isinstance(held, str) else list(held)
    return found


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], task: Any) -> list[str]:
    """Every linear layer but the output embeddings, or but the first head of a classifier."""
    found = [n for n, m in modules.items() if base_for(m) is not None and not _lookup(m)]
    if not isinstance(model, PreTrainedModel):
        return found
    head = model.get_output_embeddings()
    if head is None and task == "SEQ_CLS":
        head = next((modules[h] for h in ("score", "classifier") if h in modules), None)
    return [n for n in found if modules[n] is not head]


def _in_layers(name: str, data: Mapping[str, Any]) -> bool:
    """PEFT's `layers_to_transform`: the first number in a path, or the one after a container's
    name."""
    wanted = data.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    containers = data.get("layers_pattern") or []
    containers = [containers] if isinstance(containers, str) else containers
    match = None if containers else re.match(r".*?\.[^.]*\.(?P<i>\d+)\.", name)
    for container in containers:
        match = match or re.match(rf"(?:^|.*?\.){container}\.(?P<i>\d+)\.", name)
    return match is not None and int(match["i"]) in (
        [wanted] if isinstance(wanted, int) else wanted
    )


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
            continue  # what the trained copy stands in for
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


def write_config(data: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(data, indent=2, sort_keys=True)
    (folder / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
