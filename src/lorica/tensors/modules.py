"""Walks over a model's modules, with types that torch's own lack."""

from __future__ import annotations

from torch import nn


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> list[tuple[str, nn.Module]]:
    """(path, module) of a model and all within it, a parent before its children.

    Args:
        remove_duplicate: a module with several names is listed once, under the first.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):  # pyright: ignore
        found.append((name, module))
    return found
