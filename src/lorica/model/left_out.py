"""What `all-linear` leaves out of a model, and why: towers of other modalities, and layers whose
weight the model's own code reads past the layer."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from lorica.model.heads import within
from lorica.tensors.modules import named_modules

TOWERS = (
    "outside the language model; `adapt_towers=True` (`--adapt-towers`) adapts what is there, too"
)

ANY = "*"  # any of the modules of a list


def language_model(model: nn.Module) -> str | None:
    """Path of the language model within a model that has towers of other modalities beside it
    (LLaVA's vision tower); None: there are none, or no language model (CLIP, SAM)."""
    if not isinstance(model, PreTrainedModel):
        return None
    names = {id(m): n for n, m in named_modules(model)}
    get: Callable[[], nn.Module] = model.get_decoder
    decoder = get()
    if not isinstance(decoder, PreTrainedModel) or not names.get(id(decoder)):
        return None
    known: dict[str, Any] = vars(modeling_auto)["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"]
    config: Any = decoder.config  # Any: of whatever family
    if not model.can_generate() and config.model_type not in known:
        return None
    root = names[id(decoder)]
    parts = [m for n, m in named_modules(model) if n and not within(n, [root])]
    towers = [m for m in parts if isinstance(m, PreTrainedModel) and "text" not in _reads(m)]
    # An encoder of the language model's own kind (Whisper's) is no tower.
    return root if any(type(m.config) is not type(config) for m in towers) else None


def _reads(model: PreTrainedModel) -> tuple[str, ...]:
    kinds: str | Iterable[str] = model.input_modalities
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def outside_language_model(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """{layer: why} of those in the towers and in what connects them."""
    root = language_model(model)
    return {} if root is None else {n: TOWERS for n in layers if not within(n, [root])}


# -- weights read past the layer


def read_past(model: nn.Module, layers: Iterable[str]) -> dict[str, bool]:
    """{layer whose owner hands its whole weight to a function: whether it never calls the layer}.

    Mamba's kernels take `self.out_proj.weight`: an adapter in the layer's place is not asked then.
    """
    modules = dict(named_modules(model))
    found: dict[str, bool] = {}
    for name in layers:
        parts = name.split(".")
        for i in range(len(parts)):  # any ancestor may reach down to it
            owner, path = ".".join(parts[:i]), tuple(parts[i:])
            read, called = _uses(type(modules[owner]))
            if _among(path, read):
                found[name] = found.get(name, True) and not _among(path, called)
    return found


def _among(path: tuple[str, ...], patterns: set[tuple[str, ...]]) -> bool:
    """Whether a path fits one of those that `_uses` finds."""
    return any(
        len(p) == len(path) and all(a in (b, ANY) for a, b in zip(p, path, strict=True))
        for p in patterns
    )


@functools.cache
def _uses(kind: type[nn.Module]) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Paths below `self` of layers whose weight a class reads as a whole, and of those it calls;
    as its source says it, nothing where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return set(), set()
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    read: set[tuple[str, ...]] = set()
    called: set[tuple[str, ...]] = set()
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        if "init" in function.name or "reset" in function.name:  # these fill weights
            continue
        names = _names(function)
        for node in ast.walk(function):
            path = _below_self(node, names)
            parent = parents.get(node)
            if path and isinstance(parent, ast.Call) and parent.func is node:
                called.add(path)
            elif path and path[-1] == "weight" and len(path) > 1:
                if not _is_only_asked(parent):
                    read.add(path[:-1])
    return read, called


def _names(function: ast.FunctionDef) -> dict[str, tuple[str, ...]]:
    """{local name: path below `self`} of what a method calls modules: its own first argument,
    `layer = self.out`, `for block in self.blocks`, whose modules are any (`ANY`)."""
    first = [*function.args.posonlyargs, *function.args.args][:1]
    names: dict[str, tuple[str, ...]] = {a.arg: () for a in first}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target, value, more = node.targets[0], node.value, ()
        elif isinstance(node, (ast.For, ast.comprehension)):
            target, value, more = node.target, node.iter, (ANY,)
            if isinstance(value, ast.Call) and _is_name(value.func, "enumerate") and value.args:
                value = value.args[0]
                target = target.elts[-1] if isinstance(target, ast.Tuple) else target
        else:
            continue
        path = _below_self(value, names)
        if path and isinstance(target, ast.Name):
            names[target.id] = (*path, *more)
    return names


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _below_self(node: ast.AST, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """("mlp", "out", "weight") of `self.mlp.out.weight`, ("blocks", ANY) of `self.blocks[i]`; () of
    anything else. `names`: see `_names`."""
    path: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        path.append(node.attr if isinstance(node, ast.Attribute) else ANY)
        node = node.value
    if isinstance(node, ast.Name) and node.id in names:
        return (*names[node.id], *reversed(path))
    return ()


def _is_only_asked(parent: ast.AST | None) -> bool:
    """Whether what is done with a weight does not multiply with all of it: its dtype, a check of
    its type, a slice (as Bloom's under a tensor parallelism of its own)."""
    if isinstance(parent, ast.Attribute):
        return parent.attr not in ("T", "mT", "t", "to", "float", "transpose")
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "getattr")
    return isinstance(parent, ast.Subscript)
