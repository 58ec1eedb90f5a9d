"""Finds methods by walking the packages of `lorica.methods`: a new file is a new method.

Nothing lists the methods. Files that start with `_` hold what several methods of an axis share, and
`base.py` holds the axis' abstract class.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

import lorica.methods
from lorica.methods.choice import AXES, CAPABILITIES, Choice, source

__all__ = [
    "AXES", "CAPABILITIES", "axis_of", "build", "find", "names", "normalise", "source", "unknown",
]  # fmt: skip

_NO_METHODS = ("base",)


def normalise(name: str) -> str:
    """Lower case without `-` and `_`: the spelling in which names are compared."""
    return name.lower().replace("-", "").replace("_", "")


@functools.cache
def names(axis: str) -> tuple[str, ...]:
    """The methods of an axis, in alphabetical order, without importing their files."""
    folder = Path(next(iter(lorica.methods.__path__))) / axis
    found = (m.name for m in pkgutil.iter_modules([str(folder)]))
    return tuple(sorted(n for n in found if not n.startswith("_") and n not in _NO_METHODS))


@functools.cache
def axis_of(name: str) -> str | None:
    """The axis whose package holds the method; None: there is no such method."""
    for axis in AXES:
        if name in names(axis):
            return axis
    return None


@functools.cache
def find(name: str, axis: str | None = None) -> type[Choice]:
    """The class that `name` means, or the one that its file holds for another `axis`.

    Raises:
        ValueError: no method has this name, or it holds nothing for that axis.
    """
    home = axis_of(name)
    if home is None:
        raise ValueError(unknown(name))
    module = importlib.import_module(f"lorica.methods.{home}.{name}")
    if "__path__" in vars(module):  # a folder: the method is in the file of the same name
        module = importlib.import_module(f"lorica.methods.{home}.{name}.{name}")
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Choice) and c.__module__ == module.__name__
    ]
    mine = [c for c in classes if c.axis == (axis or home)]
    if len(mine) != 1:
        raise ValueError(
            f"`{name}` is no choice of the axis `{axis}`; allowed there:"
            f" {', '.join(names(axis or home))}"
        )
    return mine[0]


def unknown(name: str) -> str:
    """The message for a name that no method has."""
    every = [n for axis in AXES for n in names(axis)]
    near = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else "`lorica methods` lists all methods"
    return f"unknown method `{name}`: {hint} Known methods: {', '.join(sorted(every))}"


def build(name: str, arguments: Mapping[str, object], axis: str | None = None) -> Choice:
    """Make the choice.

    Raises:
        ValueError: an unknown argument (the message lists the known ones), or one that the method
            refuses.
    """
    cls = find(name, axis)
    known = [f.name for f in dataclasses.fields(cls)]
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            allowed = ", ".join(f"`{k}`" for k in known) or "none"
            hint = f"type `{name}({near[0]}=...)`" if near else f"type `{name}` without it"
            raise ValueError(
                f"`{name}` has no argument `{argument}`; its arguments: {allowed}. Instead {hint}"
            )
    make: Callable[..., Choice] = cls
    return make(**arguments)
