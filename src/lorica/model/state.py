"""What of an adapted model is state: read, written back, hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters

from lorica.model.quantised import quantised
from lorica.tensors.dtensor_ops import copy_, read_full, reshard, shard_of
from lorica.tensors.modules import named_parameters
from lorica.text import cut, shorten

SHARED = "shared"  # owner, in the keys, of what all layers share


def tensors(adapters: Adapters) -> dict[str, Tensor]:
    """{path: tensor} of all that training changes or the forward reads beside the frozen base:
    parameters, and what all layers share."""
    out: dict[str, Tensor] = {f"{SHARED}.{n}": t for n, t in adapters.shared}
    for site, layer in adapters.layers.items():
        out |= {f"{site}.{n}": p for n, p, _ in layer.trained()}
        out |= {f"{site}.{n}": p for n, p in layer.frozen()}
        if not adapters.base_unchanged:
            out[f"{site}.base.weight"] = layer.store.parameter
    for site, module in {**adapters.saved, **adapters.tables}.items():
        out |= {f"{site}.{n}": p for n, p, _ in module.trained()}
    parameters = dict(named_parameters(adapters.model)) if adapters.direct else {}
    return out | {n: parameters[n] for n in adapters.direct}


def buffers(adapters: Adapters) -> dict[str, Tensor]:
    """{path: persistent buffer} of the modules that train in full (running statistics, say)."""
    out: dict[str, Tensor] = {}
    for site, module in adapters.saved.items():
        own = {n for n, _ in module.copy.named_parameters(remove_duplicate=False)}
        if module.only is None:
            state = module.copy.state_dict()
            out |= {f"{site}.copy.{n}": t for n, t in state.items() if n not in own}
    return out


def load(adapters: Adapters, saved: Mapping[str, Tensor]) -> None:
    """Write `saved` into the adapters; see `Adapters.load_state_dict`."""
    _check_tensors(saved)
    reshard(adapters.model)
    before: dict[str, tuple[nn.Parameter | None, nn.Parameter | None]] = {}
    for site, layer in adapters.layers.items():
        before[site] = layer.update.frozen_A, layer.update.frozen_B
        layer.update.fit_frozen_(*(saved.get(f"{site}.update.frozen_{side}") for side in "AB"))
    own = tensors(adapters)
    both = [n for n in own if n in saved and saved[n].shape != own[n].shape]
    kind = torch.Tensor.is_floating_point
    kinds = [n for n in own if n in saved and kind(saved[n]) != kind(own[n])]
    trained = {t.name for t in adapters.trained()}
    bad = [n for n in own if n in saved and not _finite(saved[n], n in trained)]
    wrong = {
        "missing": sorted(set(own) - set(saved)),
        "extra": sorted(set(saved) - set(own)),
        "shape": [f"{n} {tuple(saved[n].shape)} for {tuple(own[n].shape)}" for n in both],
        "type": [f"{n} {saved[n].dtype} for {own[n].dtype}" for n in kinds],
    }
    if bad or any(wrong.values()):
        for site, (a, b) in before.items():
            update = adapters.layers[site].update
            update.frozen_A, update.frozen_B = a, b
    if any(wrong.values()):
        listed = "; ".join(
            f"{what}: {', '.join(map(cut, names[:8]))}{' ...' if len(names) > 8 else ''}"
            for what, names in wrong.items()
            if names
        )
        recipe = adapters.recipe
        raise ValueError(
            f"the saved tensors are not those of these adapters: {listed}. The recipe here is"
            f" `{recipe.text()}` with r={recipe.r}; attach with the saved one"
        )
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(own)} saved tensors hold values that are not finite, first"
            f" `{bad[0]}`: they were saved after training had diverged, or are damaged. Load an"
            " earlier checkpoint"
        )
    shared = {f"{SHARED}.{n}": n for n, _ in adapters.shared}
    for name, t in own.items():
        if name in shared:
            adapters.shared.write(shared[name], saved[name])
        else:
            copy_(t, saved[name])
    for layer in adapters.layers.values():
        layer.update.delta.loaded()
        layer.combine.loaded()


def hash_base(adapters: Adapters) -> str:
    """See `Adapters.hash_base`."""
    named: dict[str, Tensor] = {**base_parameters(adapters)}
    packed = quantised(adapters.model)
    paths = {id(store.parameter): path for path, store in packed.items()}
    for name, p in [*named.items()]:
        if (path := paths.get(id(p))) is not None:
            del named[name]
            owner = name.rpartition(".")[0]
            named |= {f"{owner}.{part}": t for part, t in packed[path].stored().items()}
    return hash_values(named, rows_left_out(adapters))


def _check_tensors(saved: object) -> None:
    """It is what `state_dict` returned."""
    entries: list[tuple[object, object]] = (
        [*saved.items()] if isinstance(saved, Mapping) else [(None, saved)]  # pyright: ignore
    )
    for name, value in entries:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = shorten(value) if name is None else f"{shorten(name)}: {shorten(value)}"
            raise ValueError(
                f"{what} is no state of adapters, which is a mapping from names to tensors; pass"
                " what `adapters.state_dict()` returned, e.g."
                " `torch.load('adapters.pt', weights_only=True)`"
            )


def _finite(value: Tensor, trains: bool) -> bool:
    """Whether a tensor of a state can be one: of what is frozen, a mask may hold infinities."""
    local = shard_of(value)[0]
    return bool(local.isfinite().all()) if trains else not bool(local.isnan().any())


_CHUNK = 1 << 24  # elements: bounded memory for large tables


def base_parameters(adapters: Adapters) -> dict[str, nn.Parameter]:
    """See `Adapters.base_parameters`."""
    stores = [layer.store for layer in adapters.layers.values()]
    inner = {id(p) for store in stores for p in store.module.parameters()}
    places = {layer.place for layer in adapters.layers.values()}
    own = {id(p) for p in tensors(adapters).values()} - inner
    saved = {id(p) for m in adapters.saved.values() for p in m.parameters()}
    out: dict[str, nn.Parameter] = {}
    for name, p in named_parameters(adapters.model):
        if (id(p) in own and name not in adapters.direct) or id(p) in saved:
            continue
        owner, _, leaf = name.rpartition(".base.")
        inside = owner in places or owner in adapters.tables
        out[f"{owner}.{leaf}" if inside else name] = p
    return out


def rows_left_out(adapters: Adapters) -> dict[str, Tensor]:
    """{name of a table of the base: indices (n,) of the rows that are trained instead}."""
    return {f"{n}.weight": t.indices for n, t in adapters.tables.items() if not t.alone}


def hash_exactly(named: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(named.items()):
        digest.update(name.encode())
        for chunk in torch.split(value.detach().reshape(-1), _CHUNK):
            digest.update(as_bytes(chunk))
    return digest.hexdigest()


def hash_values(named: Mapping[str, Tensor], without: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over names, shapes and float32 values: a half-precision copy held in float32 hashes
    as it did.

    Args:
        without: {name: indices of rows that count as if they were not there}.
    """
    digest = hashlib.sha256()
    for name, p in sorted(named.items()):
        full = read_full(p).detach()
        if without and name in without:
            keep = torch.ones(len(full), dtype=torch.bool, device=without[name].device)
            full = full[keep.index_fill_(0, without[name], False)]
        digest.update(f"{name}{tuple(full.shape)}".encode())
        if not full.is_meta:
            for chunk in torch.split(full.reshape(-1), _CHUNK):
                digest.update(as_bytes(chunk, torch.float32))
    return digest.hexdigest()


def as_bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> memoryview:
    """The raw bytes of a tensor, in its own dtype or another; of a copy, since numpy locks the
    storage that it looks into, and FSDP2 resizes its own."""
    copy = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)
    return copy.contiguous().reshape(-1).view(torch.uint8).numpy().data
