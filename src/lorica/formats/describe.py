"""What an adapter folder holds, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.formats import native, peft
from lorica.formats.safe_files import (
    OWN_CONFIG,
    PEFT_CONFIG,
    PEFT_TENSORS,
    check_items,
    check_patterns,
    check_types,
    locate,
    read_json,
    read_tensors,
    tensor_file,
)
from lorica.interfaces import Factors
from lorica.methods.ranks.base import first_match

_SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_embedding_A": "A", ".lora_embedding_B": "B",
}  # fmt: skip


def inspect(path: str | Path) -> dict[str, Any]:
    """Everything a folder says about its adapter; JSON-ready.

    Keys: `path`, `type` ("peft", "lorica" or "model"), `method`, `r`, `lora_alpha`, `targets`,
    `layers` ({module path: shape (out, in), r (with what is carried), scale, norm}), `parameters`,
    `bytes`, `dtypes`, `saved` (modules trained in full), `base`, `versions`, `task_type`,
    `problems`. `norm` is the Frobenius norm of ΔW, computed from the factors; None where the folder
    holds none. A file of another of PEFT's types than LORA does not tell its layers' shapes: they
    are Lorica's, where it wrote the folder, else left out.

    Raises:
        ValueError: not an adapter folder, or a file that can't be read at all. What merely looks
            wrong (a value that is not finite, a hash that differs) is listed in `problems`.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapters = lorica.attach(model, "olora", r=2, verbose=False)
        >>> out = lorica.save(adapters, tempfile.mkdtemp() + "/out")
        >>> layer = inspect(out)["layers"]["0"]
        >>> layer["shape"], layer["r"], round(layer["norm"], 3)
        ([4, 8], 4, 0.0)
    """
    folder = locate(path)
    out: dict[str, Any] = {"path": str(folder), "problems": []}
    info: dict[str, Any] = {}
    if (folder / OWN_CONFIG).exists():
        info = native.read_info(folder)
        try:
            native.check_files(folder, info)
        except ValueError as error:
            out["problems"].append(str(error))
    form = info.get("form", "peft")
    data = read_json(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).exists() else {}
    check_types(data, peft.TYPES, folder / PEFT_CONFIG)
    check_items(data, peft.ITEMS, folder / PEFT_CONFIG)
    recipe = info.get("recipe", {})
    out |= {
        "type": form,
        "method": info.get("method") or _method(data),
        "r": recipe.get("r", data.get("r")),
        "lora_alpha": recipe.get("lora_alpha", data.get("lora_alpha")),
        "targets": recipe.get("target_modules", data.get("target_modules")),
        "task_type": data.get("task_type"),
        "why_not_peft": info.get("why_not_peft"),
        "base": info.get("base") or {"name": data.get("base_model_name_or_path")},
        "versions": _versions(info, data),
    }
    files = [tensor_file(folder)] if form == "peft" else []
    files += [f for f in sorted(folder.glob("*.safetensors")) if f.name != PEFT_TENSORS]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    plain, shown = peft.as_plain(data, tensors, folder / PEFT_CONFIG)
    told = form == "peft" and plain.get("peft_type") == peft.LORA
    if told:
        peft.check_config(plain, folder / PEFT_CONFIG)
        check_patterns(peft.patterns_of(plain), shown, folder / PEFT_CONFIG)
    layers = _layers(shown, plain, out["problems"]) if told else _own_layers(info)
    out["layers"] = layers
    out["saved"] = info.get("saved") or list(data.get("modules_to_save") or [])
    out["parameters"] = sum(t.numel() for t in tensors.values())
    out["bytes"] = sum(f.stat().st_size for f in files)
    out["dtypes"] = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        out["problems"].append(f"values that are not finite in {', '.join(bad[:4])}")
    return out


def _method(data: Mapping[str, Any]) -> str:
    """PEFT's own words for what a file of its is."""
    if (choice := peft.own_choice(data)) is not None:
        return f"{data['peft_type']}, {choice.text()}"
    parts = [str(data.get("peft_type")), *(k for k, v in data.items() if v is True)]
    start = data.get("init_lora_weights")
    parts += [f"init_lora_weights={start}"] if isinstance(start, str) else []
    noise = ("inference_mode", "init_lora_weights", "fan_in_fan_out")
    return ", ".join(p for p in parts if p not in noise)


def _versions(info: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    out = {"lorica": info["lorica"], **info.get("versions", {})} if "lorica" in info else {}
    return out | ({"peft": data["peft_version"]} if data.get("peft_version") else {})


def _layers(
    tensors: Mapping[str, Tensor], data: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for suffix, side in _SUFFIXES.items():
            if key.endswith(suffix):
                path = key.removesuffix(suffix).removeprefix(peft.PREFIX)
                pairs.setdefault(path, {})[side] = tensor
    out = {}
    for path, pair in pairs.items():
        flat = all(factor.ndim == 2 for factor in pair.values())
        if len(pair) < 2 or not flat or pair["A"].shape[0] != pair["B"].shape[1]:
            problems.append(f"{path} has no complete pair of factors")
            continue
        r, scale = pair["A"].shape[0], _scale(path, data)
        out[path] = {
            "shape": [pair["B"].shape[0], pair["A"].shape[1]],
            "r": r,
            "scale": scale,
            "norm": norm(Factors(pair["A"], pair["B"], scale)),
        }
    return out


def _scale(path: str, data: Mapping[str, Any]) -> float:
    def value(pattern: str, usual: str) -> float:
        patterns = data.get(pattern) or {}
        match = first_match(patterns, path)
        if match is None and usual not in data:
            raise ValueError(
                f"adapter_config.json has no `{usual}`, which `{path}` needs; write the number in,"
                " or save the adapter again"
            )
        return patterns[match] if match is not None else data[usual]

    r, alpha = value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(r) if data.get("use_rslora") else r)


def _own_layers(info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: {
            "shape": [layer["out"], layer["in"]],
            "r": layer["r"] + layer["frozen_rank"],
            "scale": layer["scale"],
            "norm": None,
        }
        for path, layer in info.get("layers", {}).items()
    }


def norm(factors: Factors) -> float:
    """‖s·BA‖_F from two (r, r) products: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ)."""
    A, B = factors.A.double(), factors.B.double()
    square = ((B.T @ B) * (A @ A.T)).sum()
    return abs(factors.scale) * float(square.clamp_min(0).sqrt())
