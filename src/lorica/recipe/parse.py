"""The text form of a method: names joined by `+`, each with arguments as in a call.

dora+olora+rslora        pissa(niter=16)+loraplus(loraplus_lr_ratio=8)

A file may hold a choice for a second axis beside its main one; that choice alone is written with
the axis before the name, `init.<name>`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from lorica.methods.choice import AXES, Choice
from lorica.recipe.registry import axis_of, build, normalise, unknown
from lorica.text import cut

Arguments = Mapping[str, Any]  # Any: each method has arguments of its own
Part = tuple[str, dict[str, Any]]  # a name and its arguments; Any: as above
_PART = re.compile(r"\s*([A-Za-z][\w-]*(?:\.[\w-]+)?)\s*(?:\((.*)\))?\s*", re.S)


def choices_of(method: str | Arguments) -> dict[str, Any]:
    """Fields of `Recipe` that `method`, a text or a mapping {name: {argument: value}}, fills.

    Raises:
        ValueError: an unknown name or argument, a text that does not parse, two methods on one axis
            that takes one.
    """
    try:
        return _choices(_parts(method))
    except ValueError as error:
        raise ValueError(cut(str(error))) from None


def _parts(method: str | Arguments) -> list[Part]:
    if isinstance(method, Mapping):
        return [(str(name), dict(arguments or {})) for name, arguments in method.items()]
    if not method.strip():
        raise ValueError("the method is empty; give names joined by `+`, e.g. `dora+olora`")
    parts: list[str] = []
    depth = start = 0
    for i, c in enumerate(method + "+"):
        depth += (c == "(") - (c == ")")
        if c == "+" and depth <= 0:
            parts.append(method[start:i])
            start = i + 1
    if depth:
        raise ValueError(f"`{method}`: a bracket is missing; write e.g. `pissa(niter=16)`")
    return [_part(part, method) for part in parts]


def _part(part: str, method: str) -> Part:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(
            f"`{part}` in `{method}` is not a method's name; write e.g. `dora` or `pissa(niter=16)`"
        )
    name, arguments = match.groups()
    if not (arguments or "").strip():
        return name, {}
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError("arguments have names")
        return name, {str(k.arg): _value(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"`{part.strip()}`: the arguments are not of the form name=value ({error}); "
            "write e.g. `pissa(niter=16)`"
        ) from None


def _value(node: ast.expr) -> Any:  # Any: each argument's own type
    """A literal; a bare word is a string, as a shell would swallow its quotes."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _place(text: str) -> tuple[str, str]:
    """(axis, name): the axis of the method's file, or the one that is written before the name."""
    field, _, name = normalise(text).rpartition(".")
    axes = {a.field: axis for axis, a in AXES.items()}
    axis = axes.get(field) if field else axis_of(name)
    if axis is None:
        raise ValueError(unknown(normalise(text)))
    return axis, name


def _choices(given: list[Part]) -> dict[str, Any]:
    """Fields of Recipe from names: the user's first, then those that a method's preset adds."""
    by_axis: dict[str, list[Choice]] = {}
    for name, arguments in given:
        axis, name = _place(name)
        choice = build(name, arguments, axis)
        others = by_axis.setdefault(axis, [])
        if any(o.name == choice.name for o in others) or (others and not AXES[axis][2]):
            raise ValueError(
                f"`{others[0].name}` and `{choice.name}` both choose the axis `{AXES[axis][0]}`; "
                "name one of them"
            )
        others.append(choice)
    named = {axis: list(choices) for axis, choices in by_axis.items()}
    whose: dict[str, str] = {}
    for choice in [c for choices in named.values() for c in choices]:
        for axis, text in choice.preset.items():
            name, arguments = _parts(text)[0]
            wanted = build(_place(name)[1], arguments, axis)
            if AXES[axis][2]:
                others = by_axis.setdefault(axis, [])
                same = next((o for o in others if o.name == wanted.name), None)
                if same is None:
                    others.append(wanted)
                    whose[wanted.name] = choice.name
                elif same != wanted and same not in named.get(axis, []):
                    raise ValueError(
                        f"`{choice.name}` brings `{text}`, and `{whose[wanted.name]}` brings"
                        f" `{same.text()}`; leave one of the two out, or name the one you want"
                    )
                continue
            held = named.get(axis) or by_axis.get(axis)
            if held and held[0] != wanted and (axis in choice.requires or axis not in named):
                by = held[0].name if axis in named else whose[axis]
                raise ValueError(
                    f"`{choice.name}` fills the axis `{AXES[axis][0]}` with `{text}`, and `{by}`"
                    f" fills it with `{held[0].text()}`; leave one of the two out"
                )
            if not held:
                by_axis[axis], whose[axis] = [wanted], choice.name
    return {
        AXES[axis][0]: tuple(choices) if AXES[axis][2] else choices[0]
        for axis, choices in by_axis.items()
        if choices
    }
