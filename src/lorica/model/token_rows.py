"""New tokens: rows of the embedding, and of the layer that gives the logits, train while the rest
of the table stays frozen.

    W'[tᵢ] = rowsᵢ for the tokens t₁ < ... < tₙ that train, W'[t] = W[t] elsewhere
    W (V, d), rows (n, d)

The rows are values, not differences to W: what W holds there, which after
`resize_token_embeddings` is random, takes no part in the result. So it is left out of the base's
hash too, and another process may have drawn it differently.

The list form means the input embeddings and the output embeddings; PEFT's means the input
embeddings alone where the two are not tied, so a file names both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorica.model.heads import output_embeddings, within
from lorica.model.module_hooks import share_hooks
from lorica.model.targets import Targets, matches
from lorica.recipe.recipe import Recipe
from lorica.tensors.modules import named_modules

logger = logging.getLogger("lorica")


class TokenRows(nn.Module):
    """An embedding or a linear layer, of which some rows train. Takes the place of `base`.

    Args:
        base: the original; stays as it is.
        indices: token ids of the rows, ascending.
        dtype: of the rows.
        like: another module whose weight is tied with this one's, and whose rows this one uses.
        alone: modules outside share the base's weight, so merging unties this one.
    """

    indices: Tensor  # (n,) int64, ascending

    def __init__(
        self, base: nn.Module, indices: Sequence[int], dtype: torch.dtype, *,
        like: TokenRows | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base = base
        self.alone = alone
        self.disabled = False
        table = base.get_parameter("weight")
        self.lookup = isinstance(base, nn.Embedding)
        # A buffer that no checkpoint holds: a frozen parameter would be cast by mixed precision.
        where = torch.tensor(indices, device=table.device)
        self.register_buffer("indices", where, persistent=False)
        self.tokens = (*indices,)
        self.owner = like is None
        wide = torch.float64 if table.dtype is torch.float64 else dtype
        own = table.detach()[where].to(wide, copy=True) if like is None else None
        self.rows = nn.Parameter(own) if own is not None else like.rows  # type: ignore[union-attr]
        pad = getattr(base, "padding_idx", None)
        self.pad = indices.index(pad) if pad in indices else None  # torch never trains that row
        # A subclass may scale what it looks up, so it computes with the whole table itself.
        self.plain = type(base).forward in (nn.Embedding.forward, nn.Linear.forward)
        if self.plain:  # else the hooks run where the base is called, on what it returns
            share_hooks(base, self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # Any: what the original takes
        call: Callable[..., Tensor] = self.base.forward if self.plain else self.base
        if self.disabled:
            return call(*args, **kwargs)
        if not self.plain:
            return torch.func.functional_call(self.base, {"weight": self.weight}, args, kwargs)
        (x,) = (*args, *kwargs.values())
        y = call(x)
        return self._looked_up(x, y) if self.lookup else self._with_logits(x, y)

    def _looked_up(self, ids: Tensor, y: Tensor) -> Tensor:
        at, own = self._find(ids)
        new = F.embedding(at, self.rows, padding_idx=self.pad).to(y.dtype)  # (..., d)
        return torch.where(own[..., None], new, y)

    def _with_logits(self, x: Tensor, y: Tensor) -> Tensor:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        new = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.indices])
        return y.index_copy_(-1, self.indices, new.to(y.dtype))  # y (..., V) is used only here

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token id, its place among the rows, and whether it has one."""
        ids = ids.to(self.indices.dtype).contiguous()
        at = torch.searchsorted(self.indices, ids).clamp_max(len(self.indices) - 1)
        return at, self.indices[at] == ids

    def reached(self, x: Tensor) -> bool:
        """Whether an input has a token that trains."""
        return bool(self._find(x)[1].any()) if self.lookup else x.numel() > 0

    @property
    def weight(self) -> Tensor:
        """The table (V, d) that this module computes with, in the base's dtype."""
        table = self.base.get_parameter("weight")
        return table if self.disabled else self._filled(table)

    def _filled(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.indices, self.rows.to(table.dtype))

    def trained(self) -> list[tuple[str, nn.Parameter, str]]:
        """(name, parameter, role); nothing where another module's rows are used."""
        return [("rows", self.rows, "module")] if self.owner else []

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain module, with the rows in its table."""
        table = self.base.get_parameter("weight")
        if self.alone:
            self.base.register_parameter("weight", nn.Parameter(self._filled(table)))
        else:  # in place, for tied modules share the parameter
            table.data = self._filled(table)
        return self.base

    def __getattr__(self, name: str) -> Any:  # Any: of the original
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        return f"tokens={shown(self.tokens)}"


@dataclass(frozen=True)
class Table:
    """Modules that share rows, and the tokens of these.

    Attributes:
        paths: in model order.
        alone: other modules share the weight, and keep its rows.
    """

    paths: tuple[str, ...]
    indices: tuple[int, ...]
    alone: bool


def embedding_paths(model: nn.Module) -> list[str]:
    """Paths of the input embeddings and of the output embeddings, where a transformers model has
    them; adapted or not."""
    if not isinstance(model, PreTrainedModel):
        return []
    get: Callable[[], nn.Module | None] = model.get_input_embeddings
    try:
        found = [get(), output_embeddings(model)]
    except NotImplementedError:  # a model that reads no tokens
        return []
    names = {id(m): n for n, m in named_modules(model)}
    return [names[id(m)] for m in found if m is not None and id(m) in names]


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter `weight` of a module, where it has one."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False)).get("weight")


def vocabulary_tables(model: nn.Module) -> list[str]:
    """The same of a plain model, of tied ones the first alone."""
    tables: dict[int, str] = {}
    for path in embedding_paths(model):
        weight = own_weight(model.get_submodule(path))
        if weight is not None:
            tables.setdefault(id(weight), path)
    return [*tables.values()]


def find_tables(model: nn.Module, recipe: Recipe, targets: Targets) -> list[Table]:
    """Which rows of which modules train, resolved against a model.

    Raises:
        ValueError: a name that matches nothing, a module that is no table, a token beyond it, or a
            table that trains otherwise too.
    """
    wanted = recipe.trainable_token_indices
    if wanted is None:
        return []
    modules = {n: m for n, m in named_modules(model) if n}
    named = _by_list(model, wanted, targets) if isinstance(wanted, tuple) else {}
    for name, indices in wanted.items() if isinstance(wanted, Mapping) else ():
        found = [n for n in modules if matches(name, n)]
        if not found:
            raise ValueError(
                f"`trainable_token_indices`: {name!r} matches no module of this"
                f" {type(model).__name__} (a name ends a module path); its tables of tokens are"
                f" {_listed(vocabulary_tables(model))}"
            )
        named |= dict.fromkeys(found, indices)
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        if (weight := own_weight(module)) is not None:
            users.setdefault(id(weight), []).append(name)
    inputs = vocabulary_tables(model)[:1]
    tables: list[Table] = []
    for name, indices in named.items():
        _check_table(name, modules[name], indices, targets)
        sharing = users[id(modules[name].weight)]
        # As in PEFT: what is tied follows the input embeddings, unless it is named otherwise.
        group = [
            n for n in sharing if n == name or (name in inputs and named.get(n, indices) == indices)
        ]
        if any(name in t.paths for t in tables):
            continue
        for other in group:
            if other in targets.layers:
                raise ValueError(
                    f"{other!r} is a target and shares its weight with {name!r}, of which rows"
                    " train by `trainable_token_indices`: it would not compute with these. Leave"
                    f" {other!r} out of `target_modules`"
                )
        group = [n for n in group if not within(n, targets.saved)]
        tables.append(Table(tuple(group), indices, len(group) < len(sharing)))
    return tables


def _by_list(
    model: nn.Module, indices: tuple[int, ...], targets: Targets
) -> dict[str, tuple[int, ...]]:
    """The tables that a list of tokens means: those that don't train in another way already.

    Raises:
        ValueError: there are none.
    """
    every = vocabulary_tables(model)
    head = every[1:]
    free = [
        n for n in every if not within(n, targets.saved) and not (n in head and n in targets.layers)
    ]
    if not every:
        raise ValueError(
            f"`trainable_token_indices`: this {type(model).__name__} does not say which of its"
            " modules is the table of token embeddings; name it:"
            " `trainable_token_indices={'path.of.embedding': [...]}`"
        )
    if not free:
        raise ValueError(
            f"`trainable_token_indices` has no effect: {_listed(every)} train in full by"
            " `modules_to_save`; leave one of the two out"
        )
    return dict.fromkeys(free, indices)


def _check_table(name: str, module: nn.Module, indices: tuple[int, ...], targets: Targets) -> None:
    """One module has rows of these tokens that could train.

    Raises:
        ValueError: else.
    """
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        raise ValueError(
            f"`trainable_token_indices`: {name!r} is a {type(module).__name__} and no table of"
            " tokens; allowed: nn.Embedding and nn.Linear (a head)"
        )
    size = len(module.weight)
    if indices[-1] >= size:
        raise ValueError(
            f"`trainable_token_indices` names the token {indices[-1]}, and the table {name!r} has"
            f" {size} rows (0 to {size - 1}). Resize the model first:"
            f" `model.resize_token_embeddings({indices[-1] + 1})`"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"`trainable_token_indices`: {name!r} has `max_norm`, which rewrites the table in every"
            " forward, so no frozen rows exist; name it in `modules_to_save`"
        )
    where = "target_modules" if name in targets.layers else "modules_to_save"
    if name in targets.layers or within(name, targets.saved):
        raise ValueError(
            f"{name!r} is named by `trainable_token_indices` and by `{where}`: its rows would train"
            " twice. Leave it out of one of the two"
        )


def build_tables(
    model: nn.Module, tables: Iterable[Table], dtype: torch.dtype
) -> dict[str, TokenRows]:
    """{module path: what takes its place}, in model order within each table."""
    out: dict[str, TokenRows] = {}
    for table in tables:
        first: TokenRows | None = None
        for path in table.paths:
            out[path] = TokenRows(
                model.get_submodule(path), table.indices, dtype, like=first, alone=table.alone
            )
            first = first or out[path]
    return out


def untrained(model: nn.Module, tables: Iterable[Table], trained: Iterable[str]) -> str | None:
    """What there is to say of rows above the vocabulary that the model's checkpoint has, and that
    would stay as `resize_token_embeddings` drew them; None: there are none, or it is unknown.

    Args:
        trained: paths of modules that train in full.
    """
    if not isinstance(model, PreTrainedModel) or (came := _checkpoint_vocabulary(model)) is None:
        return None
    roots = [*trained]
    covered: dict[str, set[int]] = {p: {*t.indices} for t in tables for p in t.paths}
    for path in vocabulary_tables(model):
        size = len(model.get_submodule(path).get_parameter("weight"))
        left = sorted({*range(came, size)} - covered.get(path, set()))
        if left and not within(path, roots):
            return (
                f"{path} has {size:,} rows, {size - came:,} more than its checkpoint, and"
                f" {len(left):,} of these ({shown(left)}) stay as they are now, untrained. If they"
                f" are new tokens, train them: `trainable_token_indices=list(range({left[0]},"
                f" {left[-1] + 1}))`"
            )
    return None


def _checkpoint_vocabulary(model: PreTrainedModel) -> int | None:
    """Size of the vocabulary in the configuration that the model was loaded with, where it is on
    this machine."""
    config: Any = model.config  # Any: each model's own class
    kind: Any = config.__class__
    if not config.name_or_path:
        return None
    try:
        came: Any = kind.from_pretrained(config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
    return getattr(came.get_text_config(), "vocab_size", None)


def shown(indices: Sequence[int]) -> str:
    """Token ids for people, runs of them as `a to b`.

    Example:
        >>> shown([3, 7, 8, 9])
        '3, 7 to 9'
    """
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1] = [runs[-1][0], i]
        else:
            runs.append([i])
    parts = [str(r[0]) if r[0] == r[-1] else f"{r[0]} to {r[-1]}" for r in runs]
    return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names)) or "none"
