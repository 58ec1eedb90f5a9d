# pyright: strict, reportUnknownMemberType=false
"""Loads a saved adapter: onto a plain model, or back into adapters that are attached already."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lorica.formats.adapter_file import AdapterFile
from lorica.formats.lorica_json import Base, base_dtypes
from lorica.formats.stored_state import write_state
from lorica.model.adapters import Adapters
from lorica.model.attach import attach, detach
from lorica.tensors.modules import refuse_meta, unwrapped
from lorica.text import clear_errors, cut, shorten


@clear_errors()
def load(
    model: nn.Module,
    path: str | Path,
    *,
    check_base: bool = True,
    trainable: bool = True,
    verbose: bool = False,
) -> Adapters:
    """Attach a saved adapter to its base: one of Lorica's, or one that PEFT wrote.

    Of PEFT's, LoRA with its switches and starts is read (rsLoRA, DoRA, OLoRA, PiSSA, patterns,
    embeddings, biases, modules trained in full). A start that PEFT would take out of the base as it
    loads is computed from the base and frozen beside it, so the base keeps its bytes. On an error
    the model is as it was.

    Args:
        model: the plain base, compiled or not; loaded, not sharded.
        path: a folder, or a hub id `owner/name`.
        check_base: refuse a base whose weights are not those the adapter was trained on (PEFT's
            files don't say).
        trainable: False leaves every parameter frozen.
        verbose: log the summary, as `attach` does.

    Raises:
        ValueError: what can't be read, and why (`lorica inspect` lists it too); another base;
            tensors that are missing, left over or of another shape, all of them named.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> before = lorica.attach(model, "dora", r=2, verbose=False).fingerprint()
        >>> out = lorica.save(model, tempfile.mkdtemp() + "/out")
        >>> lorica.load(lorica.detach(model), out).fingerprint() == before
        True
    """
    model = unwrapped(model)
    file = AdapterFile.read(path)
    _refuse_model(file)
    file.refuse()
    adapters = _attach(model, file, verbose=verbose)
    try:
        state = file.state_for(adapters)
        if check_base:
            _check_base(adapters, file)
        write_state(adapters, state)
    except BaseException:
        detach(model)
        raise
    adapters.originals = None  # was kept for the `detach` above
    if not trainable:
        for t in adapters.trained():
            t.parameter.requires_grad_(False)
    return adapters


@clear_errors()
def restore(adapters: Adapters, path: str | Path, *, check_base: bool = True) -> None:
    """Read a saved state into adapters that are attached already, to continue training.

    Args:
        adapters: attached with the very recipe that was saved.
        path: a folder that `save` wrote.
        check_base: see `load`.

    Raises:
        ValueError: another recipe (the differences are named), another base, or tensors that don't
            fit; nothing is changed then.
    """
    file = AdapterFile.read(path)
    if file.own is None:
        raise ValueError(
            f"{file.folder} was written by PEFT and holds no training state; start from it with"
            " `lorica.load(model, path)`"
        )
    if file.damage is not None:
        raise ValueError(file.damage)
    theirs, ours = file.own.recipe, adapters.recipe.to_dict()
    if theirs != ours and (saved := file.own.parse_recipe(file.folder)) != adapters.recipe:
        theirs = saved.to_dict()
        differ = [f"`{k}` {theirs[k]!r} (here {ours[k]!r})" for k in theirs if theirs[k] != ours[k]]
        raise ValueError(
            f"{file.folder} was saved with another recipe: {', '.join(differ)}. Resume with the"
            " saved recipe, or start anew in another folder"
        )
    if check_base:
        _check_base(adapters, file)
    if file.form == "model":
        _restore_model(adapters, file.folder)
    else:
        file.write_into(adapters)


def _attach(model: nn.Module, file: AdapterFile, *, verbose: bool) -> Adapters:
    """Adapt the model as the file wants it; its state is not written yet."""
    wanted = file.attach_as(model)
    try:
        return attach(
            model,
            wanted.recipe,
            heads=wanted.heads,
            dtype=wanted.dtype,
            keep_base=True,  # so that an error in `load` leaves the model as it was
            verbose=verbose,
            initialise=wanted.initialise,
            ranks=wanted.ranks,
            recorded=wanted.recorded,
        )
    except ValueError as error:
        base = file.base
        origin = f"{shorten(str(base.cls))} {shorten(str(base.name))}" if base.cls else base.name
        raise ValueError(
            f"{file.config_file} does not fit this {type(model).__name__} (it was saved from"
            f" {origin or 'a model that it does not name'}): {cut(str(error))}"
        ) from None


def _refuse_model(file: AdapterFile) -> None:
    """Refuse a whole model, which is no adapter.

    Raises:
        ValueError: it is one.
    """
    if file.own is not None and file.form == "model" and file.damage is None:
        raise ValueError(
            f"{file.folder} is a whole model ({file.base.cls}), trained by `{file.own.method}`, and"
            f" no adapter; load it with `{file.base.cls}.from_pretrained({str(file.folder)!r})`"
        )


def _restore_model(adapters: Adapters, folder: Path) -> None:
    """Restore weights that train in place, through `from_pretrained`: what transformers writes may
    have other names than what it holds."""
    model = adapters.model
    assert isinstance(model, PreTrainedModel)
    stored = type(model).from_pretrained(folder, dtype=adapters.dtype)
    adapters.load_state_dict({n: stored.get_parameter(n).detach() for n in adapters.direct})


def _check_base(adapters: Adapters, file: AdapterFile) -> None:
    """Check that the model's frozen weights are those that the adapter was trained on.

    Raises:
        ValueError: they aren't.
    """
    base: Base = file.base
    if base.sha256 is not None:
        refuse_meta(adapters.model, "load adapters onto")
    live = adapters.hash_base() if adapters.base_unchanged and base.sha256 else adapters.base_hash
    if base.sha256 is None or live is None or base.sha256 == live:
        return
    here = base_dtypes(adapters)
    hint = (
        f" It was held in {base.dtype} there and is in {here} here, which rounds it: load it in"
        f" {base.dtype}."
        if here != base.dtype
        else ""
    )
    raise ValueError(
        f"{file.folder} was trained on another base: {base.name or 'the one saved'} has the hash"
        f" {base.sha256[:12]}, this model {live[:12]}.{hint} Load the right base, or, knowing that"
        " the numbers will differ, pass `check_base=False` (`--ignore-base-hash`)"
    )
