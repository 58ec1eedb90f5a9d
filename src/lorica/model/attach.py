"""attach, detach, merge: put an update into a model, take it out, or leave its effect there."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from lorica.interfaces import Batch, Pair, Site
from lorica.methods.optional import (
    LinksDeltas,
    RanksFromData,
    SharesTensors,
    StartsFromData,
    StartsFromUnquantised,
)
from lorica.model import resizing, save_pretrained
from lorica.model.adapters import HANDLE, Adapters, Released
from lorica.model.bases.base import AbstractBase
from lorica.model.checkpointed import let_gradients_in
from lorica.model.experts import AdaptedExperts, AdaptedTensor
from lorica.model.forward_hooks import ForwardHooks
from lorica.model.heads import in_full, refuse_missing
from lorica.model.layer import AdaptedLayer, AdaptedLinear
from lorica.model.modules_to_save import (
    TrainedModule,
    bias_modules,
    keep,
    replace,
    restore,
    train_in_place,
)
from lorica.model.quantised import dequantise, floating_dtype, quantised
from lorica.model.summary import Summary, fill, say
from lorica.model.targets import (
    Targets,
    drop_thin,
    find,
    refuse,
    refuse_idle,
    refuse_not_finite,
    sites_of,
)
from lorica.model.token_rows import TokenRows, build_tables, find_tables, untrained
from lorica.model.unbound import discard, expect
from lorica.model.unquantised import Source, Unquantised
from lorica.model.update import Update
from lorica.model.wrappers import refuse_wrapped
from lorica.recipe.recipe import Recipe
from lorica.tensors.dtensor_ops import on_cpu, reshard, seeded
from lorica.tensors.modules import (
    evaluating,
    named_modules,
    named_parameters,
    refuse_meta,
    unwrapped,
)
from lorica.tensors.shared import SharedTensors
from lorica.text import clear_errors, shorten

logger = logging.getLogger("lorica")


@on_cpu
@clear_errors()
def attach(
    model: nn.Module,
    method: str | Recipe = "lora",
    *,
    missing_keys: Collection[str] = (),
    heads: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    keep_base: bool = False,
    verbose: bool = True,
    initialise: bool = True,
    data: Iterable[Batch] | None = None,
    unquantised: Source | None = None,
    ranks: Mapping[str, tuple[int, float | None]] | None = None,
    recorded: Collection[str] = (),
    **fields: Any,  # Any: of `Recipe`
) -> Adapters:
    """Adapt a model in place and return the handle.

    Everything is checked before anything changes: on an error the model is as it was.

    Args:
        model: any torch module, compiled or not; loaded, not yet sharded or wrapped (DDP, FSDP).
        method: text form or `Recipe`.
        missing_keys: names of parameters that the checkpoint had no values for, as transformers
            reports them (`from_pretrained(..., output_loading_info=True)`). Modules that consist of
            such train in full; any other that would stay frozen is an error. Default: none are
            known.
        heads: paths of modules that train in full without being named in `modules_to_save`.
            Default: the head of a model for classification, regression or question answering, and
            what `missing_keys` says; a head that `target_modules` or `exclude_modules` names does
            not.
        dtype: of everything that trains; float32 by default, whatever the base's.
        keep_base: with a method that trains the base itself, keep a copy so that `detach` can
            restore it.
        verbose: log the summary (logger `lorica`, level INFO; printed to standard error if nothing
            listens).
        initialise: False leaves the start out, for a caller that writes all of the state at once
            (a load); a rank above the layer's is then let pass, since the file decides.
        data: batches of the training data (keyword arguments of the model, labels included), for a
            start that is made from them; as many are read as it asks for. A model on the meta
            device needs none.
        unquantised: what the weights were before they were quantised, for a start that reads them:
            a checkpoint's folder or hub id, or {module path: weight}. Default: the checkpoint that
            the model was loaded from.
        ranks: {module path: (rank, alpha)} that every target is built with, instead of the recipe's
            choice of ranks; for a load, where the file decides.
        recorded: paths of layers that are adapted even where `all-linear` would leave them out; for
            a load, where the file has them.
        **fields: fields of `Recipe`, e.g. `r=16`, `target_modules=["q_proj"]`.

    Raises:
        ValueError: what `Recipe` and the targets' rules refuse; a rank above the layer's; adapters
            already there; a weight that is sharded already.

    Example:
        >>> import torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
        >>> adapters = lorica.attach(model, "dora+olora", r=2, verbose=False)
        >>> [name for name, _ in adapters]
        ['0', '1']
    """
    recipe = Recipe.parse(method, **fields)
    model = unwrapped(model)
    refuse_wrapped(model)
    _refuse_adapted(model)
    wraps = recipe.delta.wraps
    in_place = recipe.train_rest or not wraps
    if heads is not None:
        modules = {n for n, _ in named_modules(model)}
        if lost := [n for n in heads if n not in modules]:
            raise ValueError(
                f"`heads`: {shorten(lost[0])} is the path of no module of this"
                f" {type(model).__name__}; give whole paths, as `model.named_modules()` lists them"
            )
        untold = dict.fromkeys(heads, "")
    else:
        untold = {} if recipe.train_rest or recipe.whole else in_full(model, missing_keys)
    targets = find(
        model,
        target_modules=recipe.target_modules,
        exclude_modules=recipe.exclude_modules,
        layers_to_transform=recipe.layers_to_transform,
        modules_to_save=recipe.modules_to_save,
        target_parameters=recipe.target_parameters,
        heads=untold,
        wraps=wraps,
        no_experts=recipe.no_experts(),
        adapt_towers=recipe.adapt_towers,
        recorded=recorded,
    )
    drop_thin(model, recipe, targets, dtype, recorded)
    refuse_missing(model, missing_keys, recipe, targets.layers, targets.saved)
    refuse(model, recipe, targets)
    tables = find_tables(model, recipe, targets)
    if not (recipe.train_rest or recipe.whole):
        beside = targets.saved if wraps else [*targets.saved, *targets.layers]
        if (left := untrained(model, tables, beside)) is not None:
            logger.warning(left)
    for store in quantised(model).values():
        store.prepare()
    sites: dict[str, Site] = {}
    if wraps:
        sites = sites_of(
            model, recipe, targets, dtype, any_rank=not initialise, ranks=ranks, as_built=True
        )
    seen: Mapping[str, Any] = {}  # Any: what the init observed of each layer
    if initialise:
        refuse_not_finite(model, targets.places)
        seen = observe(model, recipe, targets, sites, data)
        if isinstance(recipe.init, StartsFromUnquantised) or unquantised is not None:
            seen = before_quantisation(model, recipe, targets, unquantised)
        if isinstance(recipe.rank, RanksFromData) and ranks is None and seen:
            found = recipe.rank.assign_from(seen, sites, recipe)
            sites = sites_of(model, recipe, targets, dtype, any_rank=False, ranks=found)

    adapters = Adapters(model, recipe, dtype)
    adapters.requires_grad = {n: p.requires_grad for n, p in named_parameters(model)}
    summary = Summary(
        method=recipe.text(), heads=targets.heads, left_out=targets.left_out, tied=targets.tied
    )
    if wraps:
        layers = {n: _build(b.at(model, n), recipe, sites[n]) for n, b in targets.layers.items()}
        if isinstance(recipe.delta, LinksDeltas):
            recipe.delta.link({n: layer.update.delta for n, layer in layers.items()})
        if isinstance(recipe.delta, SharesTensors):
            made = recipe.delta.shared([*sites.values()], seeded(f"{recipe.seed}/shared"))
            adapters.shared = SharedTensors(made)
            for layer in layers.values():
                layer.update.delta.shared_tensors = adapters.shared
                for name, _ in adapters.shared:  # copied to its device now, not in a forward
                    layer.update.delta.read_shared(name)
        for name, layer in layers.items():
            if initialise:
                start(layer, recipe, f"{recipe.seed}/{name}", seen.get(name))
                refuse_idle(layer, recipe)
            else:
                reserve(layer, recipe)
        wrapped = {n: TrainedModule(model.get_submodule(n), dtype) for n in targets.saved}
        wrapped |= bias_modules(model, recipe, targets, dtype)
        if keep_base and not adapters.base_unchanged and not in_place:
            keep(adapters, layers)
        rows = build_tables(model, tables, dtype)
        replace(model, {**wrapped, **rows, **_standing(layers)})  # a parent before its child
        adapters.layers.update(layers)
        adapters.saved.update(wrapped)
        adapters.tables.update(rows)
    if in_place:
        train_in_place(model, adapters, targets, dtype, keep_base)
    trained = {id(t.parameter) for t in adapters.trained()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    vars(model)[HANDLE] = adapters
    if not adapters.base_unchanged:
        adapters.hash_base()
        for layer in adapters.layers.values():  # the base is training state, nothing is beside it
            layer.update.fold_frozen_(layer.store)
            layer.update.clear_frozen_()
    adapters.hooks = ForwardHooks(adapters)
    adapters.hooks.handles += let_gradients_in(model)
    save_pretrained.install(adapters)
    resizing.install(adapters)
    adapters.summary = fill(summary, adapters, targets)
    expect(adapters)
    if verbose:
        say(str(adapters.summary))
    return adapters


@clear_errors()
def detach(model: nn.Module) -> nn.Module:
    """Take the adapters out: the published base, bit for bit.

    Args:
        model: the adapted model, compiled or not; it is returned.

    Raises:
        ValueError: nothing is attached, or training wrote to the base and no copy was kept.
    """
    adapters = Adapters.of(model)
    plain = adapters.model
    if not adapters.base_unchanged and adapters.originals is None:
        raise ValueError(
            f"`{adapters.recipe.text()}` trained the base itself, so its published bytes are"
            " gone; attach with `keep_base=True` to be able to detach, or load the base again"
        )
    modules = {**adapters.saved, **adapters.tables}
    bases = {layer.place: layer.store.module for _, layer in adapters}
    replace(plain, {**bases, **{n: m.base for n, m in modules.items()}})
    restore(adapters)
    _release(adapters, by="detach")
    return model


@clear_errors()
def merge(model: nn.Module) -> nn.Module:
    """Leave a plain model that computes what the adapted one does.

    The effective weight is formed in float32 and rounded once to the base's dtype. A quantised base
    is given back as its values, in the dtype of the model's other weights: rounded to few bits
    again, the sum would lose most of the update. A weight that is shared with another module (a
    tied head) is untied first, in the configuration too, unless other weights are shared still (a
    block that occurs in several layers): transformers has one flag for all of them, and leaves
    alone what differs in a checkpoint.

    Args:
        model: the adapted model, compiled or not; it is returned.

    Raises:
        ValueError: nothing is attached, or the model is sharded.
    """
    adapters = Adapters.of(model)
    whole = adapters.model
    refuse_meta(whole, "merge the adapters of")
    reshard(whole)
    if any(isinstance(p, DTensor) for p in whole.parameters()):
        raise ValueError(
            "this model is sharded, and its engine would go on computing with the weights it holds;"
            " `lorica.save` the adapters, then load base and adapters in one process and merge"
            " there"
        )
    untied, dtype = False, floating_dtype(whole)
    plain: dict[str, nn.Module] = {}
    for name, layer in adapters.layers.items():
        weight, bias = layer.effective()
        untied |= name in adapters.summary.tied
        own = bias is not None and bias is not layer.store.published_bias()
        plain[layer.place] = layer.store.replaced(weight, bias if own else None, dtype)
    for name, module in adapters.saved.items():
        untied |= name in adapters.summary.tied
        plain[name] = module.merged()
    for name, table in adapters.tables.items():
        untied |= table.alone
        plain[name] = table.merged()
    replace(whole, plain)
    replace(whole, dequantise(whole, dtype))
    if untied:
        _say_untied(whole)
    _release(adapters, by="merge")
    return model


def observe(
    model: nn.Module, recipe: Recipe, targets: Targets, sites: Mapping[str, Site],
    data: Iterable[Batch] | None,
) -> Mapping[str, Any]:  # fmt: skip  # Any: as each init needs it
    """What the recipe's init reads off a few batches, {module path: ...}; nothing for most inits,
    and for a model on the meta device.

    The model is in evaluation mode and frozen meanwhile, and then as it was.

    Raises:
        ValueError: the init needs data and got none, or too few batches; or it needs none.
    """
    init = recipe.init
    if not isinstance(init, StartsFromData):
        if data is not None:
            raise ValueError(
                f"`data` has no effect with `{recipe.text()}`, whose start needs none; leave it out"
            )
        return {}
    name, wanted = recipe.text(), init.batches
    device = next(model.parameters()).device
    if data is None and device.type == "meta":
        return {}
    if data is None:
        raise ValueError(
            f"`{name}` starts from {wanted} batches of the training data, and got none: type"
            f" `lorica.attach(model, {name!r}, data=batches)`, each batch the keyword arguments of"
            " the model, labels included"
        )
    batches = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for batch in itertools.islice(data, wanted)
    ]
    if len(batches) < wanted:
        raise ValueError(
            f"`{name}` starts from {wanted} batches, and `data` holds {len(batches)}; give more, or"
            " ask for fewer in the method's text"
        )
    layers = {n: base.at(model, n) for n, base in targets.layers.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, *_ in before:
            p.requires_grad_(False)
            p.grad = None
        with evaluating(model):
            return init.observe(model, layers, sites, batches)
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad


def before_quantisation(
    model: nn.Module, recipe: Recipe, targets: Targets, source: Source | None
) -> Mapping[str, Tensor]:
    """What the targets' weights were before they were quantised, {module path: (out, in)}; nothing
    for a model on the meta device.

    Raises:
        ValueError: nothing was quantised, the start reads no such values, or it is not known where
            they are.
    """
    name = recipe.text()
    if not isinstance(recipe.init, StartsFromUnquantised):
        raise ValueError(
            f"`unquantised` has no effect with `{name}`, whose start does not read it; leave it out"
        )
    layers = {n: base.at(model, n) for n, base in targets.layers.items()}
    if any(store.parameter.is_meta for store in layers.values()):
        return {}
    named = not isinstance(source, Mapping)
    if named and all(store.dense for store in layers.values()):
        raise ValueError(
            f"`{name}` starts from what quantisation took away, and none of the weights to adapt is"
            " quantised; load the model quantised (`--load-in-4bit`), or start with `lora` or"
            " `pissa`"
        )
    if source is None:
        config: Any = vars(model).get("config")  # Any: each model's own class
        source = getattr(config, "name_or_path", None)
    if source is None or source == "":
        raise ValueError(
            f"`{name}` reads the weights before they were quantised, and this model does not say"
            " which checkpoint it came from; give them as `unquantised='folder'` or"
            " `unquantised={module path: weight}`"
        )
    return Unquantised(model, layers, source)


def start(layer: AdaptedLayer, recipe: Recipe, key: str, seen: object = None) -> None:
    """Fill a new layer's pair, freeze the negative of a start that is not zero beside it, and let
    the combine begin.

    Args:
        key: of the random draws.
        seen: what a `StartsFromData` init observed of this layer, as that init made it; or what
            the weight was before it was quantised.
    """
    store, update, init = layer.store, layer.update, recipe.init
    pair, on_meta = update.delta.pair(), store.parameter.is_meta
    with torch.no_grad():
        if pair is not None:
            assert init is not None  # its need, a pair, is met
            weight = store.weight().detach()
            weight = weight if init.reads_weight else weight.to("meta")
            if not on_meta:
                wide = torch.promote_types(weight.dtype, torch.float32)
                if isinstance(init, StartsFromUnquantised):
                    assert isinstance(seen, Tensor)  # one for each layer
                    whole = weight.to(wide)
                    init.fill_from(seen.to(whole), whole, pair, seeded(key))
                elif isinstance(init, StartsFromData):
                    init.fill_from(seen, weight.to(wide), pair, seeded(key))
                else:
                    generator = seeded(key)
                    for one, own in _singles(weight, pair):
                        init.fill(one.to(wide), own, generator)
            if store.padding is not None and not on_meta:
                pair.A[:, store.padding] = 0  # it has no part in the update, and is saved as it is
            if "zero_start" not in init.gives:
                update.add_frozen_(pair.right(), -pair.B)
        elif not on_meta:
            update.delta.restart(0, seeded(key))
        if not on_meta:
            layer.combine.start(store, update)


def _singles(weight: Tensor, pair: Pair) -> Iterator[tuple[Tensor, Pair]]:
    """Weight (out, in) and pair of each matrix of a stack, or of the one that it is."""
    if weight.ndim == 2:
        yield weight, pair
        return
    for e, one in enumerate(weight):
        A, B = (nn.Parameter(t.detach()[e], requires_grad=False) for t in (pair.A, pair.B))
        yield one, dataclasses.replace(pair, A=A, B=B)


def reserve(layer: AdaptedLayer, recipe: Recipe) -> None:
    """Make room for a start that is not zero, whose state a caller will write: a sharded model
    cannot grow any more, and the summary counts what is there."""
    pair, init = layer.update.delta.pair(), recipe.init
    if pair is not None and init is not None and "zero_start" not in init.gives:
        layer.update.add_frozen_(torch.zeros_like(pair.right()), torch.zeros_like(pair.B))


# -- steps of attach


def _refuse_adapted(model: nn.Module) -> None:
    """Nothing of the model has adapters, and every parameter exists.

    Raises:
        ValueError: it is adapted, a part of it is, or it is a part of such a model; it is lazy.
    """
    taken = (AdaptedLinear, TrainedModule, TokenRows)
    for path, module in named_modules(model):
        if HANDLE in vars(module):
            where = f"{path!r} of this" if path else "this"
            part = f"model.{path}" if path else "model"
            raise ValueError(
                f"{where} {type(model).__name__} has adapters already"
                f" ({Adapters.of(module).recipe.text()!r}); `lorica.detach({part})` or"
                f" `lorica.merge({part})` first"
            )
        if isinstance(module, taken):
            raise ValueError(
                f"this {type(model).__name__} is a part of a model that has adapters already, among"
                f" them on {path!r}; `lorica.detach(model)` or `lorica.merge(model)` of the whole"
                " first"
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise ValueError(
                f"{path!r} is a {type(module).__name__} that has not seen an input, so its weight"
                " has no size yet. Run the model once on a batch, then attach"
            )


def _standing(layers: Mapping[str, AdaptedLayer]) -> dict[str, nn.Module]:
    """{path: module that takes the place of the model's own}."""
    out: dict[str, nn.Module] = {}
    stacks: dict[str, dict[str, AdaptedTensor]] = {}
    for layer in layers.values():
        if isinstance(layer, AdaptedTensor):
            stacks.setdefault(layer.place, {})[layer.leaf] = layer
        else:
            out[layer.place] = layer
    for place, held in stacks.items():
        out[place] = AdaptedExperts(next(iter(held.values())).base, held)
    return out


def _build(store: AbstractBase, recipe: Recipe, site: Site) -> AdaptedLayer:
    init, combine, kernel = recipe.init, recipe.combine, recipe.kernel
    assert combine is not None and kernel is not None  # a delta that wraps meets their needs
    # A frozen start is dropped with the start that it takes out; finished links are not dropped.
    starts_elsewhere = init is not None and "zero_start" not in init.gives
    drop_frozen = starts_elsewhere and recipe.lora_dropout_on == "update"
    update = Update(
        recipe.delta.build(site), site, dropout=recipe.lora_dropout, drop_frozen=drop_frozen,
        padding=store.padding,
    )  # fmt: skip
    kind = AdaptedTensor if store.experts else AdaptedLinear
    layer = kind(store, update, combine.build(site), kernel, site, train_bias=recipe.bias != "none")
    return layer.train(store.module.training)


def _say_untied(model: nn.Module) -> None:
    """Let configurations say that nothing is tied, where that is so, and let transformers forget
    the pairs that are tied no more."""
    shares: dict[int, bool] = {}  # configuration -> its parts have weights in common
    parts: list[Any] = [
        m for m in model.modules() if isinstance(m, PreTrainedModel)
    ]  # Any: untyped
    for part in parts:
        held: dict[str, nn.Parameter] = dict(part.named_parameters(remove_duplicate=False))
        known: dict[str, str] = part.all_tied_weights_keys
        tied: dict[str, str] = {**part.get_expanded_tied_weights_keys(), **known}
        still = {target for target, source in tied.items() if held[target] is held[source]}
        for target in (
            tied.keys() - still
        ):  # what it shares with other targets would be written once
            if sum(p is held[target] for p in held.values()) > 1:
                owner, _, leaf = target.rpartition(".")
                held[target] = nn.Parameter(held[target].detach().clone())
                part.get_submodule(owner).register_parameter(leaf, held[target])
        part.all_tied_weights_keys = {t: s for t, s in known.items() if t in still}
        shares[id(part.config)] = shares.get(id(part.config), False) or bool(still)
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and not shares.get(id(config), any(shares.values())):
            config.tie_word_embeddings = False


def _release(adapters: Adapters, *, by: Released) -> None:
    model = adapters.model
    del vars(model)[HANDLE]
    adapters.released = by
    discard(adapters)
    adapters.hooks.remove()
    save_pretrained.remove(adapters)
    resizing.remove(adapters)
    for name, p in named_parameters(model):
        p.requires_grad_(adapters.requires_grad.get(name, True))
