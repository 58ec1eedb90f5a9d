"""Hooks that users put on layers: they run on the layer that takes a module's place.

A module in the model is replaced by one that computes from its weight. Hooks that look at inputs,
outputs and their gradients (probes, `enable_input_require_grads`, NEFTune's noise) are those of the
new module as well. What computes the weight itself anew before each forward (torch's classic
`weight_norm`, `spectral_norm`, `prune`) leaves no frozen weight beside which to train.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

# torch has no name for these: all the dictionaries of hooks that run in a module's call.
_AROUND_CALLS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def share_hooks(module: nn.Module, stand_in: nn.Module) -> None:
    """Let `stand_in` run the hooks of the module whose place it takes. The dictionaries are shared,
    so a hook that is added or removed on either later is so on both, and a released module has
    them. The stand-in then has to call `module.forward`, lest they run twice."""
    for name in _AROUND_CALLS:
        vars(stand_in)[name] = vars(module)[name]


def computed_weight(module: nn.Module) -> str | None:
    """Why the module has no weight of its own that could stay frozen; None: it has one."""
    for owner in module.modules():
        held = vars(owner)
        stored = [n for n, _ in owner.named_parameters(recurse=False)]  # weight_orig, weight_g
        computed = [n for n, value in held.items() if isinstance(value, Tensor)]
        if any(s.startswith(f"{n}_") for n in computed for s in stored):
            hooks = [*cast("dict[int, Any]", held["_forward_pre_hooks"]).values()]
            names = ", ".join(sorted({type(hook).__name__ for hook in hooks})) or "its owner"
            return (
                f"{names} computes a weight anew before each forward, so there is none to freeze."
                " Make it permanent first (`torch.nn.utils.remove_weight_norm`,"
                " `remove_spectral_norm`, `prune.remove`)"
            )
        if is_parametrized(owner):
            made: Iterable[nn.Module] = cast(Any, owner).parametrizations.values()
            kinds = sorted({type(step).__name__ for steps in made for step in steps.children()})
            return (
                f"a parametrisation ({', '.join(kinds)}) computes its weight anew in each forward,"
                " so there is none to freeze. Make it permanent first"
                " (`torch.nn.utils.parametrize.remove_parametrizations`)"
            )
        if "forward" in held and "_hf_hook" not in held:
            return (
                "its `forward` was replaced by another function, which an adapter would not call."
                " Put the function into a subclass or a forward hook"
            )
    return None
