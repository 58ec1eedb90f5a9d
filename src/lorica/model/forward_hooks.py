"""ForwardHooks: what schedules and objectives see of a forward.

A choice declares what it wants (`hooks`); the hooks are installed once, for all. They look at
forwards in training mode alone, and under gradient checkpointing only at the first of the two.

hidden_states   the model's own `output_hidden_states`, in what it returns
input_squares   per adapted layer the sum of x² over the tokens of the step, padding left out
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorica.model.layer import AdaptedLinear
from lorica.tensors.linalg import vector_norm

if TYPE_CHECKING:
    from lorica.model.adapters import Adapters

HOOKS = frozenset({"hidden_states", "input_squares"})
Inputs = tuple[Any, ...]  # Any: of a model's forward
Keywords = dict[str, Any]  # Any: as above


class ForwardHooks:
    """Installed by `lorica.attach` where a choice asks for one; `remove` takes the hooks out.

    Attributes:
        input_squares: {module path: (in,) float32}, summed until somebody clears it; this process's
            own tokens.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.model = adapters.model
        self.wanted = frozenset[str]().union(*(c.hooks for c in adapters.recipe.choices))
        self.input_squares: dict[str, Tensor] = {}
        self.waiting: set[str] = set()  # layers that this forward has not come to yet
        self.mask: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None  # an input and its squares: q, k, v share it
        self.handles: list[RemovableHandle] = []
        takes = inspect.signature(self.model.forward).parameters
        kinds = {p.kind for p in takes.values()}
        self.states = "hidden_states" in self.wanted and (  # else the objective says what it lacks
            "output_hidden_states" in takes or inspect.Parameter.VAR_KEYWORD in kinds
        )
        if self.wanted:
            before = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            self.handles += [before, self.model.register_forward_hook(self._end, always_call=True)]
        if "input_squares" in self.wanted:
            self.sites = [*adapters.layers]
            for site, layer in adapters:
                look = functools.partial(
                    self._look, site
                )  # not a closure, which copies would share
                self.handles.append(layer.register_forward_pre_hook(look))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    # -- hooks

    def _begin(
        self, model: nn.Module, args: Inputs, kwargs: Keywords
    ) -> tuple[Inputs, Keywords] | None:
        if not model.training:
            return None
        if "input_squares" in self.wanted:
            self.waiting, self.mask = set(self.sites), kwargs.get("attention_mask")
        if self.states:
            return args, {**kwargs, "output_hidden_states": True}
        return None

    def _end(self, *_: object) -> None:
        self.waiting, self.mask, self.last = set(), None, None

    @torch.no_grad()
    def _look(self, site: str, layer: AdaptedLinear, args: tuple[Tensor, ...]) -> None:
        if site not in self.waiting:  # evaluation, or the second forward of a checkpoint
            return
        self.waiting.discard(site)
        (x,) = args
        if self.last is None or self.last[0] is not x:
            self.last = x, self._squares(x, layer)
        held = self.input_squares.get(site)
        squares = self.last[1]
        self.input_squares[site] = squares.clone() if held is None else held + squares

    def _squares(self, x: Tensor, layer: AdaptedLinear) -> Tensor:
        """Sum of x² (in,) over all tokens that are not padding; a token id is one-hot."""
        lookup = layer.site.lookup
        kept: Tensor | None = None
        if self.mask is not None and self.mask.shape == (x.shape if lookup else x.shape[:-1]):
            kept = self.mask.to(x.device).bool()
        if lookup:
            ones = torch.ones(x.shape, device=x.device) if kept is None else kept.float()
            counts = torch.zeros(layer.in_features, device=x.device)
            return counts.index_add_(0, x.flatten(), ones.flatten())
        if kept is not None:  # nothing is picked out: a GPU would wait for how much that is
            x = x.masked_fill(~kept[..., None], 0)
        x = x.reshape(-1, x.shape[-1])
        x = x.float() if x.dtype == torch.float64 else x
        return vector_norm(x, dim=0, dtype=torch.float32).square()
