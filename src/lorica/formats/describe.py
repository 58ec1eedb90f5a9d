"""What `lorica inspect` says of an adapter's folder, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.formats.adapter_file import AdapterFile
from lorica.formats.peft.config import Config, own_choice
from lorica.interfaces import Factors
from lorica.text import clear_errors

_NO_METHOD = ("inference_mode", "init_lora_weights", "fan_in_fan_out")  # switches beside it


@clear_errors()
def inspect(path: str | Path) -> dict[str, Any]:  # Any: JSON values
    """Everything a folder says about its adapter; JSON-ready.

    Keys: `path`, `type` ("peft", "lorica" or "model"), `method`, `r`, `lora_alpha`, `targets`,
    `tokens` (ids of the tokens whose rows train, as the recipe names them; None: none do),
    `layers` ({module path: shape (out, in), r (with frozen factors), scale, norm}), `parameters`,
    `bytes`, `dtypes`, `saved` (modules trained in full), `base`, `versions`, `task_type`,
    `problems`. `norm` is the Frobenius norm of ΔW, computed from the factors; None where the folder
    holds none. A file of another of PEFT's types than LORA does not tell its layers' shapes: they
    are Lorica's, where it wrote the folder, else left out.

    `problems` lists what `lorica.load` would refuse whatever the model: values that are not finite,
    a hash that differs, a variant of PEFT's that is not implemented here.

    Raises:
        ValueError: not an adapter folder, or a file that can't be read at all, for which
            `lorica.load` raises the same.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapters = lorica.attach(model, "olora", r=2, verbose=False)
        >>> out = lorica.save(adapters, tempfile.mkdtemp() + "/out")
        >>> layer = inspect(out)["layers"]["0"]
        >>> layer["shape"], layer["r"], round(layer["norm"], 3)
        ([4, 8], 4, 0.0)
    """
    file = AdapterFile.read(path)
    problems = file.problems
    own, config, tensors = file.own, file.config, file.tensors
    says: Config = config if own is None else own.recipe
    return {
        "path": str(file.folder),
        "problems": problems,
        "type": file.form,
        "method": (own.method if own is not None else None) or _method(config),
        "r": says.get("r"),
        "lora_alpha": says.get("lora_alpha"),
        "targets": says.get("target_modules"),
        "task_type": config.get("task_type"),
        "why_not_peft": own.why_not_peft if own is not None else None,
        "base": {"name": file.base.name} if own is None else file.base.as_dict(),
        "versions": _versions(file),
        "layers": _layers(file),
        "saved": list(file.saved),
        "tokens": says.get("trainable_token_indices"),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": sum(f.stat().st_size for f in file.tensor_files),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
    }


def _method(data: Config) -> str:
    """PEFT's own terms for what one of its files is."""
    if (choice := own_choice(data)) is not None:
        return f"{data['peft_type']}, {choice.text()}"
    parts = [str(data.get("peft_type")), *(k for k, v in data.items() if v is True)]
    start = data.get("init_lora_weights")
    parts += [f"init_lora_weights={start}"] if isinstance(start, str) else []
    return ", ".join(p for p in parts if p not in _NO_METHOD)


def _versions(file: AdapterFile) -> dict[str, str]:
    out = {} if file.own is None else {"lorica": file.own.version, **file.own.versions}
    peft = file.config.get("peft_version")
    return {**out, "peft": peft} if peft else out


def _layers(file: AdapterFile) -> Mapping[str, dict[str, Any]]:  # Any: JSON values
    if file.has_pairs:
        return {
            path: {
                "shape": [*f.B.shape[:-1], f.A.shape[-1]],
                "r": f.A.shape[-2],
                "scale": f.scale,
                "norm": norm(f),
            }
            for path, f in file.factors.items()
        }
    return {
        path: {
            "shape": [
                *([layer.experts] if layer.experts else []),
                layer.out_features,
                layer.in_features,
            ],
            "r": layer.r + layer.frozen_rank,
            "scale": layer.scale,
            "norm": None,
        }
        for path, layer in file.layers.items()
    }


def norm(factors: Factors) -> float:
    """‖s·BA‖_F from two (r, r) products: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ)."""
    A, B = factors.A.double(), factors.B.double()
    square = ((B.mT @ B) * (A @ A.mT)).sum()
    return abs(factors.scale) * float(square.clamp_min(0).sqrt())
