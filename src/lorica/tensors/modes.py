"""The training and evaluation modes of a model's modules."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Within this context every module is in evaluation mode; afterwards each has its own mode
    again.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(model):
        ...     print([module.training for module in model])
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
