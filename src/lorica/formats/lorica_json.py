"""`lorica.json`: what an adapter's folder says of itself, beside the tensors."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

import lorica
from lorica.embedded import named
from lorica.formats.fields import NUMBER, Field, check_fields, check_given
from lorica.formats.safe_files import (
    OWN_CONFIG,
    OWN_TENSORS,
    PEFT_CONFIG,
    PEFT_TENSORS,
    read_json,
    sha256,
)
from lorica.model.adapters import Adapters
from lorica.model.quantised import quantised
from lorica.recipe.recipe import Recipe
from lorica.text import cut, shorten

Form = Literal["peft", "lorica", "model"]

READER = 1  # raised when an older reader would misread what is written

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
_WRITTEN: dict[Form, set[str]] = {  # what a folder always holds
    "peft": {PEFT_CONFIG, PEFT_TENSORS}, "lorica": {OWN_TENSORS}, "model": set(),
}  # fmt: skip
_CUT = "the file was cut. Copy the folder again"
_TEXT, _TEXTS = Field(types=(str,)), Field(types=(list,), items=(str,))
_FIELDS = {
    "reader": Field(types=(int,)), "lorica": _TEXT, "recipe": Field(types=(dict,)),
    "form": Field(
        types=(str,), fits=("peft", "lorica", "model").__contains__,
        allowed="'peft', 'lorica' or 'model'",
    ),
    "dtype": Field(types=(str,), fits=_DTYPES.__contains__, allowed=", ".join(_DTYPES)),
    "base": Field(types=(dict,)), "fresh": _TEXTS, "saved": _TEXTS, "direct": _TEXTS,
    "layers": Field(types=(dict,), items=(dict,)),
    "files": Field(types=(dict,), items=(str,)), "versions": Field(types=(dict,), items=(str,)),
}  # fmt: skip
_MORE = {"method": _TEXT, "why_not_peft": _TEXT}
_NAMES = Field(types=(str, list), items=(str,))
_RECIPE_FIELDS = {
    "method": _TEXT, "r": Field(types=(int,)), "lora_alpha": Field(types=NUMBER),
    "lora_dropout": Field(types=NUMBER), "lora_dropout_on": _TEXT, "target_modules": _NAMES,
    "target_parameters": _TEXTS, "exclude_modules": _NAMES,
    "layers_to_transform": Field(types=(list,), items=(int,)),
    "modules_to_save": _TEXTS, "trainable_token_indices": Field(types=(list, dict)),
    "adapt_towers": Field(types=(bool,)), "bias": _TEXT, "train_rest": Field(types=(bool,)),
    "rank_pattern": Field(types=(dict,), items=(int,)),
    "alpha_pattern": Field(types=(dict,), items=NUMBER), "seed": Field(types=(int,)),
}  # fmt: skip
_BASE_FIELDS: dict[str, Field] = dict.fromkeys(("class", "name", "sha256", "dtype"), _TEXT)
_SIZE = Field(types=(int,), fits=lambda n: 0 <= n < 2**31, allowed="a size of at least 0")
_LAYER_FIELDS = {
    "in": _SIZE, "out": _SIZE, "r": _SIZE, "frozen_rank": _SIZE,
    "scale": Field(types=NUMBER, fits=lambda s: 0 <= s < 2**31, allowed="a number of at least 0"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that an adapter was trained on; a PEFT file says no more than the name."""

    cls: str | None = None
    name: str | None = None
    sha256: str | None = None  # see `Adapters.hash_base`
    dtype: str | None = None  # several are separated by commas

    def as_dict(self) -> dict[str, str | None]:
        return {"class": self.cls, "name": self.name, "sha256": self.sha256, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One adapted layer as it was saved: its sizes, the rank that trains, the rank of the frozen
    factors beside it, and s."""

    in_features: int
    out_features: int
    r: int
    frozen_rank: int
    scale: float
    experts: int = 0  # matrices in a stack, each of these sizes; 0: a single matrix

    def as_dict(self) -> dict[str, float]:
        return {
            "in": self.in_features,
            "out": self.out_features,
            "r": self.r,
            "scale": self.scale,
            "frozen_rank": self.frozen_rank,
            **({"experts": self.experts} if self.experts else {}),
        }


@dataclass(frozen=True, kw_only=True)
class LoricaJson:
    """The checked contents of a `lorica.json`.

    Attributes:
        version: of Lorica, that wrote it.
        form: `peft`, `lorica` or `model`; see `AdapterFile`.
        why_not_peft: why the form is not `peft`.
        method: the recipe's text, for people.
        recipe: as `Recipe.to_dict` wrote it.
        dtype: name of the dtype that it trains in.
        heads: modules that train in full and that the recipe does not name (`fresh` in the file).
        saved: modules that train in full beside a frozen original.
        direct: parameters of the base that train in place.
        versions: {package: version} at the time of writing.
        files: {name in the folder: SHA-256}.
    """

    version: str
    form: Form
    why_not_peft: str | None
    method: str | None
    recipe: Mapping[str, Any]  # Any: JSON values of checked types, that `Recipe.from_dict` takes
    dtype: str
    base: Base
    heads: tuple[str, ...]
    layers: Mapping[str, LayerInfo]
    saved: tuple[str, ...]
    direct: tuple[str, ...]
    versions: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @classmethod
    def of(
        cls, adapters: Adapters, form: Form, why_not_peft: str | None, base_hash: str | None
    ) -> LoricaJson:
        """What there is to say of live adapters; `files` is left to `write`."""
        model = adapters.model
        ranks = frozen_ranks(adapters)
        packages = ("torch", "transformers", "safetensors")
        return cls(
            version=lorica.__version__,
            form=form,
            why_not_peft=why_not_peft,
            method=adapters.recipe.text(),
            recipe=adapters.recipe.to_dict(),
            dtype=str(adapters.dtype).removeprefix("torch."),
            base=Base(
                cls=type(model).__name__,
                name=named(model.config.name_or_path)
                if isinstance(model, PreTrainedModel)
                else None,
                sha256=base_hash,
                dtype=base_dtypes(adapters),
            ),
            heads=tuple(adapters.summary.heads),
            layers={
                name: LayerInfo(
                    in_features=layer.in_features,
                    out_features=layer.out_features,
                    r=layer.site.r,
                    frozen_rank=ranks[name],
                    scale=layer.site.scale,
                    experts=layer.site.experts,
                )
                for name, layer in adapters
            },
            saved=tuple(adapters.saved),
            direct=tuple(adapters.direct),
            versions={
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in packages},
            },
        )

    @classmethod
    def read(cls, folder: Path) -> LoricaJson:
        """Read and check the file; the files that it lists are not looked at.

        Raises:
            ValueError: a newer format; a value that is missing, of the wrong type or out of range.
        """
        file = folder / OWN_CONFIG
        data = read_json(file)
        reader = data.get("reader")
        if isinstance(reader, int) and reader > READER:
            raise ValueError(
                f"{file} was written by Lorica {cut(str(data.get('lorica')))} and needs a reader"
                f" of format {reader}; this is Lorica {lorica.__version__}, which reads up to"
                f" {READER}. Upgrade: `pip install -U lorica`"
            )
        check_fields(data, {**_FIELDS, **_MORE}, file)
        check_given(data, _FIELDS, file, _CUT)
        check_fields(data["recipe"], _RECIPE_FIELDS, file)
        check_fields(data["base"], _BASE_FIELDS, file)
        for name, layer in data["layers"].items():
            where = f"{file}, layer {shorten(name)}"
            check_fields(layer, {**_LAYER_FIELDS, "experts": _SIZE}, where)
            check_given(layer, _LAYER_FIELDS, where, _CUT)
        base = data["base"]
        return cls(
            version=data["lorica"],
            form=data["form"],
            why_not_peft=data.get("why_not_peft"),
            method=data.get("method"),
            recipe=data["recipe"],
            dtype=data["dtype"],
            base=Base(
                cls=base.get("class"),
                name=base.get("name"),
                sha256=base.get("sha256"),
                dtype=base.get("dtype"),
            ),
            heads=tuple(data["fresh"]),
            layers={
                name: LayerInfo(
                    in_features=layer["in"],
                    out_features=layer["out"],
                    r=layer["r"],
                    frozen_rank=layer["frozen_rank"],
                    scale=layer["scale"],
                    experts=layer.get("experts", 0),
                )
                for name, layer in data["layers"].items()
            },
            saved=tuple(data["saved"]),
            direct=tuple(data["direct"]),
            versions=data["versions"],
            files=data["files"],
        )

    def write(self, folder: Path) -> None:
        """Write the file, with a hash of every file that is in the folder now."""
        data = {
            "lorica": self.version,
            "reader": READER,
            "form": self.form,
            "why_not_peft": self.why_not_peft,
            "method": self.method,
            "recipe": dict(self.recipe),
            "dtype": self.dtype,
            "base": self.base.as_dict(),
            "fresh": list(self.heads),
            "layers": {name: layer.as_dict() for name, layer in self.layers.items()},
            "saved": list(self.saved),
            "direct": list(self.direct),
            "versions": dict(self.versions),
            "files": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        }
        text = json.dumps(data, indent=2, ensure_ascii=False)
        (folder / OWN_CONFIG).write_text(text + "\n", encoding="utf-8")

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the files it lists: one is missing, or has other bytes; None: nothing
        is."""
        for name, digest in self.files.items():
            if os.path.basename(name) != name or not (folder / name).is_file():
                return (
                    f"{folder} lacks {shorten(name)}, which belongs to the adapter. Copy the whole"
                    " folder"
                )
            if sha256(folder / name) != digest:
                remedy = (
                    f" If another program wrote it and you trust it, delete {OWN_CONFIG} to read"
                    " the folder as an ordinary PEFT adapter"
                    if self.form == "peft"
                    else ""
                )
                return (
                    f"{folder / name} is not the file that {OWN_CONFIG} describes: truncated, or"
                    " changed since it was saved. Copy the folder again from where it came."
                    f"{remedy}"
                )
        if missing := sorted(_WRITTEN[self.form] - set(self.files)):
            return (
                f"{folder / OWN_CONFIG}: `files` does not list {', '.join(missing)}, which belongs"
                " to the adapter; the file was changed. Copy the whole folder again"
            )
        return None

    def parse_recipe(self, folder: Path) -> Recipe:
        """The recipe that was saved.

        Raises:
            ValueError: it holds a value, or names a method, that this version does not know.
        """
        try:
            return Recipe.from_dict(self.recipe)
        except (ValueError, TypeError, RecursionError) as error:
            reason = str(error) if len(str(error)) < 1000 else f"{str(error)[:1000]}..."
            raise ValueError(f"{folder / OWN_CONFIG}: `recipe`: {reason}") from None


def frozen_ranks(adapters: Adapters) -> dict[str, int]:
    """{module path: rank of the frozen factors beside what trains}."""
    return {
        name: 0 if layer.update.frozen_A is None else layer.update.frozen_A.shape[-2]
        for name, layer in adapters
    }


def is_packed(dtypes: str) -> bool:
    """Whether what `base_dtypes` said names a quantised format."""
    return any(name.strip() not in _DTYPES for name in dtypes.split(","))


def base_dtypes(adapters: Adapters) -> str:
    """The base's dtype, or the format it is quantised in; several are separated by commas."""
    packed = {id(store.parameter): store.format for store in quantised(adapters.model).values()}
    found = {
        packed.get(id(p), str(p.dtype).removeprefix("torch."))
        for p in adapters.base_parameters().values()
        if id(p) in packed or p.is_floating_point()
    }
    return ", ".join(sorted(found))
