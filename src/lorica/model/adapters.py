"""Adapters: the live handle on an adapted model.

Holds names and modules, never tensors: sharding replaces parameters, and every access goes through
the modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lorica.interfaces import Batch, Outputs, Pair, Trained
from lorica.methods.arguments import argument, rate
from lorica.methods.groups.base import at_own_rate
from lorica.methods.objectives.base import Context
from lorica.methods.optional import Reweights, TrainsBase
from lorica.model import state
from lorica.model.bases.base import base_for
from lorica.model.forward_hooks import ForwardHooks
from lorica.model.layer import AdaptedLayer
from lorica.model.modules_to_save import TrainedModule, swapped
from lorica.model.token_rows import TokenRows
from lorica.model.wrappers import refuse_wrapped
from lorica.tensors.dtensor_ops import read_full, reshard
from lorica.tensors.modules import named_parameters, refuse_meta, unwrapped
from lorica.tensors.shared import SharedTensors
from lorica.text import clear_errors

if TYPE_CHECKING:
    from lorica.model.summary import Summary
    from lorica.recipe.recipe import Recipe

Released = Literal["merge", "detach"]
HANDLE = "_lorica_adapters"  # the attribute of a model that holds its adapters


class Adapters:
    """What `lorica.attach` returns.

    Attributes:
        model: the adapted model.
        recipe: the recipe it was adapted with.
        layers: {path of a module, or of an expert tensor: AdaptedLayer}, in model order.
        saved: {module path: TrainedModule}, what trains in full beside its frozen original.
        tables: {module path: TokenRows}, embeddings and heads of which rows train.
        direct: {name: role} of parameters that train in place.
        signals: {method: what a schedule tells an objective of the same name}; mirrors the
            schedule's state, so it is not saved.
        shared: frozen tensors that all layers read; empty with most methods.
        hooks: what methods asked to see of a forward.
        summary: what trains, what is frozen, and what that costs.
        released: the call that took the adapters out of the model; None: they are in it. After it,
            `model`, `recipe` and `summary` can still be read, and everything else is a ValueError.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = model
        self.recipe = recipe
        self.dtype = dtype
        self.released: Released | None = None
        self._layers: dict[str, AdaptedLayer] = {}
        self._saved: dict[str, TrainedModule] = {}
        self._tables: dict[str, TokenRows] = {}
        self.direct: dict[str, str] = {}
        self.requires_grad: dict[str, bool] = {}  # as it was before attach
        self.originals: dict[str, Tensor] | None = None  # kept copies, where asked for
        self.base_unchanged = "base_unchanged" in recipe.given()
        self.base_hash: str | None = None  # of the published weights, set on first use
        self.signals: dict[str, Any] = {}  # Any: between a schedule and its own objective
        self.shared = SharedTensors({})
        self.hooks: ForwardHooks
        self.summary: Summary

    @staticmethod
    def of(model: nn.Module) -> Adapters:
        """The handle of an adapted model, compiled or not.

        Raises:
            ValueError: nothing is attached, or a wrapper is around the model.
        """
        handle = vars(unwrapped(model)).get(HANDLE)
        if handle is None:
            refuse_wrapped(model)
            raise ValueError(
                f"no adapters are attached to this {type(model).__name__}; "
                "type `lorica.attach(model, 'lora')` first"
            )
        return handle

    def check_attached(self) -> None:
        """Check that the adapters are still in the model.

        Raises:
            ValueError: `lorica.merge` or `lorica.detach` took them out.
        """
        if self.released is None:
            return
        kind, text = type(self.model).__name__, self.recipe.text()
        left = {
            "merge": "put their update into its weights, so it is a plain model now, to be used"
            " and saved as such",
            "detach": "took them out, so it is its base again",
        }[self.released]
        raise ValueError(
            f"these adapters (`{text}`) are no longer part of their {kind}:"
            f" `lorica.{self.released}` {left}. Save the adapters before that call, with"
            " `lorica.save(adapters, path)`; adapt the model anew with `lorica.attach(model,"
            f" {text!r})`"
        )

    @property
    def layers(self) -> dict[str, AdaptedLayer]:
        self.check_attached()
        return self._layers

    @property
    def saved(self) -> dict[str, TrainedModule]:
        self.check_attached()
        return self._saved

    @property
    def tables(self) -> dict[str, TokenRows]:
        self.check_attached()
        return self._tables

    def __iter__(self) -> Iterator[tuple[str, AdaptedLayer]]:
        return iter(self.layers.items())

    def __len__(self) -> int:
        return len(self.layers)

    # -- what trains

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """(module path, trained pair) of every layer that has one."""
        for name, layer in self.layers.items():
            if (pair := layer.update.delta.pair()) is not None:
                yield name, pair

    def trained(self) -> list[Trained]:
        """Every parameter that trains, with its role, in model order."""
        out: list[Trained] = []
        frozen = frozenset[str]().union(*(g.freezes for g in self.recipe.groups))
        for site, layer in self.layers.items():
            lookup = layer.site.lookup
            out += [
                Trained(f"{site}.{name}", p, role, site, lookup)
                for name, p, role in layer.trained()
                if role not in frozen
            ]
        for site, module in {**self.saved, **self.tables}.items():
            out += [Trained(f"{site}.{n}", p, role, site) for n, p, role in module.trained()]
        if any(isinstance(s, TrainsBase) and s.trains_base for s in self.recipe.schedules):
            out += [
                Trained(
                    f"{n}.base.weight", layer.store.parameter, "weight", n,
                    lookup=layer.store.lookup, transposed=layer.store.transposed,
                )
                for n, layer in self.layers.items()
            ]  # fmt: skip
        parameters = dict(named_parameters(self.model)) if self.direct else {}
        for n, role in self.direct.items():
            owner = n.rpartition(".")[0]
            base = base_for(self.model.get_submodule(owner)) if role == "weight" else None
            lookup, transposed = (base.lookup, base.transposed) if base else (False, False)
            out.append(Trained(n, parameters[n], role, owner, lookup, transposed))
        return out

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, modules_lr: float | None = None
    ) -> list[dict[str, Any]]:  # Any: options of torch's optimizers
        """Optimizer groups as the recipe's rule wants them: one for each set of options, or one for
        each pair; decay spares vectors (magnitudes, norms, biases).

        Args:
            lr: rate of a parameter that no choice on the groups axis touches.
            weight_decay: decoupled decay of everything with two dimensions or more.
            modules_lr: rate of the modules that train in full beside the targets (those to save, or
                embeddings, norms and head); default `lr`.

        Raises:
            ValueError: a rate or a decay that is no finite number, or below 0; `modules_lr` where
                no such module trains.
        """
        lr = rate("lr", lr)
        modules_lr = None if modules_lr is None else rate("modules_lr", modules_lr)
        say = "a decay is a number from 0 to 1e18, e.g. 0.01"
        weight_decay = argument("weight_decay", weight_decay, say)
        reshard(self.model)
        groups = self.recipe.rule.groups(self, lr, weight_decay)
        return at_own_rate(groups, self.trained(), modules_lr)

    # -- loss and reference

    def loss(self, outputs: Outputs, batch: Batch | None = None, *, share: float = 1.0) -> Tensor:
        """The task's loss (`outputs["loss"]`, 0-d) with the recipe's objectives applied.

        Args:
            share: this micro-batch's part of one update, so that a penalty enters an accumulated
                update once.
        """
        self.check_attached()
        loss, context = outputs["loss"], Context(outputs, batch, self, share)
        for objective in sorted(self.recipe.objectives, key=lambda o: not isinstance(o, Reweights)):
            loss = objective.loss(loss, context)
        return loss

    @contextlib.contextmanager
    def disabled(self) -> Generator[None]:
        """Within this context the model is the original one, e.g. as a reference.

        Raises:
            ValueError: training changed the base and no copy was kept.
        """
        self.check_attached()
        if not self.base_unchanged and self.originals is None:
            raise ValueError(
                f"`{self.recipe.text()}` trains the base itself, so there is no original left to"
                " fall back on; attach with `keep_base=True`"
            )
        modules = [*self.layers.values(), *self.saved.values(), *self.tables.values()]
        before = [m.disabled for m in modules]
        for m in modules:
            m.disabled = True
        try:
            with swapped(self):
                yield
        finally:
            for m, disabled in zip(modules, before, strict=True):
                m.disabled = disabled

    # -- state

    def state_dict(self) -> dict[str, Tensor]:
        """All that training changes or the forward reads beside the frozen base, full-size.

        Keys are paths in the model. Sharded tensors are gathered, so every process has to call.
        """
        return {name: read_full(p).detach() for name, p in state.tensors(self).items()}

    @clear_errors()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, strict: a missing, extra or misshapen tensor is a
        ValueError, and nothing is written then."""
        state.load(self, saved)

    def fingerprint(self, *, buffers: bool = True) -> str:
        """SHA-256 of all of `state_dict` and of the persistent buffers (running statistics, say) of
        modules that train in full: equal on every process, or training has drifted apart.

        Args:
            buffers: False leaves them out: under DDP each process has its own between two forwards.
        """
        refuse_meta(self.model, "hash the adapters of")
        own = state.buffers(self) if buffers else {}
        return state.hash_exactly({**own, **self.state_dict()})

    def hash_base(self) -> str:
        """SHA-256 of the frozen base, independent of the dtype it is held in; of a quantised weight
        over its packed bytes and all that they are read by.

        Modules that train in full are left out, and so are rows that train: a table with new rows
        at its end hashes as the one without. Computed once: with a method that writes to the
        base `attach` asks for it, before the first step.
        """
        self.check_attached()
        if self.base_hash is None:
            self.base_hash = state.hash_base(self)
        return self.base_hash

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The frozen base's parameters under the names they have in the plain model."""
        return state.base_parameters(self)
