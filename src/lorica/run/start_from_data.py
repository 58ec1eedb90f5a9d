"""A start that is made from a few batches: a run takes them from its own training data."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch

from lorica.formats.adapter_file import AdapterFile
from lorica.methods.optional import StartsFromData, StartsFromUnquantised
from lorica.run.plan import RunPlan
from lorica.tensors.dtensor_ops import seeded

logger = logging.getLogger("lorica")


def attach_options(
    plan: RunPlan[Any, Any], pool: Callable[[int], Any]
) -> dict[str, Any]:  # Any: a data set or an array of rows; arguments of `lorica.attach`
    """What `lorica.attach` has to be given for this run's start; nothing for most methods.

    A new run's start is made from batches of training rows, drawn by its seed and the same on every
    process; where there are fewer rows they come again. The model is moved to the device of the
    run, where that holds all of it. A resumed run needs no data: its checkpoint holds the start.

    Args:
        plan: with `model`, `collator` and `arguments`.
        pool: gives the rows to draw from, as the collator takes them; called with how many would
            do.
    """
    assert plan.recipe is not None  # an adapter that is given brings its start
    init = plan.recipe.init
    if not isinstance(init, (StartsFromData, StartsFromUnquantised)):
        return {}
    if plan.checkpoint is not None:
        ranks = AdapterFile.read(plan.checkpoint).attach_as(plan.model).ranks
        return {"initialise": False, "ranks": ranks}
    if isinstance(init, StartsFromUnquantised):
        return {}  # `attach` finds the checkpoint
    training = plan.arguments.training
    size = training.per_device_train_batch_size
    rows = pool(size * init.batches)
    order: Any = torch.randperm(len(rows), generator=seeded(f"{plan.options.seed}/start")).tolist()
    places = itertools.cycle(order)
    if not training.fsdp:
        model: Any = plan.model  # Any: transformers' wrapper of `to` has no types
        model.to(plan.device)
    if plan.main:
        logger.info(
            f"`{plan.recipe.text()}` starts from {init.batches} batches of {size} training rows"
        )
    return {
        "data": (
            plan.collator([rows[i] for i in itertools.islice(places, size)])
            for _ in range(init.batches)
        )
    }
