"""Which modules an update adapts: names, a regular expression, or `all-linear`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lorica.interfaces import Site
from lorica.methods.optional import BuildsOtherRank
from lorica.model.bases.base import AbstractBase, base_for
from lorica.model.layer import AdaptedLinear
from lorica.patterns import Endless, flaw, matching
from lorica.recipe.recipe import Recipe
from lorica.tensors.linalg import all_finite
from lorica.tensors.modules import named_modules
from lorica.text import shorten


@dataclass
class Targets:
    """What was matched, and what stays as it is."""

    # path -> how its weight is stored
    layers: dict[str, type[AbstractBase]] = field(default_factory=dict[str, type[AbstractBase]])
    saved: list[str] = field(default_factory=list[str])  # modules that train in full
    # weight matrices left out -> elements
    unadapted: dict[str, int] = field(default_factory=dict[str, int])
    # adapted path -> another path of its weight
    tied: dict[str, str] = field(default_factory=dict[str, str])


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, of a transformers model that has one."""
    if not isinstance(model, PreTrainedModel):
        return None
    get: Callable[[], nn.Module | None] = model.get_output_embeddings
    return get()


def head_names(model: nn.Module) -> set[str]:
    """Paths of the head: the output embeddings, and what a transformers model has outside its
    backbone."""
    if not isinstance(model, PreTrainedModel):
        return set()
    names = {id(m): n for n, m in named_modules(model)}
    outputs = output_embeddings(model)
    heads = {names[id(outputs)]} if id(outputs) in names else set[str]()
    backbone = model.base_model
    if backbone is not model:
        root = names[id(backbone)]
        heads |= {n for n in names.values() if n and not _within(n, [root])}
    return heads


def fresh_modules(model: nn.Module) -> list[str]:
    """Topmost modules of which no parameter came from the checkpoint the model was loaded from.

    transformers marks every parameter that it loads; in a model made from a configuration nothing
    is marked, and nothing counts as fresh. Nor does an output layer that `resize_token_embeddings`
    made anew: it holds the checkpoint's rows.
    """
    marked = {n: "_is_hf_initialized" in vars(p) for n, p in model.named_parameters()}
    if all(marked.values()) or not any(marked.values()):
        return []
    resized = _resized_head(model)
    found: list[str] = []
    for name, module in named_modules(model):
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters()]
        own = [n for n in own if n in marked]
        if module is resized or not name or not own or _within(name, found):
            continue
        if not any(marked[n] for n in own):
            found.append(name)
    return found


def _resized_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings, where they were made after the checkpoint was loaded: loading leaves
    every module in evaluation mode, and a new one is in training mode."""
    head = output_embeddings(model)
    return head if head is not None and head.training and not model.training else None


def matches(pattern: str, path: str) -> bool:
    """PEFT's rule for a name in a list: `path` is it, or ends in it on whole components."""
    return path == pattern or path.endswith("." + pattern)


def _select(spec: str | tuple[str, ...], paths: Iterable[str], what: str) -> list[str]:
    paths = list(paths)
    if isinstance(spec, str):
        if (why := flaw(spec)) is not None:
            raise ValueError(
                f"`{what}={shorten(spec)}` is no regular expression ({why}); a list of names is "
                "written as a list"
            )
        try:
            found = matching(spec, paths)
        except Endless as error:
            raise ValueError(f"`{what}`: {error}") from None
        if not found:
            rule = "one string is a regular expression for whole paths; names are given as a list"
            raise ValueError(_nothing(what, spec, paths, rule))
        return found
    for pattern in spec:
        if not any(matches(pattern, p) for p in paths):
            raise ValueError(_nothing(what, pattern, paths, "a name ends a module path"))
    return [p for p in paths if any(matches(pattern, p) for pattern in spec)]


def _nothing(what: str, pattern: str, paths: list[str], rule: str) -> str:
    endings = sorted({p.rsplit(".", 1)[-1] for p in paths if not p.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], endings, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    where = "of the targets" if what == "exclude_modules" else "of the model"
    return (
        f"`{what}`: {pattern!r} matches no module {where} ({rule}). {hint}"
        f"Modules there end in: {', '.join(endings)}"
    )


def find(
    model: nn.Module,
    *,
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...] | None,
    layers_to_transform: tuple[int, ...] | None,
    modules_to_save: tuple[str, ...],
    wraps: bool = True,
) -> Targets:
    """Resolve the target options against a model.

    Raises:
        ValueError: a pattern that matches nothing, a module that cannot be adapted, an overlap
            between what is adapted and what trains in full.
    """
    modules = {n: m for n, m in named_modules(model) if n}
    inside = _owned_by_attention(model)
    out = Targets()
    for pattern in modules_to_save:
        found = [n for n in modules if matches(pattern, n)]
        if not found:
            raise ValueError(
                _nothing("modules_to_save", pattern, list(modules), "a name ends a path")
            )
        if not any(True for n in found for _ in modules[n].parameters()):
            raise ValueError(
                f"`modules_to_save`: {pattern!r} matches {', '.join(found)}, where no parameter is"
                " that could train; leave it out"
            )
        out.saved += [n for n in found if n not in out.saved]
    out.saved = [n for n in out.saved if not any(n.startswith(o + ".") for o in out.saved)]

    served = {
        n: b for n, m in modules.items() if (b := base_for(m)) is not None and n not in inside
    }
    if target_modules == "all-linear":
        heads = head_names(model)
        chosen = [
            n
            for n, b in served.items()
            if not b.lookup and n not in heads and not _within(n, out.saved)
        ]
        if not chosen and wraps:
            raise ValueError(
                "`target_modules='all-linear'` finds no linear layer in this model; "
                f"its modules: {sorted({type(m).__name__ for m in modules.values()})}"
            )
    else:
        chosen = _select(target_modules, modules, "target_modules")
        if wraps:
            # A name may also match containers; only what can't be adapted and isn't a container is
            # an error.
            for n in [n for n in chosen if n not in served]:
                m = modules[n]
                if next(m.children(), None) is None or not any(_within(c, [n]) for c in served):
                    raise ValueError(_unsupported(n, m, inside.get(n)))
            chosen = (
                [n for n in chosen if n in served] if isinstance(target_modules, tuple) else chosen
            )
            if bad := [n for n in chosen if n not in served]:
                raise ValueError(_unsupported(bad[0], modules[bad[0]], inside.get(bad[0])))
    if exclude_modules is not None:
        excluded = set(_select(exclude_modules, chosen, "exclude_modules"))
        chosen = [n for n in chosen if n not in excluded]
    if layers_to_transform is not None:
        index = {n: _block(n) for n in chosen}
        for i in layers_to_transform:
            if i not in index.values():
                have = sorted({v for v in index.values() if v is not None})
                raise ValueError(
                    f"`layers_to_transform`: no target module in block {i}; blocks: {have}"
                )
        chosen = [n for n in chosen if index[n] in layers_to_transform]
    if not chosen and wraps:
        raise ValueError(
            "no module is left to adapt after `exclude_modules`; widen `target_modules` or leave"
            " fewer modules out"
        )
    for n in chosen:
        if wraps and _within(n, out.saved):
            raise ValueError(
                f"{n!r} is both a target and within `modules_to_save`: it would train twice. "
                "Leave it out of one of the two"
            )
        if n in served:
            if wraps and (reason := served[n].refuses(modules[n])) is not None:
                raise ValueError(
                    f"{n!r} cannot be adapted: {reason}; leave it out with `exclude_modules`"
                )
            out.layers[n] = served[n]
        elif not wraps:
            out.layers[n] = AbstractBase  # trains itself; never presented as a matrix
    _fill_rest(model, out)
    return out


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(path == r or path.startswith(r + ".") for r in roots)


def _block(path: str) -> int | None:
    """Index of the transformer block: the first number in the path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _owned_by_attention(model: nn.Module) -> dict[str, str]:
    """Layers whose weight torch's fused attention, or an encoder layer's fast path, reads directly,
    past any adapter -> the class that does so."""
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    owners = {n: type(m).__name__ for n, m in named_modules(model) if isinstance(m, kinds)}
    paths = [n for n, _ in named_modules(model) if n]
    return {n: k for n in paths for o, k in owners.items() if not o or n.startswith(o + ".")}


def _unsupported(name: str, module: nn.Module, inside: str | None) -> str:
    why = (
        f"torch.nn.{inside} reads its weight past any adapter"
        if inside
        else f"it is a {type(module).__module__}.{type(module).__name__}"
    )
    return (
        f"`target_modules` matches {name!r}, which cannot be adapted: {why}. Allowed: nn.Linear,"
        " transformers' Conv1D, nn.Embedding; narrow the pattern or add it to `exclude_modules`"
    )


def _fill_rest(model: nn.Module, out: Targets) -> None:
    """Matrices that stay frozen, and adapted weights that another module shares."""
    places: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, p in parameters.items():
        places.setdefault(id(p), []).append(name)
    for names in places.values():
        owners = [n.rpartition(".")[0] for n in names]
        adapted = [o for o in owners if o in out.layers or _within(o, out.saved)]
        if not adapted and parameters[names[0]].ndim >= 2:
            out.unadapted[" = ".join(names)] = parameters[names[0]].numel()
        for owner in adapted if len(owners) > 1 else []:
            out.tied[owner] = next(o for o in owners if o != owner)


def refuse(model: nn.Module, recipe: Recipe, targets: Targets) -> None:
    """What the targets and the recipe together rule out.

    Raises:
        ValueError: a base that lacks what the recipe needs, a token-id input, an offloaded or
            sharded weight.
    """
    delta = recipe.delta
    for name, kind in targets.layers.items():
        if kind is AbstractBase:
            continue
        recipe.check(kind.gives)
        if delta.wraps and kind.lookup and "lookup" not in recipe.given():
            word = next((c.name for c in recipe.choices if "lookup" in c.withdraws), delta.name)
            raise ValueError(
                f"{name!r} is an embedding, whose input is a token id; `{word}` needs an"
                " input vector. Leave it out of `target_modules`"
            )
        if delta.wraps and name in targets.tied and "base_unchanged" not in recipe.given():
            words = [c.name for c in recipe.choices if "base_unchanged" in c.withdraws]
            word = [*words, "train_rest"][0]
            raise ValueError(
                f"{name!r} shares its weight with {targets.tied[name]!r}, and `{word}` writes to it"
                " during training, which would change both; leave it out of `target_modules`"
            )
    if not delta.wraps and "r" in recipe.takes:
        assert recipe.r is not None  # filled where it is taken
        kinds = {n: k for n, k in targets.layers.items() if k is not AbstractBase}
        stores = {n: kind(model.get_submodule(n)) for n, kind in kinds.items()}
        check_ranks(
            recipe, {n: (s.out_features, s.in_features, recipe.r) for n, s in stores.items()}
        )
    layers = {name: model.get_submodule(name) for name in targets.layers}
    for name, layer in layers.items():
        if _offloaded(layer):
            raise ValueError(
                f"the weight of {name!r} is offloaded (Accelerate brings it to the device for the"
                " layer's own forward alone), so no update could be computed with it. Load the"
                " model without offloading, or leave such layers out with `exclude_modules`"
            )
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            raise ValueError(
                f"{name!r} is sharded already, so an adapter beside it would train alone on every"
                " process; attach first, shard then"
            )


def refuse_not_finite(model: nn.Module, names: Iterable[str]) -> None:
    """A start, and every step, would be made of a base that holds no numbers.

    Raises:
        ValueError: naming the first of the modules with a value that is not finite.
    """
    for name in names:
        for kind, p in model.get_submodule(name).named_parameters(recurse=False):
            if not (p.is_meta or isinstance(p, DTensor)) and not all_finite(p):
                raise ValueError(
                    f"the model's {name}.{kind} {tuple(p.shape)} holds values that are not finite,"
                    " so nothing could be trained on it: the training that made it had diverged, or"
                    " its file was changed. Load an earlier checkpoint, or the file from where it"
                    " came"
                )


def _offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps the module's weight elsewhere between its forwards."""
    hook: object | None = vars(module).get("_hf_hook")
    if hook is None:
        return False
    hooks: Sequence[object] = vars(hook).get("hooks", (hook,))
    return any(vars(h).get("offload") for h in hooks)


def refuse_idle(layer: AdaptedLinear, recipe: Recipe) -> None:
    """A layer whose frozen factor starts at zero would never learn.

    Raises:
        ValueError: naming the layer and the choice that freezes.
    """
    for group in recipe.groups:
        for _, p, role in layer.trained():
            if role in group.freezes and not p.is_meta and not p.any():
                raise ValueError(
                    f"`{group.name}` freezes the {role} of {layer.site.name!r}, which starts at"
                    " zero there, so nothing of it would train; leave it out of `target_modules`"
                )


def check_ranks(recipe: Recipe, sites: Mapping[str, tuple[int, int, int]]) -> None:
    """Ranks fit their layers.

    Args:
        sites: path -> (out, in, r).

    Raises:
        ValueError: a rank above min(in, out), or at it where a choice needs one below.
    """
    below = [c.name for c in recipe.choices if c.below_full]
    most_there = {
        n: largest - bool(below)
        for n, (out, wide, _) in sites.items()
        if (largest := recipe.delta.most_r(wide, out)) is not None
    }
    bad = {n: f"{n} ({o} x {i})" for n, (o, i, r) in sites.items() if r > most_there.get(n, r)}
    if bad:
        assert recipe.r is not None  # filled where it is taken
        what = f"not below (as `{below[0]}` needs)" if below else "larger than"
        some = ", ".join([*bad.values()][:4]) + (", ..." if len(bad) > 4 else "")
        # A layer's rank may be a part or a multiple of the recipe's.
        most = max(1, min(most_there[n] * recipe.r // sites[n][2] for n in bad))
        by = ", a smaller one there through `rank_pattern`" * ("rank_pattern" in recipe.takes)
        raise ValueError(
            f"`r={recipe.r}` is {what} min(in, out) of {len(bad)} layer(s): {some}. Give at most"
            f" `r={most}`{by}, or leave those layers out with `exclude_modules`"
        )


def sites_of(
    model: nn.Module, recipe: Recipe, targets: Targets, dtype: torch.dtype, *, any_rank: bool,
    ranks: Mapping[str, tuple[int, float | None]] | None = None, as_built: bool = False,
) -> dict[str, Site]:  # fmt: skip
    """Where each adapter will be: sizes, rank and scale of every target.

    Args:
        any_rank: let ranks above the layers' pass, for a caller whose file decides.
        ranks: {module path: (rank, alpha)}; default: the recipe's choice of ranks decides.
        as_built: `ranks` are what the layers are built with, not what they shall end with.

    Raises:
        ValueError: see `check_ranks`; `ranks` that lack a target.
    """
    rank, scale, delta = recipe.rank, recipe.scale, recipe.delta
    assert rank is not None and scale is not None  # a delta that wraps meets their needs
    names = list(targets.layers)
    given = dict.fromkeys(names, (0, None))  # the ranks where the delta takes none
    if "r" in recipe.takes:
        given = rank.assign(names, recipe) if ranks is None else ranks
    if missing := [n for n in names if n not in given]:
        raise ValueError(
            f"`ranks` holds nothing for the target {missing[0]!r} ({len(missing)} such layer(s) of"
            f" {len(names)}), and has to name every target; leave those out with `exclude_modules`,"
            " or take the model that the ranks are of"
        )
    built_already = as_built and ranks is not None
    sites: dict[str, Site] = {}
    for name in names:
        store = targets.layers[name](model.get_submodule(name))
        r, alpha = given[name]
        wide = torch.promote_types(store.parameter.dtype, dtype)
        site = Site(
            name, store.in_features, store.out_features, r, scale.factor(alpha, r),
            store.lookup, wide if wide is torch.float64 else dtype, store.parameter.device,
            store.bias() is not None,
        )  # fmt: skip
        built = r
        if isinstance(delta, BuildsOtherRank) and not built_already:
            built = delta.built_rank(site, recipe)
        if built != r:
            site = dataclasses.replace(site, r=built, scale=scale.factor(alpha, built))
        sites[name] = site
    if not any_rank:
        check_ranks(recipe, {n: (s.out_features, s.in_features, s.r) for n, s in sites.items()})
    return sites
