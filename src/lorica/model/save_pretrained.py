"""What other programs write of a model while adapters are attached.

`model.save_pretrained` writes what `lorica.save` writes; what would be wrong or unreadable is an
error that names the call to type.

transformers' own would write the model's tensors under names that only an adapted model has, which
`from_pretrained` reads as a model without most of its weights. Whoever holds the model alone calls
this: `transformers.Trainer` at each checkpoint, TRL's trainers, `push_to_hub`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lorica.tensors.modules import named_modules

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters

logger = logging.getLogger("lorica")
_NAME = "save_pretrained"


def install(adapters: Adapters) -> None:
    """Override the method of each transformers model in which a module was replaced. A model that
    trains in place has its own names, so transformers' method is right there."""
    names = [*adapters.layers, *adapters.saved, *adapters.tables]
    if names:
        model: Any = adapters.model  # Any: torch leaves this method untyped
        model.register_state_dict_pre_hook(_refuse_save)
    for path, module in named_modules(adapters.model):
        prefix = f"{path}." if path else ""
        if isinstance(module, PreTrainedModel) and any(name.startswith(prefix) for name in names):
            # Not a closure, which copies of the model would share.
            vars(module)[_NAME] = functools.partial(_refuse_part if path else _save, adapters)


def remove(adapters: Adapters) -> None:
    hooks: dict[int, object] = vars(adapters.model)["_state_dict_pre_hooks"]
    for key in [key for key, hook in hooks.items() if hook is _refuse_save]:
        del hooks[key]
    for module in adapters.model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop(_NAME, None)


def _save(
    adapters: Adapters,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: object = None,
    push_to_hub: bool = False,
    variant: str | None = None,
    **others: Any,  # Any: of transformers' method, about a whole model's files (the size of shards)
) -> None:
    """Write the adapters as `lorica.save` does, replacing an adapter that is there.

    Raises:
        ValueError: an option that has no meaning for an adapter; several processes, of which all
            would have to call; a folder that holds a whole model; a Trainer that is to load the
            best checkpoint and can't.
    """
    # The public function, found when it is called: a package above this one writes files.
    save = importlib.import_module("lorica").save
    if not is_main_process:
        return
    model, folder = type(adapters.model).__name__, Path(save_directory)
    if push_to_hub or variant is not None:
        given = "push_to_hub=True" if push_to_hub else f"variant={variant!r}"
        raise ValueError(
            f"`save_pretrained({given})` of this {model} with adapters: it writes the adapters, as"
            " `lorica.save(adapters, path)` does, and takes no such option. Leave it out (to"
            " publish, `model.push_to_hub(repo_id)`)"
        )
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"`save_pretrained` of this {model} with adapters was called in one process of"
            f" {dist.get_world_size()}, and all of them have to take part in a save: train with"
            " `lorica.run.Trainer` (or `TrainerMixin` before a Trainer of your own), or call"
            " `lorica.save(adapters, path)` in every process"
        )
    _refuse_load_best(model)
    if not folder.is_dir() or _holds(folder, "adapter_config.json", "lorica.json"):
        save(adapters, folder, overwrite=True)
    elif _holds(folder, "config.json"):
        raise ValueError(
            f"{str(folder)!r} holds a whole model, and the adapters of this {model} beside it would"
            " be read as part of it; give another folder"
        )
    else:  # a run's folder, with its checkpoints
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as aside:
            for file in sorted(save(adapters, Path(aside) / "out").iterdir()):
                os.replace(file, folder / file.name)
    logger.info(
        "%s holds the adapters, as `lorica.save` writes them, and not the base: read it with"
        " `lorica.load(model, path)`. To resume from such checkpoints, or to load the best of them"
        " at the end, train with `lorica.run.Trainer`", folder,
    )  # fmt: skip


def _refuse_part(adapters: Adapters, save_directory: object, *_: object, **__: object) -> None:
    """`sentence-transformers`, say, calls it on the transformers model that it holds."""
    raise ValueError(
        f"`save_pretrained({str(save_directory)!r})` of a part of this"
        f" {type(adapters.model).__name__}: the adapters belong to the whole, and the part's own"
        " weights have names that only an adapted model has. Write the adapters with"
        " `lorica.save(adapters, path)`, or an ordinary model after `lorica.merge(model)`"
    )


def _refuse_load_best(model: str) -> None:
    """transformers' own way back finds no file that it knows: it keeps the last weights with a
    warning, or fails after the last step."""
    transformers: Any = sys.modules.get("transformers.trainer")  # Any: untyped, and slow to import
    if transformers is None:
        return
    for frame in _callers():
        trainer: Any = frame.f_locals.get("self")
        if (
            isinstance(trainer, transformers.Trainer)
            and trainer.args.load_best_model_at_end
            and trainer._load_best_model.__func__ is transformers.Trainer._load_best_model
        ):
            name = type(trainer).__name__
            raise ValueError(
                f"`load_best_model_at_end=True` of this {name}: it can't read the adapters of"
                f" {model} back, and would end with the last weights instead of the best. Train"
                " with `lorica.run.Trainer`, or put `lorica.run.TrainerMixin` first:"
                f" `class Mine(TrainerMixin, {name}): ...`"
            )


def _refuse_save(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Of a state dict that is taken by

    - `Accelerator.save_model`: its file is for `load_checkpoint_in_model`, which leaves out in
      silence what a plain model has no name for. (`save_state` writes the same tensors for the
      adapted model itself, strictly.)
    - `save_pretrained` of a model that holds the adapted one, and does not know of the adapters.
    """
    kind = type(model).__name__
    names = "its weights have names that only an adapted model has, and a plain model would load"
    save = "Write the adapters with `lorica.save(lorica.Adapters.of(model), path)`"
    accelerate: Any = sys.modules.get("accelerate.accelerator")  # Any: untyped
    if accelerate is not None and _called_by(accelerate.Accelerator.save_model):
        raise ValueError(
            f"`Accelerator.save_model` of this {kind} with adapters: {names} none of them. {save},"
            " a state to resume from with `accelerator.save_state(path)`, or call"
            " `lorica.merge(model)` first"
        )
    whole: Any = PreTrainedModel  # Any: its method is untyped
    if prefix and _called_by(whole.save_pretrained):
        part = f"{kind} at {prefix.removesuffix('.')!r}"
        raise ValueError(
            f"`save_pretrained` of a model whose {part} has adapters: {names} none of"
            f" those. {save}, `model` being that part, or an ordinary model after `lorica.merge`."
            " Attached to the whole model, its `save_pretrained` writes the adapters"
        )


def _called_by(function: Callable[..., object]) -> bool:
    writing = inspect.unwrap(function).__code__
    return any(frame.f_code is writing for frame in _callers())


def _callers() -> Iterator[FrameType]:
    """Frames of the call, innermost first.

    Nothing else tells these calls apart from calls that are right. The Trainer hands
    `save_pretrained` a folder and a state dict, whether it will load the best checkpoint or not,
    and tells the model nothing when it is made; a callback among transformers' defaults would
    change every Trainer of the process. `Accelerator.save_model` and `save_state` both ask for
    `model.state_dict()` without arguments, and Accelerate has hooks before a `save_state` alone.
    Neither can simply work: the one looks for a file of a whole model, and what the other writes is
    read without being strict.
    """
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _holds(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)
