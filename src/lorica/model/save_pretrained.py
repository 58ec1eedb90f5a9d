"""`model.save_pretrained` while adapters are attached: it writes what `lorica.save` writes.

transformers' own would write the model's tensors under names that only an adapted model has, which
`from_pretrained` reads as a model without most of its weights. Whoever holds the model alone calls
this: `transformers.Trainer` at each checkpoint, TRL's trainers, `push_to_hub`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters

logger = logging.getLogger("lorica")
_NAME = "save_pretrained"


def install(adapters: Adapters) -> None:
    """Put it over the method of a transformers model in which something stands for a module; a
    model that trains in place has its own names, so transformers' method is right there."""
    replaced = adapters.layers or adapters.saved or adapters.tables
    if isinstance(adapters.model, PreTrainedModel) and replaced:
        # Not a closure, which copies of the model would share.
        vars(adapters.model)[_NAME] = functools.partial(_save, adapters)


def remove(adapters: Adapters) -> None:
    vars(adapters.model).pop(_NAME, None)


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
            would have to call; a folder that holds a whole model.
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


def _holds(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)
