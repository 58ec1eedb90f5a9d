"""`--help` of a command whose options are grouped."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from lorica.run.options import Group, Kind, kinds, shown

_COLUMN = 28  # where the explanations begin


def text(options: type, groups: Sequence[Group], prog: str) -> str:
    """The page, as wide as the terminal, 100 characters at most.

    Example:
        >>> from lorica.cli.train import Options
        >>> print(text(Options, Options.groups, "lorica train").splitlines()[0])
        usage: lorica train [FILE.yaml] [OPTIONS]
    """
    width = min(100, shutil.get_terminal_size().columns)
    about = inspect.cleandoc(options.__doc__ or "").partition("\nArgs:")[0].strip()
    lines = [f"usage: {prog} [FILE.yaml] [OPTIONS]", ""]
    for paragraph in about.split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width, break_on_hyphens=False), ""]
    fields = {f.name: f for f in dataclasses.fields(options)}
    every, told = kinds(options), explanations(options)
    for group in groups:
        lines.append(f"{group.title}:")
        for name in group.names:
            if name in every:
                default = fields[name].default
                lines += _option(options, name, every[name], told.get(name, ""), default, width)
        if group.further:
            names = ", ".join("--" + name.replace("_", "-") for name in group.further)
            lines += textwrap.wrap(
                f"of transformers: {names}", width, initial_indent="  ",
                subsequent_indent="    ", break_on_hyphens=False,
            )  # fmt: skip
        lines.append("")
    return "\n".join([*lines, "  -h, --help".ljust(_COLUMN) + "show this page"])


def _option(
    options: Any, name: str, kind: Kind | None, told: str, default: Any, width: int
) -> Iterator[str]:
    flags = [name, *(other for other, own in options.aliases.items() if own == name)]
    flag = ", ".join("--" + each.replace("_", "-") for each in flags)
    if kind is None:
        flag += ", --no-" + name.replace("_", "-")
    else:
        flag += f" {kind.metavar}"
        if (usual := " ".join(shown(default))) != "-":
            told += f" (default: {usual})"
    body = textwrap.wrap(told, width - _COLUMN, break_on_hyphens=False)
    if len(flag) + 4 > _COLUMN:
        yield f"  {flag}"
    else:
        yield f"  {flag}".ljust(_COLUMN) + (body.pop(0) if body else "")
    yield from (" " * _COLUMN + line for line in body)


def explanations(options: type) -> dict[str, str]:
    """{option: its text} of a class of options: what it says itself, else what its bases say."""
    found: dict[str, str] = {}
    for cls in options.__mro__:
        text = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\nArgs:\n")[2]
        for entry in re.split(r"\n    (?=\w)", "\n" + text)[1:]:
            name, _, told = entry.partition(":")
            found.setdefault(name, " ".join(told.split()))
    return found
