"""Which modules an update adapts: names, a regular expression, or `all-linear`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorica.interfaces import Site
from lorica.methods.optional import BuildsOtherRank
from lorica.methods.ranks.base import first_matches
from lorica.model.bases._quantised import Quantised
from lorica.model.bases.base import AbstractBase, base_for
from lorica.model.bases.experts import ExpertTensor, expert_paths, expert_tensors
from lorica.model.heads import head_names, topmost, within
from lorica.model.layer import AdaptedLayer
from lorica.model.left_out import outside_language_model, read_past
from lorica.model.module_hooks import computed_weight
from lorica.model.quantised import quantised, sizes, unreadable
from lorica.patterns import Endless, flaw, matching
from lorica.recipe.compatibility import check_quantised
from lorica.recipe.recipe import Recipe
from lorica.tensors.linalg import finite_weight
from lorica.tensors.modules import named_modules, named_parameters, unwrapped
from lorica.text import shorten


@dataclass
class Targets:
    """What was matched, and what stays as it is."""

    # path of a module, or of an expert tensor -> how its weight is stored
    layers: dict[str, type[AbstractBase]] = field(default_factory=dict[str, type[AbstractBase]])
    saved: list[str] = field(default_factory=list[str])  # modules that train in full
    # those of them that no option names -> why
    heads: dict[str, str] = field(default_factory=dict[str, str])
    # layers that `all-linear` leaves out -> why
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    # weight matrices left out -> elements
    unadapted: dict[str, int] = field(default_factory=dict[str, int])
    # adapted path -> another path of its weight
    tied: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def places(self) -> list[str]:
        """Paths of the modules that hold the weights of `layers`."""
        return [*dict.fromkeys(kind.place(n) for n, kind in self.layers.items())]


def matches(pattern: str, path: str) -> bool:
    """PEFT's rule for a name in a list: `path` is it, or ends in it on whole components."""
    return path == pattern or path.endswith("." + pattern)


def _select(spec: str | tuple[str, ...], paths: Iterable[str], what: str) -> list[str]:
    paths = list(paths)
    if isinstance(spec, str):
        found = _whole_matches(what, spec, paths)
        if not found:
            rule = "one string is a regular expression for whole paths; names are given as a list"
            raise ValueError(_nothing(what, spec, paths, rule))
        return found
    for pattern in spec:
        if not any(matches(pattern, p) for p in paths):
            raise ValueError(_nothing(what, pattern, paths, "a name ends a module path"))
    return [p for p in paths if any(matches(pattern, p) for pattern in spec)]


def _whole_matches(what: str, spec: str, paths: list[str]) -> list[str]:
    """The paths that a regular expression matches from end to end."""
    if (why := flaw(spec)) is not None:
        raise ValueError(
            f"`{what}={shorten(spec)}` is no regular expression ({why}); a list of names is "
            "written as a list"
        )
    try:
        return matching(spec, paths)
    except Endless as error:
        raise ValueError(f"`{what}`: {error}") from None


def _nothing(what: str, pattern: str, paths: list[str], rule: str) -> str:
    endings = sorted({p.rsplit(".", 1)[-1] for p in paths if not p.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(pattern[-200:].rsplit(".", 1)[-1], endings, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"`{what}`: {shorten(pattern)} matches no module of the model ({rule}). {hint}"
        f"Modules there end in: {', '.join(endings[:40])}{', ...' if len(endings) > 40 else ''}"
    )


def find(
    model: nn.Module,
    *,
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...] | None,
    layers_to_transform: tuple[int, ...] | None,
    modules_to_save: tuple[str, ...],
    target_parameters: tuple[str, ...] | None = None,
    heads: Mapping[str, str] | None = None,
    wraps: bool = True,
    no_experts: str | None = None,
    adapt_towers: bool = False,
    recorded: Collection[str] = (),
) -> Targets:
    """Resolve the target options against a model.

    Args:
        heads: {path: why} of modules that train in full unless an option means them, see
            `lorica.model.heads`: a target is adapted instead, what is excluded stays as it is.
        wraps: the targets get adapters, rather than training themselves.
        no_experts: why the method can't adapt expert tensors; None: it can.
        adapt_towers: `all-linear` takes in what is outside of the language model.
        recorded: layers that a file has; `all-linear` leaves out none of them, and takes in no
            other expert tensors.

    Raises:
        ValueError: a name that matches nothing or that another option takes all effect from; a
            module that cannot be adapted; an overlap between what is adapted and what is to be
            saved.
    """
    modules = {n: m for n, m in named_modules(model) if n}
    inside = _owned_by_attention(model)
    served = {
        n: b for n, m in modules.items() if (b := base_for(m)) is not None and n not in inside
    }
    saved = _to_save(modules, modules_to_save)
    stacks = expert_paths(modules) if wraps else []
    heads = {n: why for n, why in (heads or {}).items() if not within(n, saved)}
    exclusions = _exclusions(exclude_modules, [*modules, *stacks])
    excluded = set[str]().union(*exclusions.values())
    kept = {n: why for n, why in heads.items() if n not in excluded}
    left_out: dict[str, str] = {}
    every = target_modules == "all-linear"
    if every:
        outer = head_names(model)
        chosen = [n for n, b in served.items() if not b.lookup and n not in outer]
        chosen = [n for n in chosen if not within(n, [*saved, *heads])]
        if not chosen and wraps and not stacks:
            raise ValueError(
                "`target_modules='all-linear'` finds no linear layer in this model; "
                f"its modules: {sorted({type(m).__name__ for m in modules.values()})}"
            )
        if wraps:
            left_out = _left_out(model, chosen, adapt_towers=adapt_towers)
            left_out = {n: why for n, why in left_out.items() if n not in recorded}
            chosen = [n for n in chosen if n not in left_out]
    elif target_parameters and not target_modules:
        chosen = []
    else:
        _refuse_stacks(target_modules, stacks)
        chosen = _select(target_modules, modules, "target_modules")
        if wraps:
            chosen = _only_served(chosen, modules, served, inside, by_name=target_modules)
        kept = {n: why for n, why in kept.items() if not _means(target_modules, n, chosen, kept)}
        chosen = [n for n in chosen if not within(n, kept)]
    experts = _chosen_experts(model, target_parameters, stacks, no_experts, every=every)
    if recorded and target_parameters is None:
        experts = [n for n in experts if n in recorded]
    if no_experts is not None:
        left_out |= dict.fromkeys(experts, no_experts)
        experts = []
    if adapt_towers is False and every:
        outside = outside_language_model(model, experts)
        left_out |= {n: why for n, why in outside.items() if n not in recorded}
        experts = [n for n in experts if n not in left_out]
    chosen += [n for n in experts if not within(n, [*saved, *kept])]
    blocks = {n: _block(n) for n in chosen}
    in_blocks = [
        n for n in chosen if layers_to_transform is None or blocks[n] in layers_to_transform
    ]
    left = [n for n in in_blocks if n not in excluded]
    reach = [*in_blocks, *left_out, *heads]
    always = modules if target_modules == "all-linear" else head_names(model)
    _refuse_idle_exclusions(exclusions, reach, chosen, modules, always)
    for i in layers_to_transform or ():
        if not any(blocks[n] == i for n in left):
            have = sorted({b for n in chosen if n not in excluded and (b := blocks[n]) is not None})
            raise ValueError(
                f"`layers_to_transform`: no target module in block {i}; blocks: {have}"
            )
    if not left and wraps:
        raise ValueError(
            "no module is left to adapt after `exclude_modules`; widen `target_modules` or leave"
            " fewer modules out"
        )
    named = {"target_modules": target_modules, "target_parameters": target_parameters or ()}
    for option, patterns in named.items():
        for pattern in patterns if isinstance(patterns, tuple) else ():
            if not any(matches(pattern, n) for n in left):
                before = [n for n in chosen if matches(pattern, n)]
                inside_out = [n for n in before if n in excluded]
                raise ValueError(_idle_target(option, pattern, before, inside_out, modules))
    in_full = set(topmost([*saved, *kept]))
    left_out = {n: why for n, why in left_out.items() if n not in excluded}
    out = Targets(saved=[n for n in modules if n in in_full], heads=kept, left_out=left_out)
    layers = [n for n in left if n not in stacks]
    for n in [n for n, always in read_past(model, layers).items() if always and wraps]:
        owner = type(model.get_submodule(n.rpartition(".")[0])).__name__
        raise ValueError(
            f"{n!r} cannot be adapted: {owner} multiplies with its weight itself and never calls"
            " the layer, so an adapter would not act. Leave it out of `target_modules`"
        )
    for n in left:
        if wraps and within(n, saved):
            raise ValueError(
                f"{n!r} is both a target and within `modules_to_save`: it would train twice. "
                "Leave it out of one of the two"
            )
        if n in stacks:
            out.layers[n] = ExpertTensor
        elif n in served:
            if wraps and (reason := served[n].refuses(modules[n])) is not None:
                raise ValueError(
                    f"{n!r} cannot be adapted: {reason}; leave it out with `exclude_modules`"
                )
            out.layers[n] = served[n]
        elif not wraps:
            out.layers[n] = AbstractBase  # trains itself; never presented as a matrix
    _fill_rest(model, out)
    return out


def _routers(model: nn.Module, layers: list[str]) -> list[str]:
    """Linear layers with an output for each expert of the stacks beside them."""
    counts: dict[str, set[int]] = {}
    for name, module in named_modules(model):
        for leaf in expert_tensors(module):
            counts.setdefault(name.rpartition(".")[0], set()).add(
                module.get_parameter(leaf).shape[0]
            )
    found: list[str] = []
    for name in layers:
        outputs: object = vars(model.get_submodule(name)).get("out_features")
        if any(within(name, [block]) and outputs in sizes for block, sizes in counts.items()):
            found.append(name)
    return found


def _refuse_stacks(target_modules: str | tuple[str, ...], stacks: list[str]) -> None:
    """Expert tensors are parameters, and no modules.

    Raises:
        ValueError: a name in `target_modules` is that of one.
    """
    for pattern in () if isinstance(target_modules, str) else target_modules:
        if found := [n for n in stacks if matches(pattern, n)]:
            raise ValueError(
                f"`target_modules`: {shorten(pattern)} is {found[0]!r}, a parameter that holds a"
                " weight for each expert, and no module; name it in `target_parameters`"
                " (`--target-parameters`)"
            )


def _chosen_experts(
    model: nn.Module, names: tuple[str, ...] | None, stacks: list[str], why: str | None, *,
    every: bool,
) -> list[str]:  # fmt: skip
    """The expert tensors that are meant: all of them beside `all-linear`, unless they are named.

    Raises:
        ValueError: a name that is that of no expert tensor; names, where none can be adapted.
    """
    if names is None:
        return stacks if every else []
    for pattern in names:
        if any(matches(pattern, n) for n in stacks):
            continue
        found = [n for n, p in named_parameters(model) if matches(pattern, n) and p.ndim < 3]
        if found:
            raise ValueError(
                f"`target_parameters`: {shorten(pattern)} is {found[0]!r}, which is no stack of"
                " experts' weights (experts, out, in); a layer is named in `target_modules`"
            )
        raise ValueError(_nothing_there(pattern, stacks))
    if names and why is not None:
        raise ValueError(f"`target_parameters={list(names)}`: {why}; leave it out")
    return [n for n in stacks if any(matches(pattern, n) for pattern in names)]


def _nothing_there(pattern: str, stacks: list[str]) -> str:
    endings = sorted({".".join(n.split(".")[-2:]) for n in stacks})
    there = (
        f"the expert tensors there end in: {', '.join(endings[:20])}"
        if stacks
        else "this model has no expert tensors, parameters (experts, out, in); leave it out"
    )
    near = difflib.get_close_matches(pattern[-200:], endings, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"`target_parameters`: {shorten(pattern)} matches no expert tensor of the model (a name"
        f" ends the path of a parameter). {hint}{there[0].upper()}{there[1:]}"
    )


def _left_out(model: nn.Module, layers: list[str], *, adapt_towers: bool) -> dict[str, str]:
    """{layer that `all-linear` leaves out: why}, but for those that are too thin."""
    out = dict.fromkeys(read_past(model, layers), "its weight is read past the layer")
    out |= dict.fromkeys(_routers(model, layers), "a router, which chooses the experts")
    outside = outside_language_model(model, layers)
    if adapt_towers and not outside:
        raise ValueError(
            f"`adapt_towers=True` has no effect: this {type(model).__name__} has no towers of other"
            " modalities beside a language model; leave it out"
        )
    return out if adapt_towers else {**out, **outside}


def _to_save(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    """Topmost modules that `modules_to_save` means."""
    saved: list[str] = []
    for pattern in names:
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
        saved += [n for n in found if n not in saved]
    return topmost(saved)


def _only_served(
    chosen: list[str], modules: Mapping[str, nn.Module], served: Mapping[str, type[AbstractBase]],
    inside: Mapping[str, str], *, by_name: str | tuple[str, ...],
) -> list[str]:  # fmt: skip
    """Those that can be adapted. A name may match containers as well; what is no container and
    cannot be adapted is an error, and so is all that a regular expression matches beside layers."""
    for n in [n for n in chosen if n not in served]:
        m = modules[n]
        if next(m.children(), None) is None or not any(within(c, [n]) for c in served):
            raise ValueError(_unsupported(n, m, inside.get(n)))
        if isinstance(by_name, str):
            raise ValueError(_unsupported(n, m, inside.get(n)))
    return [n for n in chosen if n in served]


def _exclusions(spec: str | tuple[str, ...] | None, paths: list[str]) -> dict[str, set[str]]:
    """{each pattern of `exclude_modules`: all that it means}: a name in a list means everything
    below it, too."""
    if isinstance(spec, str):
        return {spec: set(_whole_matches("exclude_modules", spec, paths))}
    roots = {pattern: [n for n in paths if matches(pattern, n)] for pattern in spec or ()}
    return {pattern: {n for n in paths if within(n, found)} for pattern, found in roots.items()}


def _refuse_idle_exclusions(
    exclusions: Mapping[str, set[str]], reach: list[str], all_blocks: list[str],
    modules: Mapping[str, nn.Module], always: Container[str],
) -> None:  # fmt: skip
    """Each exclusion leaves something out that would otherwise be adapted or train in full. It may
    also name what nothing would adapt anyway, for what was asked for holds: any module beside
    `all-linear`, which names no layer; beside names, a head or a part that holds others
    ("vision_tower"). A single layer there is most likely a slip.

    Args:
        reach: what would be adapted or train in full, in the blocks that are meant.
        all_blocks: the targets in all blocks.
        always: paths that may be named whatever they hold.
    """
    rule = "a name in a list ends a module path and means all that is below it"
    for pattern, means in exclusions.items():
        if not means:
            raise ValueError(_nothing("exclude_modules", pattern, list(modules), rule))
        if not means.isdisjoint(reach):
            continue
        if not means.isdisjoint(all_blocks):
            raise ValueError(
                f"`exclude_modules`: {pattern!r} has no effect, since `layers_to_transform`"
                " leaves all of that out already; drop it"
            )
        if not any(n in always or next(modules[n].children(), None) is not None for n in means):
            paths = ", ".join(sorted(means)[:3])
            raise ValueError(
                f"`exclude_modules`: {pattern!r} has no effect, since `target_modules` names"
                f" nothing of what it means ({paths}); drop it, or correct one of the two"
            )


def _means(
    spec: str | tuple[str, ...], head: str, chosen: Iterable[str], heads: Mapping[str, str]
) -> bool:
    """Whether `target_modules` asks for a head: it matches the head itself, or nothing outside of
    the heads. (A "dense" of the encoder's layers does not mean that of the head.)"""
    if isinstance(spec, str):
        found = [n for n in chosen if within(n, [head])]
        return head in found or bool(found) and all(within(n, heads) for n in chosen)
    for pattern in spec:
        found = [n for n in chosen if matches(pattern, n)]
        if any(within(n, [head]) for n in found):
            if head in found or all(within(n, heads) for n in found):
                return True
    return False


def _idle_target(
    option: str, pattern: str, found: list[str], excluded: list[str],
    modules: Mapping[str, nn.Module],
) -> str:  # fmt: skip
    """What a name in this option that adapts nothing is told."""
    if not found:
        name = next(n for n in modules if matches(pattern, n))
        below = {n.rpartition(".")[2] for n in modules if n != name and within(n, [name])}
        return (
            f"`{option}`: {pattern!r} matches {name!r}, which is no layer but holds some;"
            f" name those: {', '.join(sorted(below))}"
        )
    blame = ["`layers_to_transform`"] * (len(excluded) < len(found))
    blame += ["`exclude_modules`"] * bool(excluded)
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return (
        f"`{option}`: {pattern!r} has no effect, since {' and '.join(blame)} leave out all"
        f" that it matches ({some}). Leave the name out, or write one regular expression that says"
        " which layers of which blocks are meant"
    )


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
        else computed_weight(module) or f"it is a {type(module).__module__}.{type(module).__name__}"
    )
    if leaves := expert_tensors(module):
        why += f"; its expert tensors ({', '.join(leaves)}) are named in `target_parameters`"
    return (
        f"`target_modules` matches {name!r}, which cannot be adapted: {why}. Allowed: nn.Linear,"
        " transformers' Conv1D, nn.Embedding; narrow the pattern or add it to `exclude_modules`"
    )


def _fill_rest(model: nn.Module, out: Targets) -> None:
    """Matrices that stay frozen, and adapted weights that another module shares."""
    out.unadapted, out.tied = {}, {}
    places: dict[int, list[str]] = {}
    packed = sizes(model)
    parameters = dict(named_parameters(model, remove_duplicate=False))
    for name, p in parameters.items():
        places.setdefault(id(p), []).append(name)
    for names in places.values():
        owners = [n.rpartition(".")[0] for n in names]
        adapted = [o for o in owners if o in out.layers or within(o, out.saved)]
        adapted += [n for n in names if n in out.layers]
        if not adapted and parameters[names[0]].ndim >= 2:
            p = parameters[names[0]]
            out.unadapted[" = ".join(names)] = packed.get(id(p), (p.numel(), 0))[0]
        for owner in adapted if len(owners) > 1 else []:
            out.tied[owner] = next(o for o in (*owners, *names) if o != owner)


def refuse(model: nn.Module, recipe: Recipe, targets: Targets) -> None:
    """What the targets and the recipe together rule out.

    Raises:
        ValueError: a base that lacks what the recipe needs, a token-id input, a layer with a
            wrapper of its own, an offloaded or sharded weight.
    """
    delta = recipe.delta
    if recipe.target_modules == "all-linear" and (unread := unreadable(model)):
        name, kind = next(iter(unread.items()))
        raise ValueError(
            f"{name!r} is a {kind}, which holds its weight in a packed form that Lorica can't"
            " read. It reads weights quantised by bitsandbytes (nf4, fp4, int8), torchao (int8,"
            " float8 and intx, weights only), optimum-quanto and HQQ; load the model in one of"
            " these formats, or let transformers give its values, where its configuration of the"
            " format takes `dequantize=True` (`CompressedTensorsConfig(dequantize=True)`), or name"
            " the layers to adapt in `target_modules`"
        )
    if recipe.train_rest and (packed := quantised(model)):
        name, store = next(iter(packed.items()))
        check_quantised(recipe, store.gives, f"{name!r} is {store.format}")
    for name, kind in targets.layers.items():
        if kind is AbstractBase:
            continue
        if issubclass(kind, Quantised):
            stored = kind.at(model, name).format
            check_quantised(recipe, kind.gives, f"{name!r} is {stored}")
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
        stores = {n: kind.at(model, n) for n, kind in kinds.items()}
        check_ranks(
            recipe, {n: (s.out_features, s.in_features, recipe.r) for n, s in stores.items()}
        )
    for name in [*targets.places, *targets.saved]:
        if unwrapped(module := model.get_submodule(name)) is not module:
            raise ValueError(
                f"{name!r} is wrapped by itself (a {type(module).__name__} around one layer), and"
                " an adapter would take the wrapper's place. Attach first, and compile or"
                " checkpoint then; wrappers around blocks or the whole model may stay"
            )
        if delta.wraps and (why := computed_weight(module)) is not None:
            raise ValueError(
                f"{name!r} cannot be adapted: {why}, or leave it out with `exclude_modules`"
            )
    layers = {name: model.get_submodule(name) for name in targets.places}
    for name, layer in layers.items():
        if _offloaded(layer):
            raise ValueError(
                f"the weight of {name!r} is offloaded (Accelerate brings it to the device for the"
                " layer's own forward alone), so no update could be computed with it. Load the"
                " model without offloading, or leave such layers out with `exclude_modules`"
            )
    for name, p in named_parameters(model):
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
    packed = quantised(model)
    for name in names:
        held: Mapping[str, Tensor] = dict(
            packed[name].stored()
            if name in packed
            else model.get_submodule(name).named_parameters(recurse=False)
        )
        for kind, p in held.items():
            if not (p.is_meta or isinstance(p, DTensor)) and not finite_weight(p):
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


def refuse_idle(layer: AdaptedLayer, recipe: Recipe) -> None:
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


def drop_thin(
    model: nn.Module, recipe: Recipe, targets: Targets, dtype: torch.dtype, recorded: Container[str]
) -> None:
    """Of `all-linear`, leave out the layers that are too thin for their rank (a router, the gate of
    a shared expert), but for those that `rank_pattern` names.

    Args:
        recorded: layers that a file has; they stay.
    """
    if recipe.target_modules != "all-linear" or "r" not in recipe.takes or not targets.layers:
        return
    if recipe.delta.wraps:
        sites = sites_of(model, recipe, targets, dtype, any_rank=True)
        sizes = {n: (s.out_features, s.in_features, s.r) for n, s in sites.items()}
    else:
        assert recipe.r is not None  # filled where it is taken
        stores = {n: kind.at(model, n) for n, kind in targets.layers.items()}
        sizes = {n: (s.out_features, s.in_features, recipe.r) for n, s in stores.items()}
    thin = _too_thin(recipe, sizes)
    named = first_matches(recipe.rank_pattern, list(thin))
    thin = {n: most for n, most in thin.items() if n not in named and n not in recorded}
    if len(thin) == len(targets.layers):
        return  # the rank is wrong, not the layers
    for name, most in thin.items():
        del targets.layers[name]
        targets.left_out[name] = f"too thin for r={sizes[name][2]}, at most {most} fits"
    _fill_rest(model, targets)


def _too_thin(recipe: Recipe, sites: Mapping[str, tuple[int, int, int]]) -> dict[str, int]:
    """{layer whose rank is too large: the largest that fits}; `sites` as in `check_ranks`."""
    below = any(c.below_full for c in recipe.choices)
    most = {n: recipe.delta.most_r(wide, out) for n, (out, wide, _) in sites.items()}
    fits = {n: m - below for n, m in most.items() if m is not None}
    return {n: m for n, m in fits.items() if sites[n][2] > m}


def check_ranks(recipe: Recipe, sites: Mapping[str, tuple[int, int, int]]) -> None:
    """Ranks fit their layers.

    Args:
        sites: path -> (out, in, r).

    Raises:
        ValueError: a rank above min(in, out), or at it where a choice needs one below.
    """
    below = [c.name for c in recipe.choices if c.below_full]
    most_there = _too_thin(recipe, sites)
    bad = {n: f"{n} ({sites[n][0]} x {sites[n][1]})" for n in most_there}
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
        store = targets.layers[name].at(model, name)
        r, alpha = given[name]
        wide = torch.promote_types(store.dtype, dtype)
        site = Site(
            name, store.in_features, store.out_features, r, scale.factor(alpha, r),
            store.lookup, wide if wide is torch.float64 else dtype, store.device,
            store.bias() is not None, store.experts,
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
