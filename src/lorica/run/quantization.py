"""Which quantisation the user asked for, as transformers' configuration of it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lorica.run.options.checks import UsageError, json_option
from lorica.text import shorten

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lorica.recipe import Recipe

METHODS = ("bitsandbytes", "torchao")  # transformers' `quant_method`, named as their packages


def asked(
    *, load_in_4bit: bool = False, load_in_8bit: bool = False, quantization: str | None = None
) -> Any:  # Any: transformers has a class for each method
    """transformers' configuration of what the options ask for; None: nothing.

    4 bits mean nf4 with double quantisation, as in Dettmers et al., QLoRA, arXiv 2305.14314, 2023,
    multiplied in bfloat16 on a GPU and in float32 elsewhere.

    Args:
        quantization: transformers' own fields as JSON, or a file of them, such as
            `{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}`.

    Raises:
        UsageError: more than one of the three; fields that transformers refuses; a method that
            Lorica can't read, or whose package isn't installed.
    """
    given = {
        "--load-in-4bit": load_in_4bit,
        "--load-in-8bit": load_in_8bit,
        "--quantization": quantization is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} each say how to quantise the base; give one")
    if not names:
        return None
    fields = {"quant_method": "bitsandbytes", "load_in_8bit": load_in_8bit}
    if load_in_4bit:
        import torch

        compute = "bfloat16" if torch.cuda.is_available() else "float32"
        fields |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        fields |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    elif quantization is not None:
        fields = _fields(quantization)
    return config_from(names[0], fields)


def _fields(text: str) -> dict[str, Any]:
    fields = json_option("quantization", text)
    if not isinstance(fields.get("quant_method"), str):
        raise UsageError(
            f"`--quantization {shorten(text)}` has to hold `quant_method`, one of"
            f" {', '.join(METHODS)}, and that method's fields as transformers names them"
        )
    return fields


def config_from(option: str, fields: dict[str, Any]) -> Any:
    """transformers' configuration of a method that quantises while it loads.

    Args:
        option: what asks for it, for the message.

    Raises:
        UsageError: see `asked`.
    """
    method = fields["quant_method"]
    if method not in METHODS:
        raise UsageError(
            f"`{option}` names the method {shorten(method)!r}, whose weights Lorica can't read;"
            f" allowed: {', '.join(METHODS)}"
        )
    check_installed(method, option)
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(fields)
    except Exception as error:  # each method of transformers raises its own
        raise UsageError(f"`{option}`: transformers refuses these fields: {error}") from None


def check_installed(method: str, what: str) -> None:
    """Raises:
    UsageError: the package that reads this method's weights isn't installed.
    """
    if method in METHODS and importlib.util.find_spec(method) is None:
        raise UsageError(
            f"{what} needs the package {method}, which isn't installed: `pip install {method}`"
        )


def packed_layers(
    name: str, config: PretrainedConfig, wanted: Any, *, trust_remote_code: bool = False
) -> tuple[str, frozenset[str]]:
    """(transformers' fields of the quantisation, as text; paths of the modules that it packs), from
    the configuration alone; an empty text where nothing is quantised, and no paths where it is by a
    method that Lorica doesn't read.

    Args:
        wanted: what `asked` returned.
    """
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    from lorica.run.load_model import empty_model

    stored = stored_in(config)
    if wanted is None and stored is None:
        return "", frozenset()
    how: Any = wanted
    if stored is not None and stored.get("quant_method") not in METHODS:
        return str(stored.get("quant_method")), frozenset()
    if stored is not None:
        check_installed(str(stored.get("quant_method")), f"`{name}` is quantised, and")
        how = config_from(f"`{name}`'s quantization_config", stored)
    plain = empty_model(name, trust_remote_code=trust_remote_code)
    packed = empty_model(name, trust_remote_code=trust_remote_code)
    quantizer: Any = AutoHfQuantizer.from_config(how, pre_quantized=wanted is None)
    with torch.device("meta"):
        quantizer.preprocess_model(packed, device_map=None)
    kinds = {n: type(m) for n, m in packed.named_modules()}
    paths = {
        n
        for n, m in plain.named_modules()
        if kinds.get(n) is not type(m)
        or ("weight" in m._parameters and quantizer.param_needs_quantization(packed, f"{n}.weight"))
    }
    fields: dict[str, Any] = how.to_diff_dict()
    method = str(how.to_dict()["quant_method"].value)
    said = [
        k if v is True else f"{k}={shorten(v, 60)}"
        for k, v in fields.items()
        if k != "quant_method" and not k.startswith("_")
    ]
    return f"{method} ({', '.join(said)})" if said else method, frozenset(paths)


def stored_in(config: PretrainedConfig) -> dict[str, Any] | None:
    """transformers' fields of how a checkpoint's weights are quantised; None: they aren't."""
    stored: Any = vars(config).get("quantization_config")
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()


def refuse_twice(wanted: Any, config: PretrainedConfig, name: str) -> None:
    """Raises:
    UsageError: a checkpoint that is quantised is to be quantised.
    """
    if wanted is not None and stored_in(config) is not None:
        raise UsageError(
            f"`{name}` is quantised already; leave `--load-in-4bit`, `--load-in-8bit` and"
            " `--quantization` out"
        )


def check_method(recipe: Recipe, wanted: Any, config: PretrainedConfig, name: str) -> None:
    """The method goes with how the base is stored: a quantised one is not written to, and a start
    that reads what quantisation took away has something to read.

    Args:
        wanted: what `asked` returned.
        config: the checkpoint's.
        name: the checkpoint's, for the message.

    Raises:
        UsageError, ValueError: it doesn't; or a quantised checkpoint is to be quantised.
    """
    from lorica.methods.optional import StartsFromUnquantised
    from lorica.model.bases._quantised import Quantised
    from lorica.recipe.compatibility import check_quantised

    stored = stored_in(config)
    refuse_twice(wanted, config, name)
    if wanted is not None:
        check_quantised(recipe, Quantised.gives, "the base is to be loaded quantised")
    elif stored is not None:
        check_installed(str(stored.get("quant_method")), f"`{name}` is quantised, and")
        check_quantised(recipe, Quantised.gives, f"`{name}` is quantised")
    if wanted is None and isinstance(recipe.init, StartsFromUnquantised):
        why = "is not quantised" if stored is None else "holds packed weights alone"
        raise UsageError(
            f"`{recipe.text()}` starts from what quantisation takes away, and `{name}` {why}; name"
            " an unquantised model and quantise it here, with `--load-in-4bit`"
        )
