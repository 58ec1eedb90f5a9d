"""attach, detach, merge: put an update into a model, take it out, or leave its effect there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lorica.adapters import _HANDLE, Adapters
from lorica.bases import AbstractBase
from lorica.contract import Contract
from lorica.deltas import Site
from lorica.layer import AdaptedLinear, TrainedModule, Update
from lorica.recipe import Recipe
from lorica.targets import Targets, find, fresh_modules

logger = logging.getLogger("lorica")


def attach(
    model: nn.Module,
    method: str | Recipe = "lora",
    *,
    fresh: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    keep_base: bool = False,
    verbose: bool = True,
    initialise: bool = True,
    **fields: Any,
) -> Adapters:
    """Adapt a model in place and return the handle.

    Everything is checked before anything changes: on an error the model is as it was.

    Args:
        model: any torch module; loaded, not yet sharded or wrapped.
        method: text form or `Recipe`.
        fresh: paths of modules that came without weights from the checkpoint (a new head); they
            train in full. Default: found by transformers' own marks.
        dtype: of everything that trains; float32 by default, whatever the base's.
        keep_base: with a method that trains the base itself, keep a copy so that `detach` can
            restore it.
        verbose: log the contract (logger `lorica`, level INFO; printed to standard error if nothing
            listens).
        initialise: False leaves the start out, for a caller that writes all of the state at once
            (a load); a rank above the layer's is then let pass, since the file decides.
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
    if _HANDLE in vars(model):
        raise ValueError(
            f"this {type(model).__name__} has adapters already"
            f" ({Adapters.of(model).recipe.text()!r}); `lorica.detach(model)` or"
            " `lorica.merge(model)` first"
        )
    wraps: bool = recipe.delta.wraps  # type: ignore[union-attr]
    fresh = fresh_modules(model) if fresh is None else list(fresh)
    saved = tuple(dict.fromkeys([*recipe.modules_to_save, *fresh]))
    whole = not wraps and recipe.target_modules == "all-linear" and not recipe.exclude_modules
    targets = find(
        model,
        target_modules=recipe.target_modules,
        exclude_modules=recipe.exclude_modules,
        layers_to_transform=recipe.layers_to_transform,
        modules_to_save=saved,
        wraps=wraps,
    )
    _refuse(model, recipe, targets)
    sites = _sites(model, recipe, targets, dtype, any_rank=not initialise) if wraps else {}

    adapters = Adapters(model, recipe, dtype)
    adapters.requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    contract = Contract(method=recipe.text(), fresh=list(fresh), tied=targets.tied)
    layers = (
        {n: _build(model.get_submodule(n), b, recipe, sites[n]) for n, b in targets.layers.items()}
        if wraps
        else {}
    )
    if wraps:
        for name, layer in layers.items() if initialise else ():
            start(layer, recipe, f"{recipe.seed}/{name}")
        wrapped = {n: TrainedModule(model.get_submodule(n), dtype) for n in targets.saved}
        wrapped |= _bias_modules(model, recipe, targets, dtype)
        for p in model.parameters():
            p.requires_grad_(False)
        for name, module in {**layers, **wrapped}.items():
            _replace(model, name, module)
        adapters.layers, adapters.saved = layers, wrapped
        for t in adapters.trained():
            t.parameter.requires_grad_(True)
        trained = {id(t.parameter) for t in adapters.trained()}
        for layer in layers.values():
            for _, p, _ in layer.trained():
                p.requires_grad_(id(p) in trained)
    else:
        _train_in_place(model, adapters, targets, whole, dtype, keep_base)
    vars(model)[_HANDLE] = adapters
    adapters.contract = _fill(contract, adapters, targets, dtype)
    if verbose:
        _say(str(adapters.contract))
    return adapters


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters out: the published base, bit for bit.

    Raises:
        ValueError: nothing is attached, or training wrote to the base and no copy was kept.
    """
    adapters = Adapters.of(model)
    if not adapters.pristine:
        if adapters.originals is None:
            raise ValueError(
                f"`{adapters.recipe.text()}` trained the base itself, so its published bytes are"
                " gone; attach with `keep_base=True` to be able to detach, or load the base again"
            )
        parameters = dict(model.named_parameters())
        for name, original in adapters.originals.items():
            parameters[name].data = original
    for name, module in {**adapters.layers, **adapters.saved}.items():
        _replace(model, name, module.base)
    return _release(model, adapters)


def merge(model: nn.Module) -> nn.Module:
    """Leave a plain model that computes what the adapted one does.

    The effective weight is formed in float32 and rounded once to the base's dtype. A weight that is
    shared with another module (a tied head) is untied first, in the configuration too.
    """
    adapters = Adapters.of(model)
    untied = False
    for name, layer in adapters.layers.items():
        weight, bias = layer.effective()
        module, store = layer.base, layer.store
        untied |= name in adapters.contract.tied
        value = (weight.T if store.transposed else weight).detach()
        old = store.parameter
        module.weight = nn.Parameter(value.to(old.dtype).contiguous())  # type: ignore[assignment]
        if store.trained_bias is not None:
            assert bias is not None
            module.bias = nn.Parameter(bias.detach().to(old.dtype).clone())  # type: ignore[assignment]
        _replace(model, name, module)
    for name, module in adapters.saved.items():
        untied |= name in adapters.contract.tied
        for (_, p), (_, o) in zip(
            module.copy.named_parameters(), module.base.named_parameters(), strict=True
        ):
            p.data = p.data.to(o.dtype)
        _replace(model, name, module.copy)
    if untied:
        for config in {id(c): c for m in model.modules() if (c := vars(m).get("config"))}.values():
            config.tie_word_embeddings = False
    return _release(model, adapters)


def start(layer: AdaptedLinear, recipe: Recipe, key: str) -> None:
    """Fill a new layer's pair, carry the anchor of a start that is not zero, and let the combine
    begin."""
    store, update = layer.store, layer.update
    if store.parameter.is_meta:
        return
    pair = update.delta.pair()
    init: Any = recipe.init
    with torch.no_grad():
        if pair is not None:
            weight = store.weight()
            weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            init.fill(weight, pair, seeded(key))
            if "zero_start" not in init.gives:
                update.carry_(pair.A, -pair.B)
        layer.combine.start(store, update)


def seeded(key: str) -> torch.Generator:
    """A CPU generator that depends on `key` alone, not on the order of layers or the number of
    processes."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# -- steps of attach


def _refuse(model: nn.Module, recipe: Recipe, targets: Targets) -> None:
    delta: Any = recipe.delta
    for name, kind in targets.layers.items():
        if kind is AbstractBase:
            continue
        recipe.check(kind.gives)
        if kind.lookup and "lookup" not in delta.gives:
            raise ValueError(
                f"{name!r} is an embedding, whose input is a token id; `{delta.word}` needs an"
                " input vector. Leave it out of `target_modules`"
            )
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            raise ValueError(
                f"{name!r} is sharded already, so an adapter beside it would train alone on every"
                " process; attach first, shard then"
            )


def _sites(
    model: nn.Module, recipe: Recipe, targets: Targets, dtype: torch.dtype, *, any_rank: bool
) -> dict[str, Site]:
    names = list(targets.layers)
    given = recipe.rank.assign(names, recipe)  # type: ignore[union-attr]
    sites, too_large = {}, []
    for name in names:
        store = targets.layers[name](model.get_submodule(name))
        r, alpha = given[name]
        limit = min(store.in_features, store.out_features)
        if r > limit and not any_rank:
            too_large.append(f"{name} ({store.out_features} x {store.in_features})")
        scale = recipe.scale.factor(alpha, r)  # type: ignore[union-attr]
        wide = torch.promote_types(store.parameter.dtype, dtype)
        sites[name] = Site(
            name, store.in_features, store.out_features, r, scale, store.lookup,
            wide if wide is torch.float64 else dtype, store.parameter.device,
        )  # fmt: skip
    if too_large:
        raise ValueError(
            f"`r={recipe.r}` is larger than min(in, out) of {len(too_large)} layer(s): "
            f"{', '.join(too_large[:4])}{' ...' if len(too_large) > 4 else ''}. "
            "Choose a smaller `r`, or a smaller one for these through `rank_pattern`"
        )
    return sites


def _build(
    module: nn.Module, base: type[AbstractBase], recipe: Recipe, site: Site
) -> AdaptedLinear:
    parts: Any = recipe
    update = Update(
        parts.delta.build(site),
        site,
        dropout=recipe.lora_dropout,
        drop_carried=recipe.lora_dropout_on == "update",
    )
    layer = AdaptedLinear(
        base(module), update, parts.combine.build(site), parts.kernel, site,
        train_bias=recipe.bias != "none",
    )  # fmt: skip
    return layer.train(module.training)


def _bias_modules(
    model: nn.Module, recipe: Recipe, targets: Targets, dtype: torch.dtype
) -> dict[str, TrainedModule]:
    """With `bias="all"`: every other module that has a bias of its own."""
    if recipe.bias != "all":
        return {}
    return {
        name: TrainedModule(module, dtype, frozenset({"bias"}))
        for name, module in model.named_modules()
        if name
        and "bias" in dict(module.named_parameters(recurse=False))
        and name not in targets.layers
        and not any(name == s or name.startswith(s + ".") for s in targets.saved)
    }


def _train_in_place(
    model: nn.Module,
    adapters: Adapters,
    targets: Targets,
    whole: bool,
    dtype: torch.dtype,
    keep: bool,
) -> None:
    roots = [*targets.layers, *targets.saved]
    names = [
        n
        for n, p in model.named_parameters()
        if p.is_floating_point() and (whole or any(n.startswith(r + ".") for r in roots))
    ]
    if keep:
        adapters.originals = {
            n: p.data.clone() for n, p in model.named_parameters() if n in set(names)
        }
    for n, p in model.named_parameters():
        p.requires_grad_(n in set(names))
        if p.is_floating_point() and p.dtype != torch.float64:
            p.data = p.data.to(dtype)
    adapters.direct = tuple(names)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _release(model: nn.Module, adapters: Adapters) -> nn.Module:
    del vars(model)[_HANDLE]
    for name, p in model.named_parameters():
        p.requires_grad_(adapters.requires_grad.get(name, True))
    return model


def _fill(contract: Contract, adapters: Adapters, targets: Targets, dtype: torch.dtype) -> Contract:
    """Counts, bytes and defaults, from the model as it now stands."""
    recipe, model = adapters.recipe, adapters.model
    trained = adapters.trained()
    ids = {id(t.parameter) for t in trained}
    base = {n: p for n, p in model.named_parameters() if id(p) not in ids}
    carried = [p for layer in adapters.layers.values() for _, p in layer.frozen()]
    own = {id(p) for p in carried}
    for t in trained:
        _count(contract.trained, f"{t.role}" if t.role != "module" else "in full", t.parameter)
    for p in base.values():
        _count(contract.frozen, "carried" if id(p) in own else "base", p)
    contract.total = sum(p.numel() for p in model.parameters())
    contract.saved = list(adapters.saved)
    if not adapters.direct:
        contract.unadapted = {n: k / contract.total for n, k in targets.unadapted.items()}
    for layer in adapters.layers.values():
        site = layer.site
        shape = f"{site.out_features} x {site.in_features}"
        rule: Any = recipe.kernel
        start_at = (
            None
            if site.lookup or recipe.lora_dropout
            else rule.threshold(site.in_features, site.out_features)
        )
        if layer.store.parameter.dtype not in (torch.float32, torch.float64):
            start_at = None
        key = (
            f"{shape}, r={site.r}"
            if f"{shape}" in contract.layers and contract.layers[shape]["r"] != site.r
            else shape
        )
        info = contract.layers.setdefault(
            key, {"count": 0, "r": site.r, "scale": site.scale, "materialise_from": start_at}
        )
        info["count"] += 1
        contract.materialise_from[key] = start_at
    elements = sum(t.parameter.numel() for t in trained)
    size = sum(t.parameter.numel() * t.parameter.element_size() for t in trained)
    state: Any = recipe.rule
    contract.memory = {
        "base": sum(p.numel() * p.element_size() for p in base.values() if id(p) not in own),
        "trained": size,
        "carried": sum(p.numel() * p.element_size() for p in carried),
        "gradients": size,
        "optimizer": state.state_per_element * elements * 4,
    }
    contract.defaults = {k: {"value": v, "from": w} for k, (v, w) in recipe.filled.items()}
    if (rate := recipe.learning_rate) is not None:
        contract.defaults["learning_rate"] = {"value": rate[0], "from": rate[1]}
    return contract


def _count(groups: dict[str, dict[str, int]], name: str, p: nn.Parameter) -> None:
    group = groups.setdefault(name, {"tensors": 0, "elements": 0})
    group["tensors"] += 1
    group["elements"] += p.numel()


def _say(text: str) -> None:
    if logger.hasHandlers():
        logger.info(text)
    else:
        import sys

        print(text, file=sys.stderr)
