"""Readers that refuse what they can't vouch for, and say where and why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.text import CONTROL, clear_errors, parse_json, shorten, to_path

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
OWN_CONFIG = "lorica.json"
OWN_TENSORS = "lorica.safetensors"

# What an adapter's file holds: what trains, and buffers (counts, masks) of modules saved in full.
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# What a hub adapter's repository has for its user, beside the adapter itself.
_COMPANIONS = (
    "labels.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "chat_template*", "additional_chat_templates/*",
    "*processor_config.json",
)  # fmt: skip


def check_file(path: Path) -> None:
    """Whether this is a file with an end, or a link to one (a hub's cache has links).

    Raises:
        ValueError: it is missing, or a folder, a pipe, a device.
    """
    if path.is_file():
        return
    if not os.path.lexists(path):
        raise ValueError(
            f"{path} is missing; the folder holds {entries(path.parent)}. Copy the whole folder"
        )
    raise ValueError(
        f"{path} is no ordinary file (a folder, a pipe, a device, or a link that leads nowhere)."
        " Copy the whole folder again from where it came"
    )


def check_name(name: str, path: Path) -> None:
    """Whether a name that a file gives can be shown and looked up.

    Raises:
        ValueError: it holds control characters, or half surrogate pairs, or is endless.
    """
    if len(name) > 1000 or CONTROL.search(name):
        raise ValueError(
            f"{path}: {shorten(name)} is no name: names are at most 1000 printable characters. The"
            " file was changed; copy it again from where it came"
        )


@clear_errors()
def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; not-a-number, a key given twice and control characters are refused too.

    Raises:
        ValueError: with the file, and the line and column of what can't be read.
    """
    check_file(path)
    try:
        value = parse_json(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
        )
        _check_texts(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; the file is not JSON."
            " Save the adapter again, or copy the file again from where it came"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; the file is not what an adapter's"
            " configuration looks like. Copy it again from where it came"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: the file holds a {type(value).__name__}, and a configuration is an object"
            " `{...}`. Copy it again from where it came"
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise ValueError(f"the key {shorten(twice)} is given twice")
    return out


def _check_texts(value: Any) -> None:
    """Strings at any depth are texts that a terminal can be shown."""
    if isinstance(value, str) and CONTROL.search(value):
        raise ValueError(f"{shorten(value)} holds control characters")
    for part in [*value, *value.values()] if isinstance(value, dict) else ():
        _check_texts(part)
    for part in value if isinstance(value, list) else ():
        _check_texts(part)


def _no_constant(name: str) -> Any:
    raise ValueError(f"`{name}` is no JSON number")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened; what it raises within is told with the file.

    Raises:
        ValueError: the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({shorten(str(error), 300)}); it was truncated"
            " or changed. Copy it again from where it came, or save the adapter again"
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is missing, truncated or not safetensors; a tensor of a type that no
            adapter has.
    """
    with open_tensors(path) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
    for name, tensor in tensors.items():
        check_name(name, path)
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{path}: {shorten(name)} is of {tensor.dtype}; an adapter's tensors are of"
                f" {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}. Save the adapter"
                " again in one of these"
            )
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file of contiguous copies on the CPU: the format knows no shared
    memory."""
    from safetensors.torch import save_file  # looked up late, like `safe_open` above

    whole = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    save_file(whole, path, metadata={"format": "pt"})


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def entries(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    names = sorted(e.name + ("/" if e.is_dir() else "") for e in folder.iterdir())
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "nothing"


def locate(path: str | Path) -> Path:
    """The folder of an adapter: a local one, or a hub id (`owner/name`, or `owner/name@revision`),
    which is downloaded with the tokenizer and the labels that lie beside the adapter.

    Raises:
        ValueError: no such folder, no adapter in it, or the hub can't be reached.
    """
    folder = to_path(path)
    if not folder.exists():
        if not _HUB_ID.fullmatch(str(path)):
            raise ValueError(
                f"{str(path)!r} does not exist; an adapter is a folder, or a hub id of the form"
                " `owner/name` or `owner/name@revision`"
            )
        folder = _download(str(path))
    if not folder.is_dir():
        raise ValueError(
            f"{str(path)!r} is a file; name the folder that holds it, {str(folder.parent)!r}"
        )
    if (folder / OWN_CONFIG).exists() or (folder / PEFT_CONFIG).exists():
        return folder
    inside = [
        e.name for e in sorted(folder.iterdir()) if (e / OWN_CONFIG).exists()
        or (e / PEFT_CONFIG).exists()
    ]  # fmt: skip
    hint = f"; name the sub-folder, e.g. {str(folder / inside[0])!r}" if inside else ""
    raise ValueError(
        f"{str(path)!r} is no adapter folder: it has neither {OWN_CONFIG} nor {PEFT_CONFIG}, it"
        f" holds {entries(folder)}{hint}"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = name.partition("@")
    wanted = [PEFT_CONFIG, PEFT_TENSORS, OWN_CONFIG, OWN_TENSORS, *_COMPANIONS]
    try:
        found = snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
        return Path(found)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{name!r} is no folder here, and as a hub id it can't be had"
            f" ({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the"
            " name and the connection, or download the folder and name its path"
        ) from None


def tensor_file(folder: Path) -> Path:
    """PEFT's tensor file of a folder; pickles are refused.

    Raises:
        ValueError: there is none, or only a pickle.
    """
    if os.path.lexists(folder / PEFT_TENSORS):
        check_file(folder / PEFT_TENSORS)
        return folder / PEFT_TENSORS
    if (folder / PEFT_PICKLE).exists():
        raise ValueError(
            f"{folder / PEFT_PICKLE} is a pickle, which can run any code when it is read; only"
            f" {PEFT_TENSORS} is read. Load it once with PEFT, where you trust it, and"
            " `save_pretrained` it with safe serialisation"
        )
    raise ValueError(
        f"{folder} has {PEFT_CONFIG} but no {PEFT_TENSORS}; it holds {entries(folder)}. Copy the"
        " whole folder (a pickle, `.bin`, is not read)"
    )
