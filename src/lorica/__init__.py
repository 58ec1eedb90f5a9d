"""Lorica: training transformers through low-rank updates.

model = AutoModelForCausalLM.from_pretrained(...)
adapters = lorica.attach(model, "dora+olora", r=16)
optimizer = lorica.optimizer(adapters, lr=2e-4)
...
lorica.save(adapters, "out")
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module: loaded on first use, so that `import lorica` costs nothing
_WHERE = {
    "Adapters": "lorica.adapters",
    "Recipe": "lorica.recipe",
    "attach": "lorica.attach",
    "cite": "lorica.recipe",
    "detach": "lorica.attach",
    "load": "lorica.io",
    "merge": "lorica.attach",
    "optimizer": "lorica.bind",
    "save": "lorica.io",
}
__all__ = [
    "Adapters",
    "Recipe",
    "__version__",
    "attach",
    "cite",
    "detach",
    "load",
    "merge",
    "optimizer",
    "save",
]

if TYPE_CHECKING:
    from lorica.adapters import Adapters as Adapters
    from lorica.attach import attach as attach
    from lorica.attach import detach as detach
    from lorica.attach import merge as merge
    from lorica.bind import optimizer as optimizer
    from lorica.io import load as load
    from lorica.io import save as save
    from lorica.recipe import Recipe as Recipe
    from lorica.recipe import cite as cite


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """`lorica.attach` is the function, also once the submodule of that name has been imported: the
    import system would otherwise bind the submodule over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _WHERE or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
