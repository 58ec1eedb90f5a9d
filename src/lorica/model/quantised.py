"""A model whose weights are partly quantised: what of it is, how large that is, and the plain model
of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lorica.model.bases._quantised import Quantised
from lorica.model.bases.base import FLOATING, base_for
from lorica.tensors.modules import named_modules


def quantised(model: nn.Module) -> dict[str, Quantised]:
    """{module path: its base} of every module that holds a quantised weight."""
    found: dict[str, Quantised] = {}
    for name, module in named_modules(model):
        kind = base_for(module)
        if kind is not None and issubclass(kind, Quantised) and kind.refuses(module) is None:
            found[name] = kind(module)
    return found


def unreadable(model: nn.Module) -> dict[str, str]:
    """{module path: class} of layers that multiply with packed integers, or with 8-bit floats, in a
    form that no file of `lorica.model.bases` reads."""
    found: dict[str, str] = {}
    for name, module in named_modules(model):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        packed = [t for t in own if t.ndim > 1 and t.dtype not in (*FLOATING, torch.bool)]
        sized = {"in_features", "out_features"} <= vars(module).keys()
        if packed and sized and base_for(module) is None:
            found[name] = f"{type(module).__module__}.{type(module).__name__}"
    return found


def sizes(model: nn.Module) -> dict[int, tuple[int, int]]:
    """{id of a packed parameter: (elements of W, bytes of all that W is made of)}."""
    return {
        id(store.parameter): (
            store.out_features * store.in_features,
            sum(t.numel() * t.element_size() for t in store.stored().values()),
        )
        for store in quantised(model).values()
    }


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Of the first parameter that holds values: a quantised model's norms and embeddings."""
    packed = {id(store.parameter) for store in quantised(model).values()}
    plain = (p.dtype for p in model.parameters() if id(p) not in packed and p.dtype in FLOATING)
    return next(plain, torch.get_default_dtype())


def dequantise(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The plain modules that hold the values of what is quantised in a model still, by path; its
    configuration says no more that it is."""
    plain = {
        name: store.replaced(store.weight(), None, dtype)
        for name, store in quantised(model).items()
    }
    if isinstance(model, PreTrainedModel):
        _forget(model)
    return plain


def _forget(model: PreTrainedModel) -> None:
    """transformers marks the model and its configuration; saved with the marks, it would be read as
    quantised."""
    for marked in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method"):
            if name in vars(marked):
                delattr(marked, name)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if name in vars(model):
            setattr(model, name, False)
    used: list[Any] | None = vars(model).get("_weight_conversions")
    if used is not None:  # how names and forms were changed in loading: saving reverts that
        done = {_patterns(c) for c in used}
        every: list[Any] = get_model_conversion_mapping(model)
        vars(model)["_weight_conversions"] = [c for c in every if _patterns(c) in done]


def _patterns(conversion: Any) -> tuple[tuple[str, ...], ...]:  # Any: transformers' own class
    return tuple(map(tuple, (conversion.source_patterns, conversion.target_patterns)))
