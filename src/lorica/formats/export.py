"""Exports: a PEFT adapter for other programs, merged weights, or a compressed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.formats.atomic_folder import ADAPTER_MARKS, check_free, first, together, writing
from lorica.formats.compressed import PACKED_MARKS, Packed, pack
from lorica.formats.load import load
from lorica.formats.merge import MARKS, Change, Merged, make_sample, merge_to, outputs, stand_in
from lorica.formats.peft.places import combine_of, factors_of, written
from lorica.formats.peft.write import config as peft_config
from lorica.formats.peft.write import file_tensors, obstacle, refused_layer, write_config
from lorica.formats.safe_files import PEFT_TENSORS, write_tensors
from lorica.formats.save import check_state
from lorica.formats.stored_state import full_state
from lorica.interfaces import Factors
from lorica.model.adapters import Adapters
from lorica.model.attach import detach
from lorica.model.experts import AdaptedTensor
from lorica.model.layer import AdaptedLayer, AdaptedLinear
from lorica.tensors.dtensor_ops import read_full
from lorica.text import clear_errors, shorten

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# to -> what writes a whole model, and what tells such a folder
_TO: dict[str, tuple[Callable[..., Any] | None, tuple[str, ...]]] = {
    "peft": (None, ADAPTER_MARKS), "merged": (merge_to, MARKS), "compressed": (pack, PACKED_MARKS),
}  # fmt: skip


def marks(to: str) -> tuple[str, ...]:
    """Files that tell a folder which `export(..., to=to)` may overwrite."""
    return _TO[to][1]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A PEFT adapter that was written; `as_dict` is JSON-ready.

    `error` is the largest ‖ΔW − ΔW'‖/‖ΔW‖ over the layers, from cutting the rank and rounding to
    the dtype; 0.0 where nothing was lost. Where a rank was given, there are

    * `errors`: those of cutting, {module path: error};
    * `approximated`: {module path: lost part of the update's output}, of updates that are no matrix
      (a layer's depends on what others see) and had to be made one before;
    * `logits`: how far the written adapter's logits on the sample are from the adapted model's;
      None where no sample can be made up, and `not_measured` says why.
    """

    path: Path
    r: int
    error: float
    errors: Mapping[str, float] = field(default_factory=dict)
    approximated: Mapping[str, float] = field(default_factory=dict)
    logits: Change | None = None
    not_measured: str | None = None

    def as_dict(self) -> dict[str, Any]:
        plain = {"path": str(self.path), "r": self.r, "error": self.error}
        if not self.errors:
            return plain
        return {
            **plain,
            "errors": dict(self.errors),
            "approximated": dict(self.approximated),
            "logits": None if self.logits is None else vars(self.logits),
            "not_measured": self.not_measured,
        }


@clear_errors()
def export(
    source: Adapters | nn.Module | str | Path,
    out: str | Path,
    *,
    to: str = "peft",
    model: nn.Module | None = None,
    dtype: str | None = None,
    portable: bool = False,
    r: int | None = None,
    sample: Mapping[str, Tensor] | None = None,
    check_base: bool = True,
    overwrite: bool = False,
    **merge_options: Any,
) -> Exported | Merged | Packed:
    """Write an adapter for another program, or the model that it leaves.

    Args:
        source: adapters, an adapted model, or a folder that `lorica.load` reads.
        out: the folder.
        to: `peft` (an adapter without Lorica's own file), `merged` (a whole model; see `merge_to`,
            which takes `merge_options`) or `compressed` (a smaller one, of methods that take the
            base out; see `lorica.formats.compressed.pack`, which takes `merge_options`).
        model: the base, where `source` is a folder; it is given back as it was (`peft`), merged
            (`merged`) or compressed.
        dtype: `float32`, `bfloat16` or `float16` of the tensors; default: the one they train in.
        portable: for servers that read one rank and one alpha and nothing else: s goes into B, all
            layers are padded with zeros to one rank, alpha = r. Exact, but only a plain sum W + ΔW
            without trained biases and modules has such a form.
        r: cut every layer to this rank by its singular value decomposition (implies `portable`);
            the best approximation, computed in float32; its error and how far it moves the logits
            are returned. Works for every method that leaves the base as it is. DoRA's magnitudes
            then are part of what is cut.
        sample: keyword arguments of a forward pass on which the change of the logits is measured.
            Default: 32 tokens drawn from the vocabulary, always the same.
        check_base: see `load`.
        overwrite: replace an adapter (or a model) that is there.

    Raises:
        ValueError: what was asked for doesn't exist for this method, and what to ask for instead.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapters = lorica.attach(model, "rslora+olora", r=2, verbose=False)
        >>> done = export(adapters, tempfile.mkdtemp() + "/out", portable=True)
        >>> done.r, done.error
        (4, 0.0)
    """
    if to not in _TO:
        raise ValueError(f"`to={to!r}`; allowed: {', '.join(map(repr, _TO))}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"`dtype={dtype!r}`; allowed: {', '.join(_DTYPES)}")
    if to != "peft" and (dtype is not None or portable or r is not None):
        raise ValueError(
            f"`dtype`, `portable` and `r` are about an adapter's files; a {to} model has its base's"
            " dtype. Leave them out, or say `to='peft'`"
        )
    if to == "peft" and merge_options:
        raise ValueError(
            f"{sorted(merge_options)} mean something with `to='merged'` or `to='compressed'` only"
        )
    if to == "peft" and sample is not None and r is None:
        raise ValueError(
            "`sample` is what a cut is measured on, and without `r` nothing is cut; leave it out"
        )
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        raise ValueError(f"`r={shorten(r)}`: the rank is a whole number of at least 1, e.g. `r=16`")
    whole = _TO[to][0]
    if first():
        check_free(Path(out), overwrite=overwrite, marks=marks(to))
    if not isinstance(source, (str, Path)):
        adapters = source if isinstance(source, Adapters) else Adapters.of(source)
        if whole is not None:
            return whole(adapters, out, sample=sample, overwrite=overwrite, **merge_options)
        return _export(adapters, Path(out), dtype, portable, r, sample, overwrite)
    if model is None:
        raise ValueError(
            f"{str(source)!r} is a folder and holds no base; load the base and give it as `model`"
        )
    adapters = load(model, source, check_base=check_base, trainable=False)
    if whole is not None:
        return whole(adapters, out, sample=sample, overwrite=overwrite, **merge_options)
    try:
        return _export(adapters, Path(out), dtype, portable, r, sample, overwrite)
    finally:
        detach(model)


def _export(
    adapters: Adapters,
    out: Path,
    dtype: str | None,
    portable: bool,
    r: int | None,
    sample: Mapping[str, Tensor] | None,
    overwrite: bool,
) -> Exported:
    state = full_state(adapters)
    check_state(adapters, state)
    most = max((min(x.in_features, x.out_features) for _, x in adapters), default=None)
    if r is not None and most is not None and r > most:
        raise ValueError(
            f"`r={shorten(r)}` (`--r`) is above {most}, which is min(in, out) of the largest layer"
            f" and so the most that any ΔW needs; give at most `r={most}`"
        )
    if (why := refused_layer(adapters)) is not None and (portable or r is not None):
        raise ValueError(
            f"{why}, so it would not read the plain LoRA. Write merged weights instead"
            " (`--to merged`, in Python `to='merged'`)"
        )
    lost: dict[str, Any] = {}
    if r is not None:
        sample, lost["not_measured"] = _sample(adapters, sample)
        with stand_in(adapters, sample) as lost["approximated"]:
            config, tensors, lost["errors"] = _portable(adapters, r)
        error = max(lost["errors"].values())
    elif portable:
        config, tensors, _ = _portable(adapters, r)
        error = 0.0
    else:
        if (why := obstacle(adapters)) is not None:
            raise ValueError(
                f"{why}, so there is no PEFT adapter of it. Write merged weights instead"
                " (`--to merged`, in Python `to='merged'`), or cut it to a plain LoRA of some rank"
                " with `r=...`"
            )
        config, tensors, error = peft_config(adapters), file_tensors(adapters, state), 0.0
    if dtype is not None:
        rounded = {n: t.to(_DTYPES[dtype]) for n, t in tensors.items() if t.is_floating_point()}
        unit = torch.finfo(_DTYPES[dtype]).eps
        changed = any(
            not torch.equal(t.to(tensors[n].dtype), tensors[n]) for n, t in rounded.items()
        )
        tensors, error = {**tensors, **rounded}, error + (unit if changed else 0.0)
    if r is not None and sample is not None:
        lost["logits"] = _change(adapters, tensors, sample)
    if first():
        needs = sum(t.nbytes for t in tensors.values())
        with writing(out, overwrite=overwrite, needs=needs) as folder:
            write_tensors(tensors, folder / PEFT_TENSORS)
            write_config(config, folder)
    together()
    return Exported(path=out, r=config["r"], error=error, **lost)


def _sample(
    adapters: Adapters, sample: Mapping[str, Tensor] | None
) -> tuple[Mapping[str, Tensor] | None, str | None]:
    """What to measure on, or why there is nothing.

    Raises:
        ValueError: there is nothing, and the update cannot do without.
    """
    recipe = adapters.recipe
    try:
        return sample or make_sample(adapters.model), None
    except ValueError as error:
        if "weight" not in recipe.given():
            raise
        return None, str(error)


def _change(
    adapters: Adapters, tensors: Mapping[str, Tensor], sample: Mapping[str, Tensor]
) -> Change:
    """From the adapted model's logits to those of the base with the written adapter."""
    before = outputs(adapters.model, sample)
    kept = {name: layer.disabled for name, layer in adapters}
    hooks = []
    try:
        for _, layer in adapters:
            held = [p.unfolded(tensors[p.key]) for p in factors_of(adapters, layer)]
            A, B = (t.to(layer.store.device) for t in held)
            if isinstance(layer, AdaptedTensor):
                layer.instead = Factors(A, B)
                continue
            hooks.append(layer.register_forward_hook(partial(_beside, A, B)))
            layer.disabled = True
        after = outputs(adapters.model, sample)
    finally:
        for name, layer in adapters:
            layer.disabled = kept[name]
            if isinstance(layer, AdaptedTensor):
                layer.instead = None
        for hook in hooks:
            hook.remove()
    return Change.of(before, after)


def _beside(A: Tensor, B: Tensor, layer: AdaptedLinear, args: tuple, y: Tensor) -> Tensor:
    """The base's output, and the adapter's as PEFT adds it: its factors are float32 at least."""
    wide = torch.promote_types(torch.promote_types(A.dtype, y.dtype), torch.float32)
    A, B, x = A.to(wide), B.to(wide), args[0]
    h = F.embedding(x, A.T) if layer.site.lookup else F.linear(x.to(wide), A)
    return y + F.linear(h, B).to(y.dtype)


@torch.no_grad()
def _portable(
    adapters: Adapters, r: int | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """One rank, alpha = rank, s in B; cut to rank `r` where given. Each layer's error with it."""
    recipe = adapters.recipe
    in_full = [*adapters.saved, *(f"rows of {n}" for n in adapters.tables)]
    combine = None if adapters.direct else combine_of(adapters)
    flags = None if combine is None else combine.peft_flags
    if combine is None or not adapters.base_unchanged:
        why = f"`{recipe.text()}` trains the base itself"
    elif flags is None or (flags and r is None):
        why = f"`{combine.name}` is no plain sum W + ΔW"
    elif in_full or any(n for _, layer in adapters for n, _ in layer.own.named_parameters()):
        why = f"{', '.join(in_full) or 'biases'} trained in full"
    else:
        why = None
    if why is not None:
        raise ValueError(
            f"{why}, so no plain LoRA computes the same. Write merged weights instead (`--to"
            " merged`, in Python `to='merged'`)"
        )
    assert flags is not None
    pairs = {name: _pair(layer, r, plain=not flags) for name, layer in adapters}
    rank = r if r is not None else max(a.shape[-2] for a, _, _ in pairs.values())
    tensors = {}
    for name, layer in adapters:
        a, b, _ = pairs[name]
        spare = rank - a.shape[-2]
        for place, whole in zip(
            factors_of(adapters, layer),
            (F.pad(a, (0, 0, 0, spare)), F.pad(b, (0, spare))),
            strict=True,
        ):
            tensors[place.key] = place.folded(whole).contiguous()
    config = peft_config(adapters, {n: rank for n in pairs}, {n: 1.0 for n in pairs})
    config |= dict.fromkeys(flags, False)  # what they say of W is in the factors
    return config, tensors, {name: error for name, (_, _, error) in pairs.items()}


def _pair(layer: AdaptedLayer, r: int | None, *, plain: bool) -> tuple[Tensor, Tensor, float]:
    """A (k, in), B (out, k) with s in B, and the relative error of cutting to rank r.

    Args:
        plain: the layer is W + ΔW; else what is cut is its effective weight less W.
    """
    factors = written(layer) if plain else None
    if factors is not None:
        a, b = read_full(factors.A).cpu(), read_full(factors.B).cpu() * factors.scale
        if r is None or a.shape[-2] <= r:
            return a, b, 0.0
        qa, ra = torch.linalg.qr(a.double().mT)  # (in, k), (k, k)
        qb, rb = torch.linalg.qr(b.double())
        u, s, vh = torch.linalg.svd(rb @ ra.mT)
        u, vh = qb @ u, vh @ qa.mT
    elif r is None:
        raise ValueError(
            f"{layer.site.name!r} has no low-rank form; give a rank, `r=...`, for the best"
            " approximation, or write merged weights (`--to merged`, in Python `to='merged'`)"
        )
    else:
        whole = layer.update.weight(layer.store) if plain else _difference(layer)
        u, s, vh = torch.linalg.svd(whole.cpu(), full_matrices=False)
    root = s[..., :r].sqrt()
    total = float(s.norm())
    error = float(s[..., r:].norm()) / total if total else 0.0
    dtype = layer.site.dtype
    a, b = root[..., None] * vh[..., :r, :], u[..., :r] * root[..., None, :]
    return a.to(dtype), b.to(dtype), error


def _difference(layer: AdaptedLayer) -> Tensor:
    """W' − W (out, in), in at least float32."""
    weight, _ = layer.effective()
    return read_full(weight) - read_full(layer.store.weight()).to(weight.dtype)
