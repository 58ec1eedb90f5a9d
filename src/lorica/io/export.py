"""Exports: a PEFT adapter for other programs, or merged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapters import Adapters
from lorica.attach import detach
from lorica.io import native, peft
from lorica.io.folder import ADAPTER_MARKS, check_free, first, together, writing
from lorica.io.merged import MARKS, Merged, merge_to
from lorica.io.strict import PEFT_TENSORS
from lorica.layer import AdaptedLinear
from lorica.moves import read_full

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A PEFT adapter that was written. `error` is the largest ‖ΔW − ΔW'‖/‖ΔW‖ over the layers, from
    cutting the rank and rounding to the dtype; 0.0 where nothing was lost. `errors` are those of
    cutting, {module path: error}, where a rank was given."""

    path: Path
    r: int
    error: float
    errors: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        plain = {"path": str(self.path), "r": self.r, "error": self.error}
        return {**plain, "errors": dict(self.errors)} if self.errors else plain


def export(
    source: Adapters | nn.Module | str | Path,
    out: str | Path,
    *,
    to: str = "peft",
    model: nn.Module | None = None,
    dtype: str | None = None,
    portable: bool = False,
    r: int | None = None,
    check_base: bool = True,
    overwrite: bool = False,
    **merge_options: Any,
) -> Exported | Merged:
    """Write an adapter for another program.

    Args:
        source: adapters, an adapted model, or a folder that `lorica.load` reads.
        out: the folder.
        to: `peft` (an adapter without Lorica's own file) or `merged` (a whole model; see
            `merge_to`, which takes `merge_options`).
        model: the base, where `source` is a folder; it is given back as it was (`peft`) or merged
            (`merged`).
        dtype: `float32`, `bfloat16` or `float16` of the tensors; default: the one they train in.
        portable: for servers that read one rank and one alpha and nothing else: s goes into B, all
            layers are padded with zeros to one rank, alpha = r. Exact, but only a plain sum W + ΔW
            without trained biases and modules has such a form.
        r: cut every layer to this rank by its singular value decomposition (implies `portable`);
            the best approximation, whose error is returned. Works for every method with a ΔW.
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
    if to not in ("peft", "merged"):
        raise ValueError(f"`to={to!r}`; allowed: 'peft', 'merged'")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"`dtype={dtype!r}`; allowed: {', '.join(_DTYPES)}")
    if to == "merged" and (dtype is not None or portable or r is not None):
        raise ValueError(
            "`dtype`, `portable` and `r` are about an adapter's files; a merged model has its"
            " base's dtype. Leave them out, or say `to='peft'`"
        )
    if to == "peft" and merge_options:
        raise ValueError(f"{sorted(merge_options)} mean something with `to='merged'` only")
    marks = MARKS if to == "merged" else ADAPTER_MARKS
    if first():
        check_free(Path(out), overwrite=overwrite, marks=marks)
    if not isinstance(source, (str, Path)):
        adapters = source if isinstance(source, Adapters) else Adapters.of(source)
        if to == "merged":
            return merge_to(adapters, out, overwrite=overwrite, **merge_options)
        return _export(adapters, Path(out), dtype, portable, r, overwrite)
    if model is None:
        raise ValueError(
            f"{str(source)!r} is a folder and holds no base; load the base and give it as `model`"
        )
    adapters = native.load(model, source, check_base=check_base, trainable=False)
    if to == "merged":
        return merge_to(adapters, out, overwrite=overwrite, **merge_options)
    try:
        return _export(adapters, Path(out), dtype, portable, r, overwrite)
    finally:
        detach(model)


def _export(
    adapters: Adapters, out: Path, dtype: str | None, portable: bool, r: int | None, overwrite: bool
) -> Exported:
    state = native.full_state(adapters)
    native.check_values(adapters, state)
    errors: dict[str, float] = {}
    if portable or r is not None:
        config, tensors, errors = _portable(adapters, r)
        error = max(errors.values())
    else:
        if (obstacle := peft.obstacle(adapters)) is not None:
            raise ValueError(
                f"{obstacle}, so there is no PEFT adapter of it. Write merged weights instead"
                " (`--to merged`, in Python `to='merged'`), or cut it to a plain LoRA of some rank"
                " with `r=...`"
            )
        config, tensors, error = peft.config(adapters), peft.file_tensors(adapters, state), 0.0
    if dtype is not None:
        rounded = {n: t.to(_DTYPES[dtype]) for n, t in tensors.items() if t.is_floating_point()}
        unit = torch.finfo(_DTYPES[dtype]).eps
        lost = any(not torch.equal(t.to(tensors[n].dtype), tensors[n]) for n, t in rounded.items())
        tensors, error = {**tensors, **rounded}, error + (unit if lost else 0.0)
    if first():
        with writing(out, overwrite=overwrite) as folder:
            native.write_tensors(tensors, folder / PEFT_TENSORS, {"format": "pt"})
            peft.write_config(config, folder)
    together()
    return Exported(path=out, r=config["r"], error=error, errors=errors if r is not None else {})


@torch.no_grad()
def _portable(
    adapters: Adapters, r: int | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """One rank, alpha = rank, s in B; cut to rank `r` where given. Each layer's error with it."""
    recipe: Any = adapters.recipe
    in_full = [n for n, m in adapters.saved.items()]
    if adapters.direct or not adapters.pristine:
        why = f"`{recipe.text()}` trains the base itself"
    elif recipe.combine.peft_flags != {}:
        why = f"`{recipe.combine.word}` is no plain sum W + ΔW"
    elif in_full or any(n for _, layer in adapters for n, _ in layer.own.named_parameters()):
        why = f"{', '.join(in_full) or 'biases'} trained in full"
    else:
        why = None
    if why is not None:
        raise ValueError(
            f"{why}, so no plain LoRA computes the same. Write merged weights instead (`--to"
            " merged`, in Python `to='merged'`)"
        )
    pairs = {name: _pair(layer, r) for name, layer in adapters}
    rank = r if r is not None else max(a.shape[0] for a, _, _ in pairs.values())
    tensors = {}
    for name, layer in adapters:
        a, b, _ = pairs[name]
        spare = rank - a.shape[0]
        key_a, key_b = peft.factor_keys(f"{peft.PREFIX}{name}", layer.site.lookup)
        tensors[key_a] = torch.nn.functional.pad(a, (0, 0, 0, spare)).contiguous()
        tensors[key_b] = torch.nn.functional.pad(b, (0, spare)).contiguous()
    config = peft.config(adapters, {n: rank for n in pairs}, {n: 1.0 for n in pairs})
    return config, tensors, {name: error for name, (_, _, error) in pairs.items()}


def _pair(layer: AdaptedLinear, r: int | None) -> tuple[Tensor, Tensor, float]:
    """A (k, in), B (out, k) with s in B, and the relative error of cutting to rank r."""
    factors = peft.written(layer)
    if factors is not None:
        a, b = read_full(factors.A).cpu(), read_full(factors.B).cpu() * factors.scale
        if r is None or a.shape[0] <= r:
            return a, b, 0.0
        qa, ra = torch.linalg.qr(a.double().T)  # (in, k), (k, k)
        qb, rb = torch.linalg.qr(b.double())
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        u, vh = qb @ u, vh @ qa.T
    elif r is None:
        raise ValueError(
            f"{layer.site.name!r} has no low-rank form; give a rank, `r=...`, for the best"
            " approximation, or write merged weights (`--to merged`, in Python `to='merged'`)"
        )
    else:
        whole = layer.update.weight(layer.store).cpu().double()
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    root = s[:r].sqrt()
    total = float(s.norm())
    error = float(s[r:].norm()) / total if total else 0.0
    dtype = layer.site.dtype
    return (root[:, None] * vh[:r]).to(dtype), (u[:, :r] * root).to(dtype), error
