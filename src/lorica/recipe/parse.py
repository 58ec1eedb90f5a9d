"""The text form of a method: words joined by `+`, each with arguments in the call's form.

dora+olora+rslora        pissa(niter=16)+loraplus(loraplus_lr_ratio=8)

A file may hold a choice of a second axis beside its main one; that choice alone is written with the
axis before the word, `init.<word>`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from lorica.methods.choice import AXES, Choice
from lorica.recipe.registry import axis_of, build, normalise, unknown
from lorica.text import cut

_PART = re.compile(r"\s*([A-Za-z][\w-]*(?:\.[\w-]+)?)\s*(?:\((.*)\))?\s*", re.S)


def choices_of(method: str | Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Recipe` that `method`, a text or a mapping {word: {argument: value}}, fills.

    Raises:
        ValueError: an unknown word or argument, a text that does not parse, two words on one axis.
    """
    try:
        return _choices(_words(method))
    except ValueError as error:
        raise ValueError(cut(str(error))) from None


def _words(method: str | Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(method, Mapping):
        return [(str(word), dict(arguments or {})) for word, arguments in method.items()]
    if not method.strip():
        raise ValueError("the method is empty; a method is words joined by `+`, e.g. `dora+olora`")
    parts: list[str] = []
    depth = start = 0
    for i, c in enumerate(method + "+"):
        depth += (c == "(") - (c == ")")
        if c == "+" and depth <= 0:
            parts.append(method[start:i])
            start = i + 1
    if depth:
        raise ValueError(f"`{method}`: a bracket is open or missing; write e.g. `pissa(niter=16)`")
    return [_word(part, method) for part in parts]


def _word(part: str, method: str) -> tuple[str, dict[str, Any]]:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(
            f"`{part}` in `{method}` is no word; write e.g. `dora` or `pissa(niter=16)`"
        )
    word, arguments = match.groups()
    if not (arguments or "").strip():
        return word, {}
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError("arguments have names")
        return word, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"`{part.strip()}`: the arguments are not of the form name=value ({error}); "
            "write e.g. `pissa(niter=16)`"
        ) from None


def _place(word: str) -> tuple[str, str]:
    """(room, word): the home of the word's file, or the axis that stands before the word."""
    axis, _, name = normalise(word).rpartition(".")
    rooms = {field: room for room, (field, _, _) in AXES.items()}
    room = rooms.get(axis) if axis else axis_of(name)
    if room is None:
        raise ValueError(unknown(normalise(word)))
    return room, name


def _choices(given: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Fields of Recipe from words: the user's first, then the presets' where nothing was said."""
    by_room: dict[str, list[Choice]] = {}
    for word, arguments in given:
        room, word = _place(word)
        choice = build(word, arguments, room)
        others = by_room.setdefault(room, [])
        if any(o.name == choice.name for o in others) or (others and not AXES[room][2]):
            raise ValueError(
                f"`{others[0].name}` and `{choice.name}` both choose the axis `{AXES[room][0]}`; "
                "name one of them"
            )
        others.append(choice)
    named = {room: list(choices) for room, choices in by_room.items()}
    whose: dict[str, str] = {}
    for choice in [c for choices in named.values() for c in choices]:
        for room, text in choice.preset.items():
            word, arguments = _words(text)[0]
            wanted = build(_place(word)[1], arguments, room)
            if AXES[room][2]:
                others = by_room.setdefault(room, [])
                same = next((o for o in others if o.name == wanted.name), None)
                if same is None:
                    others.append(wanted)
                    whose[wanted.name] = choice.name
                elif same != wanted and same not in named.get(room, []):
                    raise ValueError(
                        f"`{choice.name}` brings `{text}`, and `{whose[wanted.name]}` brings"
                        f" `{same.text()}`; leave one of the two out, or name the one you want"
                    )
                continue
            held = named.get(room) or by_room.get(room)
            if held and held[0] != wanted and (room in choice.requires or room not in named):
                by = held[0].name if room in named else whose[room]
                raise ValueError(
                    f"`{choice.name}` fills the axis `{AXES[room][0]}` with `{text}`, and `{by}`"
                    f" fills it with `{held[0].text()}`; leave one of the two out"
                )
            if not held:
                by_room[room], whose[room] = [wanted], choice.name
    return {
        AXES[room][0]: tuple(choices) if AXES[room][2] else choices[0]
        for room, choices in by_room.items()
        if choices
    }
