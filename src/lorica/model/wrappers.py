"""Which wrappers adapters may be attached through.

`torch.compile` is looked through (`lorica.tensors.modules.unwrapped`). A wrapper that reduces or
shards gradients has listed the parameters by the time it exists, so adapters that come later would
train alone on every process.
"""

from __future__ import annotations

import sys

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorica.tensors.modules import named_modules


def refuse_wrapped(model: nn.Module) -> None:
    """Check that neither the model nor anything within it is a wrapper that lists or replaces its
    parameters.

    Raises:
        ValueError: naming the wrapper, and what to do first.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"`model` is a {type(model).__name__}, and adapters belong to a torch module; load one"
            " first, e.g. `AutoModelForCausalLM.from_pretrained(name)`"
        )
    parallel = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)
    parallel += _loaded("deepspeed", "DeepSpeedEngine")
    peft = _loaded("peft", "PeftModel", "PeftMixedModel")
    peft += _loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    for path, module in named_modules(model):
        kind = type(module).__name__
        where = f"{path!r} is a {kind}" if path else f"this is a {kind}"
        if isinstance(module, parallel):
            raise ValueError(
                f"{where}, which listed the model's parameters when it was made: adapters that come"
                " later would not be reduced over the processes, and each process would train its"
                " own. Attach first, then wrap: `adapters = lorica.attach(model, ...)`, then"
                f" `{kind}(model)` or `accelerator.prepare(model)`. If adapters are attached"
                " already, give the model within the wrapper (`wrapper.module`)"
            )
        if isinstance(module, peft):
            raise ValueError(
                f"{where}, so PEFT has put an adapter into this model, and Lorica would adapt that"
                " adapter. Take it out first (`model = model.merge_and_unload()`, or"
                " `model.unload()`), or load its folder onto the plain base with"
                " `lorica.load(model, folder)`"
            )


def _loaded(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Classes of a package that Lorica doesn't import itself; none where it isn't imported."""
    found = sys.modules.get(module)
    return () if found is None else tuple(getattr(found, name) for name in names)
