"""The model as it was before its adapters, without a second copy: what preference objectives
compare with."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorica.model.adapters import Adapters
from lorica.tensors.modules import evaluating


class Reference(nn.Module):
    """Calls the adapted model with its adapters disabled.

    Anything else asked of it (configuration, device, dtype) is the model's. The model is no child
    of this module: it has no parameters of its own to move, save or shard.

    Args:
        adapters: of a model whose base training leaves unchanged.

    Raises:
        ValueError: on a call, when training has written to the base.

    Example:
        >>> import torch, lorica
        >>> from lorica.run import Reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> reference = Reference(lorica.attach(model, "lora", r=2, verbose=False))
        >>> sum(p.numel() for p in reference.parameters())
        0
    """

    def __init__(self, adapters: Adapters) -> None:
        super().__init__()
        vars(self)["adapters"] = adapters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not `forward`: trainers patch that of a reference, and the model's own is patched already.
        adapters = self.adapters
        with adapters.disabled(), evaluating(adapters.model):
            return adapters.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["adapters"].model, name)
