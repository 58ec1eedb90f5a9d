"""The tensors of an adapter: collected from a model for a save, matched with a file's at a load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from lorica.formats.peft.places import PREFIX, Place, places
from lorica.formats.peft.read import spare
from lorica.formats.peft.tables import frozen_rows
from lorica.model.adapters import Adapters
from lorica.model.state import buffers
from lorica.tensors.dtensor_ops import copy_, read_full
from lorica.tensors.linalg import all_finite


def full_state(adapters: Adapters) -> dict[str, Tensor]:
    """`adapters.state_dict()`, the buffers of the modules that train in full, and what such a
    module shares within itself under every name."""
    shared = {
        f"{site}.copy.{n}": read_full(p).detach()
        for site, module in adapters.saved.items()
        if module.only is None
        for n, p in module.copy.named_parameters(remove_duplicate=False)
    }
    return {**shared, **buffers(adapters), **adapters.state_dict()}


def write_state(adapters: Adapters, state: Mapping[str, Tensor]) -> None:
    """Write what `full_state` had collected into the model; frozen factors grow or shrink to it."""
    held = buffers(adapters)
    own = set(adapters.state_dict())
    extra = {n for n in state if n not in own and ".update.frozen_" not in n}
    adapters.load_state_dict({n: t for n, t in state.items() if n not in extra})
    for name in extra & set(held):
        copy_(held[name], state[name])


def state_of_ours(
    adapters: Adapters,
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    ranks: Mapping[str, int],
    in_peft_form: bool,
    beside_peft: bool,
) -> dict[str, Tensor]:
    """The state out of the tensors that `save` wrote.

    Args:
        file: named in the error.
        ranks: {module path: rank of its frozen factors in the file}.
        in_peft_form: whether there is a PEFT file, from whose tensors the state is cut.
        beside_peft: whether there is a file of our own beside it.

    Raises:
        ValueError: listing every tensor that is missing, left over or of another shape.
    """
    frozen = {n: ranks.get(n, 0) for n in adapters.layers}
    cuts = places(adapters, frozen) if in_peft_form else {}
    names = set(full_state(adapters))
    names -= {f"{n}.update.frozen_{side}" for n in adapters.layers for side in "AB"}
    names |= {f"{n}.update.frozen_{side}" for n, k in frozen.items() if k for side in "AB"}
    cuts |= {n: Place(n) for n in names if n not in cuts}
    used = {place.key for place in cuts.values()}
    left = [f"{k} belongs to nothing in this model" for k in sorted(set(tensors) - used)]
    if beside_peft:  # factors that are computed are in PEFT's file too; the parameters in our own
        left = [f for f in left if not f.startswith(PREFIX)]
    return _cut(adapters, cuts, tensors, file, left)


def state_of_pefts(
    adapters: Adapters,
    tensors: Mapping[str, Tensor],
    file: Path,
    *,
    left_out: Collection[str] = (),
) -> dict[str, Tensor]:
    """The state out of a file that PEFT wrote; what it doesn't hold stays as `attach` left it.

    Args:
        file: named in the error.
        left_out: keys that it need not hold.

    Raises:
        ValueError: see `state_of_ours`.
    """
    for _, layer in adapters:
        if layer.store.lookup:  # PEFT starts embeddings at zero, whatever the start is
            layer.update.clear_frozen_()
    cuts = places(adapters, dict.fromkeys(adapters.layers, 0))
    cuts = {n: p for n, p in cuts.items() if p.key in tensors or p.key not in left_out}
    live = {n: t for n, t in adapters.state_dict().items() if n not in cuts}
    rows = frozen_rows(adapters, tensors, file)
    left = spare(adapters, tensors, {*rows, *(place.key for place in cuts.values())})
    state = {**live, **_cut(adapters, cuts, tensors, file, left)}
    return {**state, **{name: t for made in rows.values() for name, t in made.items()}}


def _cut(
    adapters: Adapters,
    cuts: Mapping[str, Place],
    tensors: Mapping[str, Tensor],
    file: Path,
    problems: list[str],
) -> dict[str, Tensor]:
    """{name in the state: its part of a file's tensor}.

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
        wrong = (
            "is missing"
            if found is None
            else _misfit(adapters, name, place, found, lengths[place.key], live.get(name))
        )
        if wrong is None:
            state[name] = place.cut(tensors)
        else:
            problems.append(f"{place.key} {wrong}")
    if problems:
        problems = list(dict.fromkeys(problems))
        more = f" (and {len(problems) - 12} more)" if len(problems) > 12 else ""
        raise ValueError(
            f"{file} does not fit this {type(adapters.model).__name__} under"
            f" `{adapters.recipe.text()}`: {'; '.join(problems[:12])}{more}. Load the base that the"
            " adapter was trained on, and the whole file"
        )
    return state


def _misfit(
    adapters: Adapters, name: str, place: Place, found: Tensor, rank: int, live: Tensor | None
) -> str | None:
    """Why a file's tensor can't be what the state has under this name; None: it can."""
    shape = tuple(found.shape)
    if place.axis is not None:
        ranks = rank * max(place.experts, 1)
        if found.ndim != 2 or found.shape[place.rank_axis] != ranks:
            of = f"{rank} for each of {place.experts} experts" if place.experts else f"{rank}"
            return f"is {shape}, of rank {of} expected"
    part = place.cut({place.key: found})
    if ".update.frozen_" in name:
        site, _, side = name.rpartition(".update.frozen_")
        layer = adapters.layers[site]
        axis, size = {"A": (-1, layer.in_features), "B": (-2, layer.out_features)}[side]
        if part.ndim != len(layer.site.shape(1, 1)) or part.shape[axis] != size:
            return f"is {shape}, two dimensions, one of {size} expected"
    elif live is not None and part.shape != live.shape:
        return f"is {shape} instead of {tuple(live.shape)}"
    if live is not None and part.is_floating_point() != live.is_floating_point():
        return f"is of {part.dtype}, of {live.dtype} expected"
    return None


def not_finite(tensors: Mapping[str, Tensor], trained_in_full: set[str]) -> list[str]:
    """The tensors with values that no adapter has: infinities, and not-a-number.

    Args:
        trained_in_full: keys of modules that train in full. Their buffers may hold infinities (a
            mask), so they are looked through for not-a-number alone.
    """
    return [
        name
        for name, t in tensors.items()
        if t.is_floating_point()
        and (bool(t.isnan().any()) if name in trained_in_full else not all_finite(t))
    ]
