"""Lorica trains transformers through low-rank updates.

    model = AutoModelForCausalLM.from_pretrained(...)
    adapters = lorica.attach(model, "dora+olora", r=16)
    optimizer = lorica.optimizer(adapters, lr=2e-4)
    ...  # a training loop with loss = adapters.loss(model(**batch), batch)
    lorica.save(adapters, "out")

These functions are the Python API. `lorica.run` holds the Trainer, `lorica.data` prepares data, and
`lorica.cli` is the command line. `docs/architecture.md` shows how the packages work together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module: loaded on first use, so that `import lorica` costs nothing
_WHERE = {
    "Adapters": "lorica.model.adapters",
    "Recipe": "lorica.recipe.recipe",
    "attach": "lorica.model.attach",
    "cite": "lorica.recipe.recipe",
    "detach": "lorica.model.attach",
    "load": "lorica.formats",
    "merge": "lorica.model.attach",
    "optimizer": "lorica.training.bind",
    "save": "lorica.formats",
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
    from lorica.formats import load as load
    from lorica.formats import save as save
    from lorica.model.adapters import Adapters as Adapters
    from lorica.model.attach import attach as attach
    from lorica.model.attach import detach as detach
    from lorica.model.attach import merge as merge
    from lorica.recipe.recipe import Recipe as Recipe
    from lorica.recipe.recipe import cite as cite
    from lorica.training.bind import optimizer as optimizer


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
