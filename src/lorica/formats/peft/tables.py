"""The tables of tokens in a file of PEFT's: rows that trained, and whole tables.

PEFT stores rows as `<path>.token_adapter.trainable_tokens_delta` (n, d), in the order of the
configuration's `trainable_token_indices`. A model that was resized has its whole tables in the
file, though they never trained. They are read as the rows in which they differ from the model's
own: resizing drew new rows at random in both, and the base keeps its bytes. Where the table itself
has an adapter (`<path>.base_layer.weight`), the difference D of k rows is frozen beside it,

    W_file = W + s·B₀A₀,  a head: A₀ = D/s (k, in), B₀ (out, k) one-hot;  an embedding: the reverse
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.formats.peft.config import Config
from lorica.formats.peft.names import in_full, plain_modules, trained_names
from lorica.formats.peft.places import PREFIX, rows_key
from lorica.model.adapters import Adapters
from lorica.model.token_rows import TokenRows, embedding_paths, own_weight
from lorica.tensors.dtensor_ops import read_full
from lorica.tensors.linalg import ints
from lorica.text import shorten


class Tables(NamedTuple):
    """What a file of PEFT's holds of tables.

    Attributes:
        rows: {module path: (token ids, ascending; their rows (n, d))}.
        in_full: modules that train in full.
        rest: the other tensors of the file.
    """

    rows: dict[str, tuple[tuple[int, ...], Tensor]]
    in_full: list[str]
    rest: dict[str, Tensor]


@torch.no_grad()
def tables_of(model: nn.Module, data: Config, tensors: Mapping[str, Tensor], file: Path) -> Tables:
    """Resolve a file's tables on a model, adapted or not.

    Raises:
        ValueError: a table of another size, rows that don't fit the configuration, a name that
            means no module.
    """
    modules = plain_modules(model)
    # Of images, the "input embeddings" are a module of several layers.
    own = [p for p in embedding_paths(model) if own_weight(modules[p]) is not None]
    saved = in_full(data.get("modules_to_save") or (), modules)
    named = _named(modules, own, data, file)
    rest, tied = dict(tensors), list[str]()
    rows: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for path in dict.fromkeys([*named, *own]):
        key = f"{PREFIX}{path}"
        whole = rest.get(f"{key}.weight")
        if path in saved:
            continue
        if whole is None:
            whole = _of_tied(path, own, modules, rest, file)
        if whole is not None and data.get("ensure_weight_tying") and {*saved} & {*own}:
            tied.append(path)  # with one that trains in full
            continue
        rest.pop(f"{key}.weight", None)
        inner = rest.pop(f"{key}.token_adapter.base_layer.weight", None)
        trained = rest.pop(rows_key(path), None)
        whole = inner if whole is None else whole
        # What is tied follows the input embeddings.
        ids = named.get(path, named.get(own[0], ()) if own and trained is not None else ())
        table = read_full(modules[path].get_parameter("weight")).cpu()
        found: dict[int, Tensor] = {}
        if whole is not None:
            if whole.shape != table.shape:
                raise ValueError(_other_size(file, path, whole, table))
            found |= {i: whole[i] for i in ints(_changed(whole, table))}
        if trained is not None:
            if trained.shape != (len(ids), table.shape[1]):
                raise ValueError(
                    f"{file}: {rows_key(path)} is {tuple(trained.shape)}, and"
                    f" `trainable_token_indices` names {len(ids)} tokens, of {table.shape[1]}"
                    " values each. Copy the folder again from where it came"
                )
            found |= dict(zip(ids, trained, strict=True))
        if found:
            order = tuple(sorted(found))
            rows[path] = order, torch.stack([found[i] for i in order])
    return Tables(rows, saved + tied, rest)


def _changed(whole: Tensor, table: Tensor) -> Tensor:
    """The rows (k,) in which two tables differ by more than a rounding to the other's dtype."""
    changed = (whole.to(table.dtype) != table) & (whole != table.to(whole.dtype))
    return changed.any(1).nonzero()[:, 0]


def _of_tied(
    path: str, own: Iterable[str], modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor],
    file: Path,
) -> Tensor | None:  # fmt: skip
    """The table in the file of an adapted module whose weight is this one's, too.

    Raises:
        ValueError: it is the head, and the input embeddings, which decide over tied rows, have no
            adapter.
    """
    weight = own_weight(modules[path])
    for other in own:
        held = rest.get(f"{PREFIX}{other}.base_layer.weight")
        if other == path or held is None or own_weight(modules[other]) is not weight:
            continue
        if f"{PREFIX}{path}.base_layer.weight" in rest:
            return None  # it has an adapter itself
        table = modules[path].get_parameter("weight").detach()
        fits = table.shape == held.shape
        if fits and len(_changed(held, table)) and path == next(iter(own)):
            raise ValueError(
                f"{file}: it holds new rows of the table that {other!r} shares with {path!r}, and"
                f" an adapter of {other!r} alone. Load it on a model whose tables are not tied"
            )
        return held
    return None


@torch.no_grad()
def frozen_rows(
    adapters: Adapters, tensors: Mapping[str, Tensor], file: Path
) -> dict[str, dict[str, Tensor]]:
    """{key in the file: the state that it makes} of the tables of tokens that have an adapter
    and differ from the model's own in some rows.

    Raises:
        ValueError: a table of another size.
    """
    out: dict[str, dict[str, Tensor]] = {}
    modules = plain_modules(adapters.model)
    for path in embedding_paths(adapters.model):
        layer, key = adapters.layers.get(path), f"{PREFIX}{path}.base_layer.weight"
        if layer is None or key not in tensors or layer.update.frozen_factors is not None:
            continue
        whole, table = tensors[key], read_full(modules[path].get_parameter("weight")).cpu()
        if whole.shape != table.shape:
            raise ValueError(_other_size(file, path, whole, table))
        rows = _changed(whole, table)
        if not 0 < len(rows) * sum(table.shape) <= table.numel():
            continue  # the same base, or another one: its factors would be larger than the table
        difference = (whole[rows].double() - table[rows].double()) / layer.update.delta.scale
        which = F.one_hot(rows, len(table)).to(difference.dtype)  # (k, V)
        A, B = (which, difference.T) if layer.site.lookup else (difference, which.T)
        own = {"A": A.to(layer.site.dtype), "B": B.to(layer.site.dtype)}
        out[key] = {f"{path}.update.frozen_{side}": X for side, X in own.items()}
    return out


def _named(
    modules: Mapping[str, nn.Module], own: list[str], data: Config, file: Path
) -> dict[str, tuple[int, ...]]:
    """{module path: token ids as PEFT would train them, in the file's order}."""
    given = data.get("trainable_token_indices") or ()
    if not isinstance(given, Mapping):
        given = {own[0] if own else "embed_tokens": given} if given else {}
    out: dict[str, tuple[int, ...]] = {}
    for name, ids in given.items():
        found = [n for n in modules if n.endswith(name)]
        if not found:
            raise ValueError(
                f"{file}: `trainable_token_indices` names {shorten(name)}, which is no module of"
                " this model. Load the model that the adapter is for"
            )
        out |= dict.fromkeys(found, tuple(ids))
    return out


def _other_size(file: Path, path: str, whole: Tensor, table: Tensor) -> str:
    if whole.ndim == 2 and whole.shape[1] == table.shape[1]:
        return (
            f"{file}: it holds the whole table {path!r} of a vocabulary of {len(whole):,}, and this"
            f" model's has {len(table):,} rows: it was resized before training. Resize this one"
            f" too, `model.resize_token_embeddings({len(whole)})`, and load again"
        )
    return (
        f"{file}: it holds a table {path!r} of shape {tuple(whole.shape)}, and this model's is"
        f" {tuple(table.shape)}. Load the model that the adapter is for"
    )


def with_rows(adapters: Adapters, tables: Tables, file: Path) -> dict[str, Tensor]:
    """The file's tensors, with the rows where `places` looks for them.

    Raises:
        ValueError: tied tables of which the file holds different rows.
    """
    out = dict(tables.rest)
    owners = {id(t.rows): n for n, t in adapters.tables.items() if t.owner}
    for path, (_, rows) in tables.rows.items():
        owner = owners[id(adapters.tables[path].rows)]
        if not torch.equal(out.setdefault(rows_key(owner), rows), rows):
            raise ValueError(
                f"{file}: {owner!r} and {path!r} share one table in this model, and the file holds"
                " different rows for them. Load the adapter on a model whose tables are not tied"
            )
    return out


def indices_of(adapters: Adapters) -> list[int] | dict[str, list[int]] | None:
    """`trainable_token_indices` under which PEFT trains the same rows.

    Raises:
        LookupError: why there is none.
    """
    if not adapters.tables:
        return None
    model, modules = adapters.model, plain_modules(adapters.model)
    config = vars(model).get("config")
    ties = bool(getattr(config, "tie_word_embeddings", False))
    own = embedding_paths(model)[:1]
    groups: dict[int, list[str]] = {}
    for path, table in adapters.tables.items():
        groups.setdefault(id(table.rows), []).append(path)
        if _bias(table):
            raise LookupError(f"PEFT's form of trained rows has no bias, and {path!r} has one")
    shared = {id(modules[p].get_parameter("weight")) for paths in groups.values() for p in paths}
    users = [n for n, m in modules.items() if id(own_weight(m)) in shared]
    for paths in groups.values():
        first = paths[0]
        if len(paths) > 1 and not (ties and first in own):
            raise LookupError(
                f"{' and '.join(paths)} share rows, and PEFT ties only what"
                " `tie_word_embeddings` in the model's configuration ties"
            )
        if first in own and adapters.tables[first].alone and {*users} - {*adapters.tables}:
            raise LookupError(f"PEFT would tie other modules with the rows of {first!r}")
    indices = {paths[0]: [*adapters.tables[paths[0]].tokens] for paths in groups.values()}
    if [*indices] == own:
        return indices[own[0]]
    names = {path: trained_names([path], modules, ()) for path in indices}
    if ambiguous := [path for path, name in names.items() if name is None]:
        raise LookupError(f"PEFT's names for tables cannot single out {ambiguous[0]!r}")
    return {names[path][0]: ids for path, ids in indices.items()}  # type: ignore[index]


def _bias(table: TokenRows) -> bool:
    return not table.lookup and table.base.bias is not None
