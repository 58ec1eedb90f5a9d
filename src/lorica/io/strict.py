"""Readers that refuse what they can't vouch for, and say where and why."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
OWN_CONFIG = "lorica.json"
OWN_TENSORS = "lorica.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; not-a-number and a key given twice are refused too.

    Raises:
        ValueError: with the file, and the line and column of what can't be read.
    """
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; the file is not JSON."
            " Save the adapter again, or copy the file again from where it came"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: {error or 'nested too deeply'}; the file is not what an adapter's"
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
        raise ValueError(f"the key {twice!r} is given twice")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"`{name}` is no JSON number")


def check_types(data: dict[str, Any], types: dict[str, tuple[type, ...]], path: Path) -> None:
    """Every key of `types` that is present has one of its types (`None` in place of any).

    Raises:
        ValueError: naming all that don't.
    """
    bad = [
        f"{key!r} is {data[key]!r}, not {' or '.join(t.__name__ for t in allowed)}"
        for key, allowed in types.items()
        if data.get(key) is not None
        and not (
            isinstance(data[key], allowed) and (bool in allowed or not isinstance(data[key], bool))
        )
    ]
    if bad:
        raise ValueError(
            f"{path}: {'; '.join(bad)}. Correct the file, or copy it again from where it came"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; the folder holds {entries(path.parent)}. Copy the whole folder"
        ) from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}); it was truncated or changed. Copy"
            " it again from where it came, or save the adapter again"
        ) from None


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
    """The folder of an adapter: a local one, or a hub id (`owner/name`), which is downloaded.

    Raises:
        ValueError: no such folder, no adapter in it, or the hub can't be reached.
    """
    folder = Path(path)
    if not folder.exists():
        if not _HUB_ID.fullmatch(str(path)):
            raise ValueError(
                f"{str(path)!r} does not exist; an adapter is a folder, or a hub id of the form"
                " `owner/name`"
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


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = [PEFT_CONFIG, PEFT_TENSORS, OWN_CONFIG, OWN_TENSORS]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{repository!r} is no folder here, and as a hub id it can't be had"
            f" ({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the"
            " name and the connection, or download the folder and name its path"
        ) from None


def tensor_file(folder: Path) -> Path:
    """PEFT's tensor file of a folder; pickles are refused.

    Raises:
        ValueError: there is none, or only a pickle.
    """
    if (folder / PEFT_TENSORS).exists():
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
