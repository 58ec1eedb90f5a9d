# pyright: strict
"""`AdapterFile`: what an adapter's folder holds, read and checked without a model.

A folder holds one of three forms, and `lorica.json` beside it (recipe, hash of the base, versions,
hash of every file):

* `peft`: `adapter_config.json` and `adapter_model.safetensors`, where PEFT computes the same from
  them. What can't be cut out of PEFT's tensors bit for bit is in `lorica.safetensors`. A folder
  that PEFT wrote has this form without a `lorica.json`.
* `lorica`: `lorica.safetensors`, where PEFT can't compute the same.
* `model`: an ordinary transformers model, where the base itself trains.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorica.formats.fields import check_given
from lorica.formats.lorica_json import Base, Form, LayerInfo, LoricaJson
from lorica.formats.peft.config import (
    Config,
    Unsupported,
    as_plain,
    check_ending,
    check_expressions,
    check_values,
    is_synonym,
    left_out,
    recipe_of,
)
from lorica.formats.peft.places import LORA, PREFIX, Place
from lorica.formats.peft.read import recipe_for
from lorica.formats.peft.renamed import on_model
from lorica.formats.peft.tables import tables_of, with_rows
from lorica.formats.safe_files import (
    OWN_CONFIG,
    OWN_TENSORS,
    PEFT_CONFIG,
    PEFT_TENSORS,
    locate,
    read_json,
    read_tensors,
    tensor_file,
)
from lorica.formats.stored_state import not_finite, state_of_ours, state_of_pefts, write_state
from lorica.interfaces import Factors
from lorica.methods.optional import RanksFromData
from lorica.methods.ranks.base import first_matches
from lorica.model.adapters import Adapters
from lorica.recipe.compatibility import tokens
from lorica.recipe.recipe import Recipe
from lorica.text import shorten

_SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_embedding_A": "A", ".lora_embedding_B": "B",
}  # fmt: skip


class AttachAs(NamedTuple):
    """The arguments of `attach` under which a model takes a file's tensors.

    Attributes:
        initialise: the start has to be computed from the base, as PEFT does when it loads the file.
        recorded: the layers of a file that names them.
        ranks: (rank, alpha) of each layer, where they followed from data; None: the recipe says.
    """

    recipe: Recipe
    heads: tuple[str, ...]
    dtype: torch.dtype
    initialise: bool
    ranks: Mapping[str, tuple[int, float | None]] | None = None
    recorded: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's folder. `read` looks at `lorica.json` and the hashes; the rest is read, and
    checked, when it is first asked for.

    `lorica.load` and `lorica inspect` both go through this class: `refuse` raises the first of what
    `problems` lists.

    Attributes:
        folder: on the local disk.
        own: its `lorica.json`; None: PEFT wrote the folder.
        damage: which of the files is missing or was changed, and what to do; None: none is.
    """

    folder: Path
    own: LoricaJson | None
    damage: str | None

    @classmethod
    def read(cls, path: str | Path) -> AdapterFile:
        """Open a folder, or a hub id (`owner/name`), which is downloaded.

        Raises:
            ValueError: there is no adapter, or its `lorica.json` can't be read.

        Example:
            >>> import tempfile, torch, lorica
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            >>> _ = lorica.attach(model, "olora", r=2, verbose=False)
            >>> file = AdapterFile.read(lorica.save(model, tempfile.mkdtemp() + "/out"))
            >>> file.form, file.recipe.text(), file.problems
            ('peft', 'olora', [])
        """
        folder = locate(path)
        if not (folder / OWN_CONFIG).exists():
            return cls(folder, None, None)
        own = LoricaJson.read(folder)
        return cls(folder, own, own.damage(folder))

    # -- what is there

    @property
    def form(self) -> Form:
        return "peft" if self.own is None else self.own.form

    @property
    def config_file(self) -> Path:
        """The file that says what the adapter is."""
        return self.folder / (PEFT_CONFIG if self.own is None else OWN_CONFIG)

    @cached_property
    def config(self) -> Config:
        """`adapter_config.json` as it was written, its values checked; empty where the form has
        none.

        Raises:
            ValueError: it can't be read, or a value has a wrong type or is out of range.
        """
        file = self.folder / PEFT_CONFIG
        if self.form != "peft" or (self.damage is not None and not file.exists()):
            return {}
        data = read_json(file)
        check_values(data, file)
        return data

    @cached_property
    def tensor_files(self) -> list[Path]:
        """The files whose tensors belong to the adapter.

        Raises:
            ValueError: PEFT's file is missing, or is a pickle.
        """
        if self.own is None:
            return [tensor_file(self.folder)]
        if self.form == "model":
            return sorted(self.folder.glob("*.safetensors"))
        names = [name for name in (PEFT_TENSORS, OWN_TENSORS) if name in self.own.files]
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """{key in the files: tensor}, on the CPU.

        Raises:
            ValueError: a file is cut, or holds a tensor of a type that no adapter has.
        """
        out: dict[str, Tensor] = {}
        for file in self.tensor_files:
            out |= read_tensors(file)
        return out

    @cached_property
    def plain(self) -> tuple[Config, Mapping[str, Tensor]]:
        """PEFT's configuration and tensors, rewritten as a LORA where a method can do that.

        Raises:
            ValueError: a value or a tensor that is not of the file's type.
        """
        file = self.folder / PEFT_CONFIG
        if not is_synonym(self.config):
            return self.config, self.tensors
        config, tensors = as_plain(self.config, self.tensors, file)
        check_values(config, file)
        return config, tensors

    @cached_property
    def _recipe(self) -> tuple[Recipe | None, str | None]:
        """The recipe, or why there is none."""
        try:
            if self.own is not None:
                return self.own.parse_recipe(self.folder), None
            return recipe_of(self.plain[0], self.config_file), None
        except Unsupported as error:
            return None, str(error)

    @property
    def recipe(self) -> Recipe | None:
        """What computes the adapter; None: nothing here does, and `problems` says why. Of PEFT's
        files the patterns are as written: `attach_as` resolves them on a model.

        Raises:
            ValueError: a value that no recipe takes, or a method that this version doesn't know.
        """
        return self._recipe[0]

    @property
    def base(self) -> Base:
        """The model that it was trained on, as far as the folder says."""
        if self.own is not None:
            return self.own.base
        return Base(name=self.config.get("base_model_name_or_path"))

    @property
    def saved(self) -> tuple[str, ...]:
        """Modules that train in full: paths, or PEFT's endings of paths."""
        if self.own is not None:
            return self.own.saved
        return tuple(self.config.get("modules_to_save") or ())

    @property
    def has_pairs(self) -> bool:
        """Whether the tensors are pairs of factors, with ranks and alphas in the configuration."""
        return self.form == "peft" and self.plain[0].get("peft_type") == LORA

    @cached_property
    def _pairs(self) -> tuple[dict[str, Factors], list[str]]:
        """{module path: factors} of a LORA file, and what is wrong with them."""
        found: dict[str, dict[str, tuple[str, Tensor]]] = {}
        config, tensors = self.plain
        for key, tensor in tensors.items() if self.has_pairs else ():
            for suffix, side in _SUFFIXES.items():
                if key.endswith(suffix):
                    path = key.removesuffix(suffix).removeprefix(PREFIX)
                    found.setdefault(path, {})[side] = key, tensor
        pairs: dict[str, Factors] = {}
        problems: list[str] = []
        scales = _ranks_and_scales(found, config)
        for path, pair in found.items():
            flat = all(factor.ndim == 2 for _, factor in pair.values())
            if len(pair) < 2 or not flat or pair["A"][1].shape[0] != pair["B"][1].shape[1]:
                problems.append(f"{path} has no complete pair of factors")
                continue
            (key, A), (_, B) = pair["A"], pair["B"]
            r, scale = scales[path]
            if A.shape[0] == r:
                pairs[path] = Factors(A, B, scale)
                continue
            experts, rest = divmod(A.shape[0], r)
            if not config.get("target_parameters") or rest:
                problems.append(f"{key} is {tuple(A.shape)}, of rank {r} expected")
                pairs[path] = Factors(A, B, scale)
                continue
            a, b = Place(key, -2, experts=experts), Place(key, -1, experts=experts)
            pairs[path] = Factors(a.unfolded(A), b.unfolded(B), scale)
        return pairs, problems

    @property
    def factors(self) -> dict[str, Factors]:
        """{module path: factors}, the frozen ones among them; empty where the form is no LORA."""
        return self._pairs[0]

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """{module path: sizes, rank and scale}, as far as the folder tells them without a model."""
        if self.own is not None:
            return self.own.layers
        return {
            path: LayerInfo(
                in_features=f.A.shape[-1],
                out_features=f.B.shape[-2],
                r=f.A.shape[-2],
                frozen_rank=0,
                scale=f.scale,
                experts=f.A.shape[0] if f.A.ndim == 3 else 0,
            )
            for path, f in self.factors.items()
        }

    def vocabulary(self, embeddings: Collection[str]) -> int:
        """Rows that the base's tables need for this file, at least; 0: it says nothing of them.

        Args:
            embeddings: paths of the base's input and output embeddings.
        """
        given = self.own.recipe if self.own is not None else self.config
        ids = tokens(given.get("trainable_token_indices") or None)
        several = ids.values() if isinstance(ids, Mapping) else [ids or ()]
        ends = [i[-1] + 1 for i in several if i]
        inner = ("", ".copy", ".base_layer", ".token_adapter.base_layer")
        keys = {f"{p}{i}.weight" for p in embeddings for i in inner}
        ends += [len(t) for key, t in self.tensors.items() if key.removeprefix(PREFIX) in keys]
        return max(ends, default=0)

    # -- what is wrong

    def check(self) -> None:
        """Check what is wrong in itself, so that nothing of the folder can be shown.

        Raises:
            ValueError: see `config`, `tensors`, `plain` and `recipe`; a pattern that is no regular
                expression, or that takes for ever.
        """
        config, tensors = self.plain
        if self.has_pairs:
            check_ending(config, tensors, self.folder / PEFT_CONFIG)
            check_given(config, ("r", "lora_alpha"), self.folder / PEFT_CONFIG, _ALWAYS)
        if self.own is not None:
            check_expressions(self.own.recipe, self.config_file)
            check_ending(self.own.recipe, self.own.layers, self.config_file)
        _ = self._recipe

    @property
    def problems(self) -> list[str]:
        """All that `lorica.load` refuses this folder for, whatever the model.

        Raises:
            ValueError: see `check`.
        """
        self.check()
        found = [*self._obstacles(), *self._pairs[1]]
        integers = [
            f"{name} is of {t.dtype}, a floating-point tensor expected"
            for name, t in self.tensors.items()  # a method's own tensors, in our form, may be some
            if name.startswith(PREFIX) and not (t.is_floating_point() or name in self._in_full)
        ]
        return found + integers

    def refuse(self) -> None:
        """Raise the first problem that no model can tell more about.

        Raises:
            ValueError: see `problems`.
        """
        if self.damage is not None:
            raise ValueError(self.damage)
        self.check()
        for problem in self._obstacles():
            raise ValueError(problem)

    def _obstacles(self) -> list[str]:
        found = [self.damage, self._recipe[1], self._rank_problem()]
        bad = not_finite(self.tensors, self._in_full)
        if bad:
            found.append(
                f"{self.folder}: values that are not finite in {', '.join(bad[:4])}"
                f"{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}: training had diverged, or"
                " the file was changed. Use an earlier checkpoint"
            )
        return [problem for problem in found if problem is not None]

    def _rank_problem(self) -> str | None:
        """A rank that is larger than all there is, for which nothing must be made; None: it is
        not."""
        if (recipe := self.recipe) is None:
            return None
        sizes = [size for t in self.tensors.values() for size in t.shape]
        for layer in self.own.layers.values() if self.own is not None else ():
            sizes += [layer.in_features, layer.out_features]
        own = ranks_from_data(recipe, self.layers if self.own is not None else {}) or {}
        ranks = [recipe.r or 0, *recipe.rank_pattern.values(), *(r for r, _ in own.values())]
        rank, most = max(ranks), max(sizes, default=0)
        if bad := [name for name, (r, _) in own.items() if r < 1]:
            return (
                f"{self.config_file}: the layer {shorten(bad[0])} has rank 0, where at least 1 is"
                " expected; the file was changed. Copy the folder again from where it came"
            )
        if rank <= most or self.form == "model":
            return None
        return (
            f"{self.config_file}: the rank {rank} is larger than every dimension of the file's"
            f" tensors and layers, {most} at most; the file was changed. Copy the folder again from"
            " where it came"
        )

    @cached_property
    def _in_full(self) -> set[str]:
        """Keys of the tensors that belong to modules that train in full."""
        if self.own is not None:
            ours = tuple(f"{site}." for site in self.own.saved)
            return {key for key in self.tensors if key.removeprefix(PREFIX).startswith(ours)}
        return {key for key in self.tensors if any(p.endswith(self.saved) for p in _above(key))}

    # -- onto a model

    def attach_as(self, model: nn.Module) -> AttachAs:
        """How a model has to be adapted for this file.

        Raises:
            ValueError: PEFT's configuration means no module of it, or takes for ever to say which.
        """
        if self.own is not None:
            recipe = self.own.parse_recipe(self.folder)
            ranks = ranks_from_data(recipe, self.own.layers)
            layers = tuple(self.own.layers)
            return AttachAs(recipe, self.own.heads, self.own.torch_dtype, False, ranks, layers)
        recipe, frozen_start = recipe_for(model, *self._named_as(model), self.config_file)
        return AttachAs(recipe, (), torch.float32, frozen_start)

    def _named_as(self, model: nn.Module) -> tuple[Config, Mapping[str, Tensor]]:
        """PEFT's configuration and tensors, under the names that this model's modules have."""
        return on_model(model, *self.plain)

    def state_for(self, adapters: Adapters) -> dict[str, Tensor]:
        """The state of adapters that were attached as `attach_as` says.

        Raises:
            ValueError: listing every tensor that is missing, left over or of another shape.
        """
        if self.own is None:
            config, tensors = self._named_as(adapters.model)
            tables = tables_of(adapters.model, config, tensors, self.config_file)
            tensors = with_rows(adapters, tables, self.tensor_files[0])
            missing = left_out(config)
            return state_of_pefts(adapters, tensors, self.tensor_files[0], left_out=missing)
        peft = self.form == "peft"
        return state_of_ours(
            adapters,
            self.tensors,
            self.folder / (PEFT_TENSORS if peft else OWN_TENSORS),
            ranks={name: layer.frozen_rank for name, layer in self.own.layers.items()},
            in_peft_form=peft,
            beside_peft=peft and OWN_TENSORS in self.own.files,
        )

    def write_into(self, adapters: Adapters) -> None:
        """Write the file's state into adapters that were attached as `attach_as` says.

        Raises:
            ValueError: see `state_for`; nothing is written then.
        """
        write_state(adapters, self.state_for(adapters))


def ranks_from_data(
    recipe: Recipe, layers: Mapping[str, LayerInfo]
) -> dict[str, tuple[int, float | None]] | None:
    """(rank, alpha) of each layer as it was saved, where the ranks followed from data and the
    recipe can't tell them; None: it can."""
    scale = recipe.scale
    if not isinstance(recipe.rank, RanksFromData) or scale is None:
        return None
    return {
        name: (layer.r, scale.alpha_for(layer.scale, max(layer.r, 1)))
        for name, layer in layers.items()
    }


_ALWAYS = "write the number in, or save the adapter again with PEFT, which writes it always"


def _above(key: str) -> list[str]:
    """The paths of the modules that a key of PEFT's may belong to."""
    parts = key.removeprefix(PREFIX).split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _ranks_and_scales(paths: Collection[str], config: Config) -> dict[str, tuple[int, float]]:
    """{module path: what a LORA configuration says of it}."""
    ranks: Mapping[str, int] = config.get("rank_pattern") or {}
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    of_rank, of_alpha = first_matches(ranks, paths), first_matches(alphas, paths)
    out: dict[str, tuple[int, float]] = {}
    for path in paths:
        r: int = ranks[of_rank[path]] if path in of_rank else config["r"]
        a: float = alphas[of_alpha[path]] if path in of_alpha else config["lora_alpha"]
        out[path] = r, a / (math.sqrt(r) if config.get("use_rslora") else r)
    return out
