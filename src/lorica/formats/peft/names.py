"""Names for modules in PEFT's files: the shortest ones that PEFT resolves to exactly these."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from torch import nn

from lorica.model.experts import AdaptedExperts
from lorica.model.layer import AdaptedLinear
from lorica.model.modules_to_save import TrainedModule
from lorica.model.token_rows import TokenRows
from lorica.patterns import find

SHADOWS = r"(^|.*\.){}($|\..*)"  # PEFT keeps adapters away from what lies below such a name


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under the path it has without adapters, shared ones under each of their
    paths."""
    return dict(_walk(model, ""))


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, (AdaptedLinear, AdaptedExperts, TrainedModule, TokenRows)):
        module = module.base
    if path:
        yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name)


def _endings(path: str) -> list[str]:
    """The path's endings on whole components, shortest first."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def shortest(wanted: Collection[str], every: Iterable[str]) -> tuple[str, ...] | str:
    """A list of path endings that matches exactly `wanted`, else a regular expression for whole
    paths that does.

    Example:
        >>> shortest(["a.q", "b.q", "a.o"], ["a.q", "b.q", "a.o", "b.o", "a", "b"])
        ('a.o', 'q')
    """
    foreign = {e for path in set(every) - set(wanted) for e in _endings(path)}
    found = set()
    for path in wanted:
        ending = next((e for e in _endings(path) if e not in foreign), None)
        if ending is None:
            return "|".join(re.escape(p) for p in sorted(wanted))
        found.add(ending)
    return tuple(sorted(found))


def trained_names(
    wanted: Collection[str], every: Iterable[str], adapted: Collection[str]
) -> tuple[str, ...] | None:
    """Names for PEFT's `modules_to_save` that mean exactly `wanted`, or None where none do.

    PEFT takes every module whose path *ends in the characters* of such a name (not on whole
    components), and keeps adapters away from whatever lies below a component of that name.
    """
    every, found = list(every), set()
    for path in wanted:
        for ending in _endings(path):
            means = {p for p in every if p.endswith(ending)}
            if means <= set(wanted) and not shadows(ending, adapted):
                found.add(ending)
                break
        else:
            return None
    return tuple(sorted(found))


def in_full(patterns: Iterable[str], every: Iterable[str]) -> list[str]:
    """The modules that PEFT trains in full under these `modules_to_save`."""
    saved = [n for n in every if any(n.endswith(p) for p in patterns)]
    return [n for n in saved if not any(n != o and n.startswith(o + ".") for o in saved)]


def shadows(name: str, adapted: Iterable[str]) -> bool:
    """Whether PEFT would refuse to adapt one of `adapted` beside the saved module `name`."""
    return bool(find([name], adapted, form=SHADOWS, how="match")[name])
