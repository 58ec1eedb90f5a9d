"""AdamW, torch's own.

m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← (1 − ηλ)p − η·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.methods.arguments import refuse_unknown
from lorica.methods.groups.base import Options
from lorica.methods.rules._elementwise import Adam
from lorica.methods.rules.base import AbstractRule, TrainerArguments
from lorica.text import shorten

_SWITCHES = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")  # torch's


@dataclass(frozen=True, kw_only=True)
class AdamW(AbstractRule):
    """Adam with decoupled weight decay, the default rule.

    Cost: two elements of state for each trained one.
    When: the default.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora").rule.name
        'adamw'

    Reference:
        @inproceedings{loshchilov2019decoupled,
          title = {Decoupled Weight Decay Regularization},
          author = {Loshchilov, Ilya and Hutter, Frank}, booktitle = {ICLR}, year = {2019}, eprint =
          {1711.05101}
        }
    """

    trainer_names: ClassVar[frozenset[str]] = frozenset({"adamw_torch", "adamw_torch_fused"})
    any_optimizer: ClassVar[bool] = True
    state_per_element: ClassVar[int] = 2
    gives: ClassVar[frozenset[str]] = frozenset({"sharded", "row_state", "row_wise"})
    experts: ClassVar[bool] = True

    def build(self, groups: list[Options], options: Options) -> torch.optim.Optimizer:
        own = {"betas": (0.9, 0.999), "eps": 1e-8}
        refuse_unknown(self.name, options, (*own, *_SWITCHES))
        Adam().check({**own, **options})
        for name in options.keys() & set(_SWITCHES):
            if options[name] not in (True, False, None):
                raise ValueError(f"`{name}={shorten(options[name])}`: True, False or None")
        parameters: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        plain = all(type(p) is torch.nn.Parameter and p.is_cuda for p in parameters)
        if plain and not options.keys() & {"fused", "foreach", "capturable"}:
            # Fused, it can be told on the device to leave a step out, and no step waits for that.
            options = {**options, "fused": True}
        try:
            return torch.optim.AdamW(groups, **options)
        except (ValueError, RuntimeError) as error:  # of switches that exclude each other
            raise ValueError(
                f"torch's AdamW refuses {', '.join(f'`{k}={v!r}`' for k, v in options.items())}:"
                f" {error}. Leave one of them out"
            ) from error

    def state_shapes(self, group: Options, parameter: Tensor) -> Mapping[str, tuple[int, ...]]:
        return Adam().shapes(tuple(parameter.shape), group)

    def options_from(self, args: TrainerArguments) -> Options:
        fused = getattr(args.optim, "value", args.optim) == "adamw_torch_fused"
        options: Options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return {**options, "fused": True} if fused else options
