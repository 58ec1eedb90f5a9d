"""Words of the command line, and a YAML file that may stand first, become a verb's options."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml
from yaml.composer import ComposerError

from lorica.cli import _help
from lorica.cli._outcome import VerbOptions
from lorica.run.options import Kind, UsageError, Word, elsewhere, kinds
from lorica.text import to_path

O = TypeVar("O", bound=VerbOptions)  # noqa: E741
_POSITIONAL = getattr(tyro.conf.Positional[str], "__metadata__")[0]  # noqa: B009


def parse(options: type[O], words: Sequence[str], *, prog: str) -> O:
    """The options that `words` ask for.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong kind; of a file the line is named.
        SystemExit: after `--help` (0), or after an error that the parser has printed itself (2).
    """
    if options.groups and ("-h" in words or "--help" in words):
        print(_help.text(options, options.groups, prog))
        raise SystemExit(0)
    words = _switches(options, words)
    if words and not words[0].startswith("-") and not _positional(options):
        return _read(options, words[1:], prog, Path(words[0]))
    made = _read(options, words, prog, None)
    file = made.base_file()
    return made if file is None else _read(options, words, prog, file)


def _read(options: type[O], words: Sequence[str], prog: str, file: Path | None) -> O:
    values, others = ({}, {}) if file is None else _yaml(options, file)
    more: dict[str, Any] = {} if file is None else {"default": options(**values)}
    made, unknown = tyro.cli(options, prog=prog, args=words, return_unknown_args=True, **more)
    if not unknown and not others:
        return made
    table = options.others()
    known = set(_fields(options)) | (set() if table is None else table.names())
    strange = [(key, at) for key, (_, at) in others.items() if key not in known or table is None]
    if strange:
        raise UsageError(elsewhere.unknown(strange, known, flag=False, prog=prog))
    flags = [
        (word, "")
        for word in unknown
        if word.startswith("--") and (table is None or not table.takes(_name(word)))
    ]
    if flags:
        raise UsageError(elsewhere.unknown(flags, known, flag=True, prog=prog))
    if unknown and not unknown[0].startswith("--"):
        raise UsageError(
            f"`{unknown[0]}` is no option: options begin with `--`"
            + ("" if _positional(options) else "; a YAML file stands first")
        )
    assert table is not None
    taken = {key: table.value(key, value, place) for key, (value, place) in others.items()}
    return dataclasses.replace(made, further={**taken, **table.read(unknown)})  # type: ignore[call-arg]


def _name(word: str) -> str:
    return word.split("=")[0].lstrip("-").replace("-", "_")


def _fields(options: type) -> dict[str, Kind | None]:
    return {name: kind for name, kind in kinds(options).items() if name != "json"}


def _positional(options: type) -> bool:
    hints = get_type_hints(options, include_extras=True).values()
    return any(_POSITIONAL in getattr(hint, "__metadata__", ()) for hint in hints)


def _switches(options: type, words: Sequence[str]) -> list[str]:
    """`--bf16 true` and `--bf16 false` as `--bf16` and `--no-bf16`."""
    names = {name for name, kind in kinds(options).items() if kind is None}
    out: list[str] = []
    for word in words:
        last = out[-1] if out else ""
        name = last[2:].replace("-", "_")
        if last.startswith("--") and name in names and word.lower() in ("true", "false"):
            out[-1] = last if word.lower() == "true" else "--no-" + name.replace("_", "-")
        else:
            out.append(word)
    return out


# -- YAML ------------------------------------------------------------------------------------------


def _yaml(options: type[O], file: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, str]]]:
    """Values of the class's own fields, and the other keys with their values and places."""
    own, values, others = _fields(options), {}, {}
    for key, (value, place) in read_mapping(file).items():
        name = options.aliases.get(key, key)
        if name not in own:
            others[key] = (value, place)
            continue
        if name in values:
            raise UsageError(f"{place}: `{key}` says again what another key has said; leave it out")
        kind = own[name]
        try:
            values[name] = _switch(value) if kind is None else kind.from_yaml(value)
        except ValueError as error:
            raise UsageError(f"{place}: `{key}`: {error}") from None
    defaults = {f.name: f for f in dataclasses.fields(options)}
    values = {k: v for k, v in values.items() if v is not None or defaults[k].default is None}
    return values, others


def _switch(value: Any) -> bool:
    if isinstance(value, Word):
        return value.switch
    if not isinstance(value, bool):
        raise ValueError(f"true or false is wanted, not {value!r}")
    return value


def _at_once(path: str, flags: int) -> int:
    """`os.open` that does not wait for somebody to write into a pipe; reading it does."""
    number = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(number, True)
    return number


LONGEST = 1_000_000  # characters of a YAML file, which may be a device without an end


def read_mapping(file: Path) -> dict[str, tuple[Any, str]]:
    """{key: (value, "file, line n")} of a YAML file.

    Raises:
        UsageError: no such file, broken YAML, something else than a mapping, a key that stands
            twice.
    """
    try:
        with open(to_path(file), encoding="utf-8", opener=_at_once) as open_file:
            text = open_file.read(LONGEST + 1)
            if not text and stat.S_ISFIFO(os.fstat(open_file.fileno()).st_mode):
                raise UsageError(
                    f"cannot read `{file}`: it is a pipe, and nothing is written into it. Name a"
                    " file, or a pipe that a command fills"
                )
        if len(text) > LONGEST:
            raise UsageError(
                f"cannot read {file}: it has more than {LONGEST:,} characters, and no run needs"
                " that many. A YAML file may stand first; options begin with `--`"
            )
    except UsageError:
        raise
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split(". ")[0]
        if isinstance(error, UnicodeDecodeError):
            reason = "it is no UTF-8 text"
        raise UsageError(
            f"cannot read {file}: {reason}. A YAML file may stand first; options begin with `--`"
        ) from None
    loader, place = None, ""
    out: dict[str, tuple[Any, str]] = {}
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{file}, line 1: a mapping `key: value` is wanted, one option a line")
        _written_out(root, {})
        for key_node, value_node in root.value:
            place = f"{file}, line {key_node.start_mark.line + 1}"
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UsageError(f"{place}: a key is a name, not {key!r}")
            if key in out:
                raise UsageError(f"{place}: `{key}` stands there twice; leave one out")
            out[key] = (_value(loader, value_node), place)
        return out
    except UsageError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(
            f"{file}{line}: this is no YAML: {problem}. Each line is `key: value`"
        ) from None
    except RecursionError:
        raise UsageError(
            f"{file}: lists or mappings are nested too deeply; each line is `key: value`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # PyYAML on `!!int x`, ...
        raise UsageError(
            f"{place or file}: a value is not of the type that it claims or looks like"
            f" ({error}); write it in quotes, or mend it"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """What a key says. YAML 1.1 reads `no` as false: the option's type is to decide, so it stays a
    word, alone and in a list."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, part) for part in node.value]
    value = loader.construct_object(node, deep=True)
    if isinstance(value, bool) and isinstance(node, yaml.ScalarNode):
        if node.value.lower() not in ("true", "false"):
            return Word(node.value, value)
    return value


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes this is with every alias written out; a few lines can mean millions.

    Raises:
        YAMLError: more than a run's options could need.
    """
    if id(node) not in known:
        known[id(node)] = 1  # an alias within itself: the constructor refuses it
        held: list[yaml.Node] = []
        for part in node.value if isinstance(node, yaml.CollectionNode) else ():
            held += part if isinstance(part, tuple) else [part]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in held)
        if known[id(node)] > 100_000:
            raise ComposerError(
                None, None, "aliases stand for more than 100,000 values", node.start_mark
            )
    return known[id(node)]
