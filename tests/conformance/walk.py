"""How the suite finds what it tests: by walking the rooms, never from a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lorica
import models
from lorica import Recipe
from lorica.methods.optional import StartsFromData, StartsFromUnquantised
from lorica.model.adapters import Adapters
from lorica.model.layer import AdaptedLinear
from lorica.recipe import registry

IN, OUT = 6, 5
# Fields of a recipe that mean nothing to some methods, which then refuse them.
NUMERIC = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")


def every() -> list[tuple[str, str]]:
    """(room, word) of every word there is."""
    return [(room, word) for room in registry.AXES for word in registry.names(room)]


def recipe(method: str, **fields: Any) -> Recipe:
    """The recipe of `method` with small numbers, less those that mean nothing to it."""
    plain = Recipe.parse(method)
    fixed = any(choice.only_r for choice in plain.choices)
    if plain.rank is not None and plain.rank.reads_patterns and not fixed:
        fields.setdefault("rank_pattern", {".*": 3})  # without one it has nothing to read
    if any(c.only_r is not None for c in plain.choices):
        fields.pop("r", None)  # the method has a rank of its own
    return Recipe.parse(
        method, **{k: v for k, v in fields.items() if k not in NUMERIC or k in plain.takes}
    )


class Small(nn.Module):
    """A model of a few layers, with a loss where there are labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.output(x)
        return y if labels is None else {"loss": (y - labels).square().sum(), "logits": y}

    def output(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def batch(self, seed: int) -> dict[str, Tensor]:
        """Random inputs, and labels of 1; the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        first = next(m for m in self.modules() if next(m.children(), None) is None)
        if isinstance(first, nn.Embedding):
            x = torch.randint(0, first.num_embeddings, (4, 5), generator=generator)
        else:
            wide = first.nx if isinstance(first, Conv1D) else first.in_features
            x = torch.randn(4, 5, wide, generator=generator).to(first.weight.dtype)
        with torch.no_grad():
            return {"x": x, "labels": torch.ones_like(self.output(x))}


class One(Small):
    """One layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def output(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Chain(Small):
    """Layers one after the other, in the order of their names."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def output(self, x: Tensor) -> Tensor:
        for _, layer in sorted(self.named_children()):
            x = layer(x)
        return x


class Beside(Chain):
    """Layers of one shape that read the same input, each with a loss of its own."""

    def output(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.children()])


def data_for(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]] | None:
    """The batches that a start of this recipe is made from; None: it is made without."""
    if not isinstance(recipe.init, StartsFromData):
        return None
    seeds = range(recipe.init.batches)
    if not isinstance(model, PreTrainedModel):
        return [model.batch(seed) for seed in seeds]
    most = model.config.vocab_size
    return [{k: v % most for k, v in models.batch(model, seed).items()} for seed in seeds]


def start_for(model: nn.Module, made: Recipe) -> dict[str, Any]:
    """What `lorica.attach` has to be given for the start of this recipe. Where one reads weights
    from before they were quantised, these are the model's own: nothing was."""
    if isinstance(made.init, StartsFromUnquantised):
        own = {n: m.weight for n, m in model.named_modules() if hasattr(m, "weight")}
        return {"unquantised": {n: w.detach() for n, w in own.items()}}
    return {"data": data_for(model, made)}


def chain(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers from each size to the next, with tanh between them, in float64."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [*([nn.Tanh()] if layers else []), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers).double()


def linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> One:
    torch.manual_seed(1)
    return One(nn.Linear(IN, OUT, bias=bias, dtype=dtype))


def conv1d(dtype: torch.dtype = torch.float64) -> One:
    torch.manual_seed(1)
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.weight, std=0.4)
    nn.init.normal_(layer.bias)
    return One(layer.to(dtype))


def embedding(dtype: torch.dtype = torch.float64) -> One:
    torch.manual_seed(1)
    return One(nn.Embedding(IN, OUT, dtype=dtype))


KINDS = {
    "linear": linear,
    "linear without bias": lambda dtype=torch.float64: linear(False, dtype),
    "conv1d": conv1d,
    "embedding": embedding,
}


def inputs(kind: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """x (*shape, in), or token ids (*shape)."""
    generator = torch.Generator().manual_seed(7)
    if kind == "embedding":
        return torch.randint(0, IN, shape, generator=generator)
    return torch.randn(*shape, IN, generator=generator, dtype=torch.float64).to(dtype)


def one_hot(x: Tensor) -> Tensor:
    """Token ids as the input vectors that an embedding means by them."""
    return nn.functional.one_hot(x, IN).double() if not x.is_floating_point() else x


def attach(model: nn.Module, made: Recipe, **options: Any) -> Adapters:
    """`lorica.attach`, quietly, with what the start is made from."""
    return lorica.attach(model, made, verbose=False, **start_for(model, made), **options)


def adapt(model: nn.Module, method: str | Recipe, **fields: Any) -> Adapters:
    """Attach to the one layer (or to all), quietly."""
    if isinstance(method, str):
        if isinstance(model, One) and Recipe.parse(method).delta.wraps:  # type: ignore[union-attr]
            fields.setdefault("target_modules", ["layer"])
        method = recipe(method, **fields)
    return attach(model, method)


def only(adapters: Adapters) -> AdaptedLinear:
    (layer,) = adapters.layers.values()
    return layer


def serves(method: str, kind: str) -> bool:
    """Whether the declarations say that this method works on this kind of layer."""
    return kind != "embedding" or "lookup" in Recipe.parse(method).given()


def allowed(method: str) -> bool:
    """Whether the declarations let these words stand together."""
    try:
        Recipe.parse(method)
    except ValueError:
        return False
    return True


def variants(word: str) -> Iterator[str]:
    """The word as it stands, and with each of its switches turned."""
    cls = registry.find(word)
    yield word
    for f in dataclasses.fields(cls):
        if isinstance(f.default, bool):
            yield f"{word}({f.name}={not f.default})"


def weight_of(adapters: Adapters, name: str) -> Tensor:
    """The effective weight of a target (out, in), wrapped or trained in place."""
    if name in adapters.layers:
        return adapters.layers[name].effective()[0]
    return adapters.model.get_submodule(name).weight


def state_bytes(adapters: Adapters) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapters.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wrapping() -> Iterator[str]:
    """Words of the deltas that hold an adapter."""
    for word in registry.names("deltas"):
        if registry.find(word).wraps:  # type: ignore[attr-defined]
            yield word
