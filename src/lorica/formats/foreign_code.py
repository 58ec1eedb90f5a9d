# pyright: strict
"""What in a model's configuration makes transformers fetch and run somebody's code.

`trust_remote_code=False` holds off a model's own Python files, and nothing else: an implementation
of attention may be a repository (`someone/kernel`), and where the package `kernels` is installed,
so may what a quantised model computes with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from lorica.text import DEEP, check_depth, shorten

_WAY = re.compile(r"_?\w+_implementation(_internal)?")  # attention's, the experts', ...
_INSTALLED = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|grouped_mm|batched_mm)")
_FLASH = re.compile(r"(paged\|)?flash_attention_\d")
_KERNELS = ("use_kernels", "kernel_config")


def read_config_dict(name: str) -> dict[str, Any]:  # Any: JSON values
    """The config.json of a folder or a hub id, before anything acts on it."""
    from transformers import PretrainedConfig

    configs: Any = PretrainedConfig  # Any: transformers types it in part
    try:
        config = configs.get_config_dict(name)[0]
    except RecursionError:
        raise ValueError(DEEP) from None
    check_depth(config)
    return config


def refuse_code(
    config: Mapping[str, Any], where: str, *, attn_implementation: str | None = None
) -> None:
    """Refuse a configuration that makes transformers run code which is not installed.

    Args:
        config: as `read_config_dict` returns it.
        where: the file, for the message.
        attn_implementation: what the user asked for in place of the file's, so that its own is not
            looked at.

    Raises:
        ValueError: naming the key and its value.

    Example:
        >>> refuse_code({"attn_implementation": "sdpa"}, "config.json")
        >>> refuse_code({"attn_implementation": "a/kernel"}, "b")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: b: `attn_implementation` is 'a/kernel', code that would be fetched and run...
    """
    for key, value in _entries(config):
        ours = attn_implementation is not None and "attn" in key
        if _WAY.fullmatch(key) and not ours and not all(map(_here, _ways(value))):
            what = f"`{key}` is {shorten(value)}, code that would be fetched and run"
        elif key in _KERNELS and value:
            what = f"`{key}` is {shorten(value)}, and asks for kernels that would be fetched"
        elif key == "quantization_config" and value and find_spec("kernels") is not None:
            what = "its quantised weights are computed with kernels that would be fetched"
        else:
            continue
        raise ValueError(
            f"{where}: {what}. Nothing that a file names is run: take the key out of the file, or,"
            " where you trust its authors, type `--trust-remote-code`"
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object, at any depth, with its value."""
    if isinstance(value, Mapping):
        for key, part in value.items():  # pyright: ignore[reportUnknownVariableType]
            yield str(key), part  # pyright: ignore[reportUnknownArgumentType]
            yield from _entries(part)
    elif isinstance(value, list):
        for part in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _entries(part)


def _ways(value: Any) -> Iterator[Any]:
    """The names that an implementation is given by: one, or one for each part of the model."""
    if isinstance(value, Mapping):
        for part in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _ways(part)
    else:
        yield value


def _here(way: Any) -> bool:
    """Whether such an implementation is among what is installed."""
    if way is None:
        return True
    flash = bool(_FLASH.fullmatch(str(way)))
    if flash and find_spec("kernels") is not None and find_spec("flash_attn") is None:
        return False  # transformers takes it from a repository then
    return flash or bool(_INSTALLED.fullmatch(str(way)))
