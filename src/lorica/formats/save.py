# pyright: strict, reportUnknownMemberType=false
"""Writes adapters as a folder: complete or absent, in PEFT's form wherever that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.formats.atomic_folder import check_free, first, together, writing
from lorica.formats.lorica_json import Form, LoricaJson, frozen_ranks
from lorica.formats.peft.places import places
from lorica.formats.peft.write import config, file_tensors, obstacle, write_config
from lorica.formats.safe_files import OWN_TENSORS, PEFT_TENSORS, write_tensors
from lorica.formats.stored_state import full_state, not_finite
from lorica.model.adapters import Adapters
from lorica.tensors.modules import refuse_meta
from lorica.text import clear_errors


@clear_errors()
def save(adapters: Adapters | nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapters (not the base) as a folder that `lorica.load` reads back bit for bit.

    It is a PEFT adapter wherever PEFT computes the same from it, whatever the method was; else
    Lorica's own form; and a whole transformers model where the method trains the base itself. The
    folder is complete or absent, even if the process dies. With several processes all have to call;
    the first one writes.

    Args:
        adapters: the handle, or the adapted model.
        path: the folder; may not exist yet.
        overwrite: replace an adapter that is there. Other files beside it stay; a folder without an
            adapter is never overwritten.

    Raises:
        ValueError: the folder is taken; a factor is not a matrix (a sharded model that was not
            gathered); a trained tensor has a value that is not finite.

    Example:
        >>> import tempfile, torch, lorica
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapters = lorica.attach(model, "olora", r=2, verbose=False)
        >>> out = lorica.save(adapters, tempfile.mkdtemp() + "/out")
        >>> sorted(file.name for file in out.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'lorica.json']
    """
    adapters = adapters if isinstance(adapters, Adapters) else Adapters.of(adapters)
    path = Path(path)
    if first():
        check_free(path, overwrite=overwrite)
    state = full_state(adapters)
    check_state(adapters, state)
    form, why_not_peft = _form(adapters)
    own = state
    peft = (config(adapters), file_tensors(adapters, state)) if form == "peft" else None
    if peft is not None:
        cut = places(adapters, frozen_ranks(adapters))
        own = {name: value for name, value in state.items() if name not in cut}
    base_hash = adapters.hash_base() if adapters.base_unchanged else adapters.base_hash
    if first():
        needs = sum(t.nbytes for t in {**own, **(peft[1] if peft else {})}.values())
        with writing(path, overwrite=overwrite, needs=needs) as folder:
            if form == "model":
                assert isinstance(adapters.model, PreTrainedModel)
                adapters.model.save_pretrained(folder)
            else:
                if peft is not None:
                    write_tensors(peft[1], folder / PEFT_TENSORS)
                    write_config(peft[0], folder)
                if own or peft is None:
                    write_tensors(own, folder / OWN_TENSORS)
            LoricaJson.of(adapters, form, why_not_peft, base_hash).write(folder)
    together()
    return path


def _form(adapters: Adapters) -> tuple[Form, str | None]:
    """The form of the folder, and why it is not PEFT's."""
    in_place = bool(adapters.direct) and not adapters.layers
    if in_place and isinstance(adapters.model, PreTrainedModel):
        return "model", None
    why = obstacle(adapters)
    return ("peft", None) if why is None else ("lorica", why)


def check_state(adapters: Adapters, state: Mapping[str, Tensor]) -> None:
    """Check that the state is whole and finite, so that it is worth writing.

    Raises:
        ValueError: see `save`.
    """
    refuse_meta(adapters.model, "save the adapters of")
    empty = {name: str(tuple(value.shape)) for name, value in state.items() if not value.numel()}
    for name, layer in adapters:
        if (pair := layer.update.delta.pair()) is not None:
            r = pair.A.shape[-2] if pair.A.ndim > 1 else 0
            whole = (
                layer.site.shape(r, layer.in_features),
                layer.site.shape(layer.out_features, r),
            )
            if (tuple(pair.A.shape), tuple(pair.B.shape)) != whole:
                empty[name] = f"{tuple(pair.A.shape)}, {tuple(pair.B.shape)}"
    if empty:
        name, shape = next(iter(empty.items()))
        raise ValueError(
            f"{name} is {shape}: an adapter's tensor is neither empty nor flat, so the shards of a"
            " sharded model were not gathered. Gather them before saving"
        )
    trained = {t.name for t in adapters.trained()}
    bad = not_finite(state, set(state) - trained)
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(state)} saved tensors hold values that are not finite, first"
            f" {bad[0]}: training has diverged. Go back to an earlier checkpoint and lower the"
            " learning rate"
        )
