"""Adapters as folders: written atomically, read strictly, exact to the bit.

A folder holds one of three forms, and `lorica.json` beside it: recipe, hash of the base, versions,
hash of every file.

* `peft`: `adapter_config.json` + `adapter_model.safetensors`, where PEFT computes the same from
  them. What can't be cut out of PEFT's tensors bit for bit lies in `lorica.safetensors`.
* `lorica`: `lorica.safetensors`, where it can't.
* `model`: an ordinary transformers model, where the base itself trains.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lorica
from lorica.formats import peft
from lorica.formats.atomic_folder import check_free, first, together, writing
from lorica.formats.safe_files import (
    OWN_CONFIG,
    OWN_TENSORS,
    PEFT_CONFIG,
    PEFT_TENSORS,
    check_items,
    check_patterns,
    check_types,
    locate,
    read_json,
    read_tensors,
    sha256,
    tensor_file,
)
from lorica.model.adapters import Adapters
from lorica.model.attach import attach, detach
from lorica.model.state import buffers
from lorica.recipe.recipe import Recipe
from lorica.tensors.dtensor_ops import copy_, read_full
from lorica.text import cut, shorten

READER = 1  # raised when an older reader would misread what is written

_TYPES: dict[str, tuple[type, ...]] = {
    "reader": (int,), "lorica": (str,), "form": (str,), "recipe": (dict,), "dtype": (str,),
    "base": (dict,), "fresh": (list,), "layers": (dict,), "saved": (list,), "direct": (list,),
    "files": (dict,), "versions": (dict,),
}  # fmt: skip
_RECIPE_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,), "r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float),
    "lora_dropout_on": (str,), "target_modules": (str, list), "exclude_modules": (str, list),
    "layers_to_transform": (list,), "modules_to_save": (list,), "bias": (str,),
    "train_rest": (bool,), "rank_pattern": (dict,), "alpha_pattern": (dict,), "seed": (int,),
}  # fmt: skip
_BASE_TYPES: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("class", "name", "sha256", "dtype"), (str,)
)
_LAYER_TYPES: dict[str, tuple[type, ...]] = {
    "in": (int,), "out": (int,), "r": (int,), "frozen_rank": (int,), "scale": (int, float),
}  # fmt: skip


# -- save ------------------------------------------------------------------------------------------


def save(adapters: Adapters | nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapters (not the base) as a folder that `lorica.load` reads back bit for bit.

    It is a PEFT adapter wherever PEFT computes the same from it, whatever the method was; else
    Lorica's own form; and a whole transformers model where the method trains the base itself. The
    folder is complete or absent, even if the process dies. With several processes all have to call;
    the first one writes.

    Args:
        adapters: the handle, or the adapted model.
        path: the folder; may not exist yet.
        overwrite: replace an adapter that is there. Other files beside it stay; a folder without an
            adapter is never overwritten.

    Raises:
        ValueError: the folder is taken; a factor is not a matrix (a sharded model that was not
            gathered); a trained tensor has a value that is not finite.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapters = lorica.attach(model, "olora", r=2, verbose=False)
        >>> out = lorica.save(adapters, tempfile.mkdtemp() + "/out")
        >>> sorted(file.name for file in out.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'lorica.json']
    """
    adapters = adapters if isinstance(adapters, Adapters) else Adapters.of(adapters)
    path = Path(path)
    if first():
        check_free(path, overwrite=overwrite)
    state = full_state(adapters)
    check_values(adapters, state)
    in_place = bool(adapters.direct) and not adapters.layers
    whole = in_place and isinstance(adapters.model, PreTrainedModel)
    obstacle = None if whole else peft.obstacle(adapters)
    form = "model" if whole else "lorica" if obstacle else "peft"
    own, tensors, config = state, {}, {}
    if form == "peft":
        tensors, config = peft.file_tensors(adapters, state), peft.config(adapters)
        cuts = peft.places(adapters, peft.carried_ranks(adapters))
        own = {name: value for name, value in state.items() if name not in cuts}
    base_hash = adapters.hash_base() if adapters.base_unchanged else adapters.base_hash
    if first():
        with writing(path, overwrite=overwrite) as folder:
            if form == "model":
                assert isinstance(adapters.model, PreTrainedModel)
                adapters.model.save_pretrained(folder)
            else:
                if form == "peft":
                    write_tensors(tensors, folder / PEFT_TENSORS, {"format": "pt"})
                    peft.write_config(config, folder)
                if own or form == "lorica":
                    write_tensors(own, folder / OWN_TENSORS, {"format": "pt"})
            info = _describe(adapters, form, obstacle, base_hash)
            info["files"] = {f.name: sha256(f) for f in sorted(folder.iterdir())}
            text = json.dumps(info, indent=2, ensure_ascii=False)
            (folder / OWN_CONFIG).write_text(text + "\n", encoding="utf-8")
    together()
    return path


def full_state(adapters: Adapters) -> dict[str, Tensor]:
    """`adapters.state_dict()` and the buffers of the modules that train in full, and what such a
    module shares within itself under every name."""
    shared = {
        f"{site}.copy.{n}": p
        for site, module in adapters.saved.items()
        if module.only is None
        for n, p in module.copy.named_parameters(remove_duplicate=False)
    }
    shared = {n: read_full(p).detach() for n, p in shared.items()}
    return {**shared, **buffers(adapters), **adapters.state_dict()}


def check_values(adapters: Adapters, state: Mapping[str, Tensor]) -> None:
    """Whether this is worth writing.

    Raises:
        ValueError: see `save`.
    """
    empty = {name: str(tuple(value.shape)) for name, value in state.items() if not value.numel()}
    for name, layer in adapters:
        if (pair := layer.update.delta.pair()) is not None:
            ends = (pair.A.shape[1:], pair.B.shape[:1], pair.B.ndim)
            if ends != ((layer.in_features,), (layer.out_features,), 2):
                empty[name] = f"{tuple(pair.A.shape)}, {tuple(pair.B.shape)}"
    if empty:
        name, shape = next(iter(empty.items()))
        raise ValueError(
            f"{name} is {shape}: an adapter's tensor is neither empty nor flat, so the shards of a"
            " sharded model were not gathered. Gather them before saving"
        )
    trained = [t.name for t in adapters.trained()]
    bad = [n for n in trained if n in state and not torch.isfinite(state[n]).all()]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(trained)} trained tensors hold values that are not finite, first"
            f" {bad[0]}: training has diverged. Go back to an earlier checkpoint and lower the"
            " learning rate"
        )


def write_tensors(tensors: Mapping[str, Tensor], path: Path, meta: dict[str, str]) -> None:
    from safetensors.torch import save_file

    cpu = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
    }
    save_file(cpu, path, metadata=meta)


def _describe(
    adapters: Adapters, form: str, obstacle: str | None, base_hash: str | None
) -> dict[str, Any]:
    model = adapters.model
    carried = peft.carried_ranks(adapters)
    base = {
        "class": type(model).__name__,
        "name": model.config.name_or_path if isinstance(model, PreTrainedModel) else None,
        "sha256": base_hash,
        "dtype": _dtypes(adapters),
    }
    return {
        "lorica": lorica.__version__,
        "reader": READER,
        "form": form,
        "why_not_peft": obstacle,
        "method": adapters.recipe.text(),
        "recipe": adapters.recipe.to_dict(),
        "dtype": str(adapters.dtype).removeprefix("torch."),
        "base": base,
        "fresh": list(adapters.summary.fresh),
        "layers": {
            name: {
                "in": layer.in_features,
                "out": layer.out_features,
                "r": layer.site.r,
                "scale": layer.site.scale,
                "frozen_rank": carried[name],
            }
            for name, layer in adapters
        },
        "saved": list(adapters.saved),
        "direct": list(adapters.direct),
        "versions": {
            "python": platform.python_version(),
            **{p: metadata.version(p) for p in ("torch", "transformers", "safetensors")},
        },
    }


def _dtypes(adapters: Adapters) -> str:
    """The base's dtype, or several."""
    found = {str(p.dtype) for p in adapters.base_parameters().values() if p.is_floating_point()}
    return ", ".join(sorted(d.removeprefix("torch.") for d in found))


# -- read ------------------------------------------------------------------------------------------


def read_own(folder: Path) -> dict[str, Any]:
    """A checked `lorica.json`; the files it speaks of are whole.

    Raises:
        ValueError: a newer format, a value of the wrong type, a file that is missing or was
            changed.
    """
    info = read_info(folder)
    check_files(folder, info)
    return info


def read_info(folder: Path) -> dict[str, Any]:
    """A checked `lorica.json`, whatever became of the files it speaks of.

    Raises:
        ValueError: a newer format, a value of the wrong type.
    """
    file = folder / OWN_CONFIG
    info = read_json(file)
    reader = info.get("reader")
    if isinstance(reader, int) and reader > READER:
        raise ValueError(
            f"{file} was written by Lorica {info.get('lorica')} and needs a reader of format"
            f" {reader}; this is Lorica {lorica.__version__}, which reads up to {READER}. Upgrade:"
            " `pip install -U lorica`"
        )
    check_types(info, _TYPES, file)
    if missing := sorted(k for k in _TYPES if info.get(k) is None):
        raise ValueError(
            f"{file}: {missing} must be given; the file was cut. Copy the folder again"
        )
    check_types(info["recipe"], _RECIPE_TYPES, file)
    check_types(info["base"], _BASE_TYPES, file)
    check_items(info, {"fresh": str, "saved": str, "direct": str, "files": str}, file)
    check_items(info, {"layers": dict, "versions": str}, file)
    check_items(info["recipe"], {"rank_pattern": int, "alpha_pattern": float}, file)
    names = dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), str)
    check_items(info["recipe"], {**names, "layers_to_transform": int}, file)
    for name, layer in info["layers"].items():
        check_types(layer, _LAYER_TYPES, file)
        if bad := sorted(
            k for k in _LAYER_TYPES if layer.get(k) is None or not 0 <= layer[k] < 2**31
        ):
            raise ValueError(
                f"{file}: {bad} of the layer {shorten(name)} must be given, as numbers of at least 0;"
                " the file was changed. Copy the folder again"
            )
    return info


def check_files(folder: Path, info: Mapping[str, Any]) -> None:
    """Whether the files that a checked `lorica.json` speaks of are whole.

    Raises:
        ValueError: one is missing or was changed.
    """
    for name, digest in info["files"].items():
        if os.path.basename(name) != name or not (folder / name).is_file():
            raise ValueError(
                f"{folder} lacks {shorten(name)}, which belongs to the adapter. Copy the whole folder"
            )
        if sha256(folder / name) != digest:
            remedy = (
                f" If another program wrote it and you trust it, delete {OWN_CONFIG} to read the"
                " folder as an ordinary PEFT adapter"
                if info["form"] == "peft"
                else ""
            )
            raise ValueError(
                f"{folder / name} is not the file that {OWN_CONFIG} describes: truncated, or"
                f" changed since it was saved. Copy the folder again from where it came.{remedy}"
            )


def read_recipe(info: Mapping[str, Any], folder: Path) -> Recipe:
    try:
        return Recipe.from_dict(info["recipe"])
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error) if len(str(error)) < 1000 else f"{str(error)[:1000]}..."
        raise ValueError(f"{folder / OWN_CONFIG}: `recipe`: {reason}") from None


def load(
    model: nn.Module,
    path: str | Path,
    *,
    check_base: bool = True,
    trainable: bool = True,
    verbose: bool = False,
) -> Adapters:
    """Attach a saved adapter to its base: one of Lorica's, or one that PEFT wrote.

    Of PEFT's, LoRA with its switches and starts is read (rsLoRA, DoRA, OLoRA, PiSSA, patterns,
    embeddings, biases, modules trained in full). A start that PEFT would take out of the base as it
    loads is computed from the base and carried beside it, so the base keeps its bytes. On an error
    the model is as it was.

    Args:
        model: the plain base, loaded, not sharded.
        path: a folder, or a hub id `owner/name`.
        check_base: refuse a base whose weights are not those the adapter was trained on (PEFT's
            files don't say).
        trainable: False leaves every parameter frozen.
        verbose: log the contract, as `attach` does.

    Raises:
        ValueError: what can't be read, and why; another base; tensors that are missing, left over
            or of another shape, all of them named.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> before = lorica.attach(model, "dora", r=2, verbose=False).fingerprint()
        >>> out = lorica.save(model, tempfile.mkdtemp() + "/out")
        >>> lorica.load(lorica.detach(model), out).fingerprint() == before
        True
    """
    folder = locate(path)
    if (folder / OWN_CONFIG).exists():
        adapters = _load_own(model, folder, check_base=check_base, verbose=verbose)
    else:
        adapters = _load_peft(model, folder, verbose=verbose)
    if not trainable:
        for t in adapters.trained():
            t.parameter.requires_grad_(False)
    return adapters


def _load_own(model: nn.Module, folder: Path, *, check_base: bool, verbose: bool) -> Adapters:
    info = read_own(folder)
    if info["form"] == "model":
        raise ValueError(
            f"{folder} is a whole model ({info['base'].get('class')}), trained by"
            f" `{info.get('method')}`, and no adapter; load it with"
            f" `{info['base'].get('class')}.from_pretrained({str(folder)!r})`"
        )
    recipe = read_recipe(info, folder)
    tensors = _read_files(folder, info)
    names = [name for name, _ in model.named_modules()]
    check_patterns(peft.patterns_of(info["recipe"]), names, folder / OWN_CONFIG)
    _check_ranks(recipe, model, tensors, folder / OWN_CONFIG)
    try:
        adapters = attach(
            model,
            recipe,
            fresh=info["fresh"],
            dtype=_dtype(info, folder),
            keep_base=True,  # so that an error below leaves the model as it was
            verbose=verbose,
            initialise=False,
        )
    except ValueError as error:
        raise ValueError(
            f"{folder} does not fit this {type(model).__name__} (it was saved from"
            f" {shorten(str(info['base'].get('class')))} {shorten(str(info['base'].get('name')))}):"
            f" {cut(str(error))}"
        ) from None
    try:
        state = _own_state(adapters, info, tensors, folder)
        if check_base:
            _check_base(adapters, info, folder)
        _write(adapters, state)
    except BaseException:
        detach(model)
        raise
    adapters.originals = None
    return adapters


def _load_peft(model: nn.Module, folder: Path, *, verbose: bool) -> Adapters:
    file = folder / PEFT_CONFIG
    tensors = read_tensors(tensor_file(folder))
    data, tensors = peft.as_plain(read_json(file), tensors, file)
    data = peft.read_config(data, file)
    recipe, anchored = peft.recipe_for(model, data, file)
    _check_ranks(recipe, model, tensors, file)
    try:
        # An anchored start is computed and carried; the factors it leaves are overwritten.
        adapters = attach(model, recipe, fresh=[], verbose=verbose, initialise=anchored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        for _, layer in adapters:
            if layer.store.lookup:  # PEFT starts embeddings at zero, whatever the start is
                layer.update.clear_frozen_()
        cuts = peft.places(adapters, dict.fromkeys(adapters.layers, 0))
        live = {n: t for n, t in adapters.state_dict().items() if n not in cuts}
        left = peft.spare(adapters, tensors, {place.key for place in cuts.values()})
        state = _cut(adapters, cuts, tensors, tensor_file(folder), left)
        _write(adapters, {**live, **state})
    except BaseException:
        detach(model)
        raise
    return adapters


def _check_ranks(
    recipe: Recipe, model: nn.Module, tensors: Mapping[str, Tensor], file: Path
) -> None:
    """Before anything of that size is made: a rank is no larger than all that the file and the
    model have.

    Raises:
        ValueError: one is.
    """
    shapes = [t.shape for t in (*tensors.values(), *model.parameters())]
    most = max((size for shape in shapes for size in shape), default=0)
    rank = max([recipe.r or 0, *recipe.rank_pattern.values()])
    if rank > most:
        raise ValueError(
            f"{file}: the rank {rank} is larger than every dimension of the file's tensors and of"
            f" this {type(model).__name__}, {most} at most; the file was changed. Copy the folder"
            " again from where it came"
        )


def restore(adapters: Adapters, path: str | Path, *, check_base: bool = True) -> None:
    """Read a saved state into adapters that are attached already, to go on training.

    Args:
        adapters: attached with the very recipe that was saved.
        path: a folder that `save` wrote.
        check_base: see `load`.

    Raises:
        ValueError: another recipe (the differences are named), another base, or tensors that don't
            fit; nothing is changed then.
    """
    folder = locate(path)
    if not (folder / OWN_CONFIG).exists():
        raise ValueError(
            f"{folder} was written by PEFT and holds no training state; start from it with"
            " `lorica.load(model, path)`"
        )
    info = read_own(folder)
    theirs, ours = info["recipe"], adapters.recipe.to_dict()
    if theirs != ours and (saved := read_recipe(info, folder)) != adapters.recipe:
        theirs = saved.to_dict()
        differ = [f"`{k}` {theirs[k]!r} (here {ours[k]!r})" for k in theirs if theirs[k] != ours[k]]
        raise ValueError(
            f"{folder} was saved with another recipe: {', '.join(differ)}. Resume with the saved"
            " recipe, or start anew in another folder"
        )
    if check_base:
        _check_base(adapters, info, folder)
    if info["form"] == "model":
        _restore_model(adapters, folder)
    else:
        _write(adapters, _own_state(adapters, info, _read_files(folder, info), folder))


def _restore_model(adapters: Adapters, folder: Path) -> None:
    """Through `from_pretrained`, since what transformers writes may be named otherwise than what it
    holds."""
    model = adapters.model
    assert isinstance(model, PreTrainedModel)
    stored = type(model).from_pretrained(folder, dtype=adapters.dtype)
    adapters.load_state_dict({n: stored.get_parameter(n).detach() for n in adapters.direct})


def _dtype(info: Mapping[str, Any], folder: Path) -> torch.dtype:
    known = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64,
             torch.bfloat16, torch.float16)}  # fmt: skip
    if info["dtype"] not in known:
        raise ValueError(
            f"{folder / OWN_CONFIG}: `dtype` is {info['dtype']!r}; allowed: {', '.join(known)}"
        )
    return known[info["dtype"]]


def _check_base(adapters: Adapters, info: Mapping[str, Any], folder: Path) -> None:
    saved = info["base"].get("sha256")
    live = adapters.hash_base() if adapters.base_unchanged else adapters.base_hash
    if saved is None or live is None or saved == live:
        return
    here, there = _dtypes(adapters), info["base"].get("dtype")
    hint = (
        f" It was held in {there} there and is in {here} here, which rounds it: load it in {there}."
        if here != there
        else ""
    )
    raise ValueError(
        f"{folder} was trained on another base: {info['base'].get('name') or 'the one saved'} has"
        f" the hash {saved[:12]}, this model {live[:12]}.{hint} Load the right base, or, knowing"
        " that the numbers will differ, pass `check_base=False` (`--ignore-base-hash`)"
    )


def _read_files(folder: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in (PEFT_TENSORS, OWN_TENSORS):
        if name in info["files"]:
            out |= read_tensors(folder / name)
    return out


def _own_state(
    adapters: Adapters, info: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The state as `full_state` had it, checked against the attached adapters."""
    file = folder / (PEFT_TENSORS if info["form"] == "peft" else OWN_TENSORS)
    cuts = {}
    carried = {n: int(info["layers"].get(n, {}).get("frozen_rank", 0)) for n in adapters.layers}
    if info["form"] == "peft":
        cuts = peft.places(adapters, carried)
    names = set(full_state(adapters)) - {
        f"{n}.update.frozen_{side}" for n in adapters.layers for side in "AB"
    }
    names |= {f"{n}.update.frozen_{s}" for n, k in carried.items() if k for s in "AB"}
    cuts |= {n: peft.Place(n) for n in names if n not in cuts}
    # Factors that are computed lie in PEFT's file too; the parameters are in our own.
    used = {place.key for place in cuts.values()}
    left = [f"{k} belongs to nothing in this model" for k in sorted(set(tensors) - used)]
    if OWN_TENSORS in info["files"] and info["form"] == "peft":
        left = [f for f in left if not f.startswith(peft.PREFIX)]
    return _cut(adapters, cuts, tensors, file, left)


def _cut(
    adapters: Adapters,
    cuts: Mapping[str, peft.Place],
    tensors: Mapping[str, Tensor],
    file: Path,
    problems: list[str],
) -> dict[str, Tensor]:
    """The live state out of a file's tensors.

    Raises:
        ValueError: listing `problems` and every tensor that is missing or of another shape.
    """
    live = full_state(adapters)
    problems = list(problems)
    lengths: dict[str, int] = {}
    for place in cuts.values():
        lengths[place.key] = max(lengths.get(place.key, 0), place.start + place.length)
    state = {}
    for name, place in cuts.items():
        found = tensors.get(place.key)
        if found is None:
            problems.append(f"{place.key} is missing")
            continue
        if place.axis is not None and (
            found.ndim != 2 or found.shape[place.axis] != lengths[place.key]
        ):
            problems.append(
                f"{place.key} is {tuple(found.shape)}, of rank {lengths[place.key]} expected"
            )
            continue
        part = place.cut(tensors)
        if name in live and part.shape != live[name].shape and ".update.frozen_" not in name:
            problems.append(
                f"{place.key} is {tuple(found.shape)} instead of {tuple(live[name].shape)}"
            )
            continue
        if (wrong := _carried_shape(adapters, name, part)) is not None:
            problems.append(f"{place.key} is {tuple(found.shape)}, {wrong} expected")
            continue
        if name in live and part.is_floating_point() != live[name].is_floating_point():
            problems.append(f"{place.key} is of {part.dtype}, of {live[name].dtype} expected")
            continue
        state[name] = part
    if problems:
        problems = list(dict.fromkeys(problems))
        more = f" (and {len(problems) - 12} more)" if len(problems) > 12 else ""
        raise ValueError(
            f"{file} does not fit this {type(adapters.model).__name__} under"
            f" `{adapters.recipe.text()}`: {'; '.join(problems[:12])}{more}. Load the base that the"
            " adapter was trained on, and the whole file"
        )
    return state


def _carried_shape(adapters: Adapters, name: str, part: Tensor) -> str | None:
    """What a tensor of carried factors should be, where it isn't: (k, in) or (out, k)."""
    site, carried, side = name.rpartition(".update.frozen_")
    if not carried:
        return None
    axis, size = {
        "A": (1, adapters.layers[site].in_features),
        "B": (0, adapters.layers[site].out_features),
    }[side]
    fits = part.ndim == 2 and part.shape[axis] == size
    return None if fits else f"two dimensions, one of {size}"


def _write(adapters: Adapters, state: Mapping[str, Tensor]) -> None:
    held = buffers(adapters)
    own = set(adapters.state_dict())
    extra = {n for n in state if n not in own and ".update.frozen_" not in n}
    adapters.load_state_dict({n: t for n, t in state.items() if n not in extra})
    for name in extra & set(held):
        copy_(held[name], state[name])
