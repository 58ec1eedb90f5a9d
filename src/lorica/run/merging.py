"""What a merge of the command line has to load, and what it writes: decided before any weights are
read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorica.run.load_model import find_base, read_config
from lorica.run.options import UsageError
from lorica.run.quantization import (
    METHODS,
    check_installed,
    config_from,
    refuse_twice,
    stored_in,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How an adapter and its base are merged.

    Attributes:
        base: name of the model that the adapter was trained on.
        load_as: transformers' configuration of how to quantise it while loading, or None.
        published: name of the unquantised model to merge into instead, or None.
        quantise_again: transformers' configuration of how to quantise what was merged, or None.
    """

    base: str
    load_as: Any = None  # Any: transformers has a class for each method
    published: str | None = None
    quantise_again: Any = None

    @classmethod
    def of(
        cls,
        adapter: str,
        base: str | None,
        *,
        into: str | None,
        published: str | None,
        wanted: Any,
        check_base: bool = True,
        trust_remote_code: bool = False,
    ) -> Plan:
        """Decide it.

        Args:
            base: None: the one that the adapter names.
            into, published: as the user gave them, see `lorica merge --help`.
            wanted: transformers' configuration of how the base was quantised while it was loaded.
            check_base: it has to be said how, if the adapter's base was quantised.

        Raises:
            UsageError: what was asked for can't be had, or says nothing here.
        """
        from lorica.embedded import located

        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        name, told, config = find_base(adapter, base, **trust)
        stored = stored_in(config)
        refuse_twice(wanted, config, name)
        if stored is None and wanted is None:
            dtype = told["base"].get("dtype") if check_base else None
            _refuse_unquantised(adapter, name, dtype, into, published)
            return cls(base=name)
        if stored is not None:
            check_installed(str(stored.get("quant_method")), f"`{name}` is quantised, and")
        if published is not None:
            published = located(published)
            if stored_in(read_config(published, **trust)) is not None:
                raise UsageError(
                    f"`--published {published}` is quantised itself; name the original"
                )
            if stored is None:
                raise UsageError(
                    f"`--published` names the original of a base that is stored quantised, and"
                    f" `{name}` is not; leave it out"
                )
        origin = name if stored is None else published
        if into == "published" and origin is None:
            raise UsageError(
                f"`--into published`: `{name}` holds packed weights alone; name the unquantised"
                " model with `--published`, or type `--into dequantised`"
            )
        if into == "dequantised":
            if published is not None:
                raise UsageError(
                    "`--published` has no effect with `--into dequantised`; leave one out"
                )
            origin = None
        again = None
        if into == "quantised":
            again = wanted if stored is None else _again(stored, name)
        return cls(base=name, load_as=wanted, published=origin, quantise_again=again)


def _again(stored: dict[str, Any], name: str) -> Any:
    method = str(stored.get("quant_method"))
    if method not in METHODS:
        raise UsageError(
            f"`--into quantised`: `{name}` is quantised by {method}, which needs data to quantise a"
            f" model; only {', '.join(METHODS)} quantise one while it is loaded. Type `--into"
            " dequantised`"
        )
    return config_from("--into quantised", stored)


def _refuse_unquantised(
    adapter: str, name: str, dtype: str | None, into: str | None, published: str | None
) -> None:
    """Raises:
    UsageError: options about a quantised base where there is none; or the adapter says that its
        base was quantised, and no option says how.
    """
    from lorica.formats.lorica_json import is_packed

    given = [n for n, v in (("--into", into), ("--published", published)) if v is not None]
    if dtype is not None and is_packed(dtype):
        raise UsageError(
            f"`{adapter}` was trained on a base in {dtype}, and `{name}` is not quantised; say how"
            " it was, so that the change can be measured: `--load-in-4bit`, `--load-in-8bit` or"
            " `--quantization`"
        )
    if given:
        raise UsageError(
            f"`{given[0]}` is about a quantised base, and `{name}` is none; leave it out"
        )
