"""What the weights of a quantised model were before, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import hub as transformers_hub

from lorica.model.bases.base import FLOATING, AbstractBase
from lorica.tensors.linalg import vector_norm
from lorica.tensors.modules import named_modules
from lorica.text import parse_json

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FAR = 0.7  # of ‖W‖; formats of 4 bits are 0.1 away from W, of 2 bits 0.4, another model's W 1.4

# Any: transformers declares half of their types.
_hub: Any = transformers_hub
_loading: Any = core_model_loading
Source = str | Path | Mapping[str, Tensor]


class Unquantised(Mapping[str, Tensor]):
    """{module path: its weight (out, in) before it was quantised}, read when it is asked for.

    Args:
        layers: the weights as they are now.
        source: a checkpoint's folder or hub id, or the weights by module path.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, AbstractBase], source: Source
    ) -> None:
        self.layers, self.source = layers, source
        if isinstance(source, Mapping):
            self.given: Mapping[str, Tensor] = source
        else:
            self.given = _Checkpoint(model, str(source))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Tensor:
        """Raises:
        ValueError: there is none, or it is not what the layer's weight was made of.
        """
        store = self.layers[name]
        now = store.weight().detach()
        now = now.to(torch.promote_types(now.dtype, torch.float32))
        if store.dense and (name not in self.given or not isinstance(self.source, Mapping)):
            return now  # it is what it was
        if name not in self.given and isinstance(self.source, Mapping):
            raise ValueError(
                f"`unquantised` has no weight for {name!r}; give what each quantised layer"
                " was, {module path: weight}"
            )
        came = self.given[name].to(now)
        if came.ndim == 2 and came.T.shape == now.shape and not _near(came, now):
            came = came.T  # a Conv1D stores Wᵀ
        if not _near(came, now):
            raise ValueError(
                f"{self._said()} has another weight for {name!r}, {tuple(came.shape)}, than the one"
                f" that was quantised here, {tuple(now.shape)}; give the checkpoint that this base"
                " was quantised from as `unquantised=`"
            )
        return came

    def _said(self) -> str:
        return "`unquantised`" if isinstance(self.source, Mapping) else f"`{self.source}`"


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(vector_norm(one - other) <= FAR * vector_norm(other))


class _Checkpoint(Mapping[str, Tensor]):
    """{module path: weight} of a checkpoint's safetensors files."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self.files = _files(name)
        self.keys_of = _names(model, self.files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def __getitem__(self, path: str) -> Tensor:
        """Raises:
        ValueError: there is no such weight in the files, or a packed one.
        """
        if path not in self.keys_of:
            raise ValueError(
                f"`{self.name}` holds no weight for {path!r}, so what it was before it was"
                " quantised isn't known; give these weights as `unquantised={module path: weight}`"
            )
        key = self.keys_of[path]
        with _opened(self.files[key]) as file:
            came: Tensor = file.get_tensor(key)
        if came.dtype not in FLOATING:
            raise ValueError(
                f"`{self.name}` holds packed weights ({key} is"
                f" {str(came.dtype).removeprefix('torch.')}), not what they were before they were"
                " quantised; give the unquantised checkpoint as `unquantised='folder'`"
            )
        return came


def _opened(path: Path) -> Any:  # Any: safetensors has no types
    opens: Any = safetensors.safe_open
    return opens(path, framework="pt")


def _files(name: str) -> dict[str, Path]:
    """{key: the file that holds it}."""
    whole = _file(name, WHOLE)
    if whole is not None:
        with _opened(whole) as file:
            keys: list[str] = file.keys()
        return dict.fromkeys(keys, whole)
    index = _file(name, INDEX)
    if index is None:
        raise ValueError(
            f"`{name}` has no safetensors files on this machine, so the weights before they were"
            " quantised can't be read; give their folder, or the weights by module path, as"
            " `unquantised=`"
        )
    parts: dict[str, str] = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
    found = {part: _file(name, part) for part in set(parts.values())}
    missing = sorted(part for part, path in found.items() if path is None)
    if missing:
        raise ValueError(
            f"`{name}` lacks {', '.join(missing)}, which its index names; copy the whole folder"
        )
    return {key: path for key, part in parts.items() if (path := found[part]) is not None}


def _file(name: str, leaf: str) -> Path | None:
    """A file of a folder, or of what was downloaded of a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / leaf if (folder / leaf).is_file() else None
    try:
        found = _hub.cached_file(name, leaf, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _names(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str]:
    """{module path: the checkpoint's key}, under the renamings that transformers reads it with."""
    if not isinstance(model, PreTrainedModel):
        return {key.removesuffix(".weight"): key for key in files}
    every = get_model_conversion_mapping(model)
    renamings = [r for r in every if isinstance(r, _loading.WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    paths = {name for name, _ in named_modules(model)}
    found: dict[str, str] = {}
    for key in files:
        path: str = _loading.rename_source_key(key, renamings, [])[0].removesuffix(".weight")
        for one in (path, path.removeprefix(prefix), prefix + path):
            if one in paths:
                found.setdefault(one, key)
                break
    return found
