"""One matrix in the place of an update that reads earlier layers: an approximation.

α says how much larger an earlier input is than a layer's own:

    inputs       α_{n,k} = mean ‖x_{n−k}‖ / mean ‖x_n‖                  over the batches
    projections  α_{n,k} = mean ‖x_{n−k} A_{n−k}ᵀ‖ / mean ‖x_n A_nᵀ‖    over the batches
    weights      α_n = f_{n−2} / f_{n−1}, f_n = ‖W_n + s·B_n A_n‖       1 for a chain's first two

    input shortcut                   ΔW_n ≈ s·(1 + α_n) B_n A_n         the first is exact, α = 1
    middle shortcut, inputs          ΔW_n ≈ s·B_n (A_n + Σ_k α_{n,k} A_{n−k})
    middle shortcut, projections     ΔW_n ≈ s·(1 + Σ_k α_{n,k}) B_n A_n

Norms are Frobenius norms of whole batches. α is a size without a direction: where the inputs of
consecutive layers are not parallel, no α is right.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import AdaptersLike, Factors
from lorica.methods.deltas.reslora.links import PassingDelta

logger = logging.getLogger("lorica")


@contextlib.contextmanager
def approximated(
    adapters: AdaptersLike, batches: Iterable[Any], *, by: str = "inputs"
) -> Iterator[dict[str, float]]:
    """Within, the update of every layer has a matrix, so that the model can be merged or exported.

        with approximated(adapters, batches) as lost:
            lorica.merge(model)

    Args:
        adapters: with the input or the middle shortcut.
        batches: keyword arguments of the model, each a mapping; the authors take 100.
        by: what α is made of: `inputs`, `weights` (input shortcut) or `projections` (middle
            shortcut).

    Returns:
        A context of {module path: ‖y − y'‖ / ‖y‖}, y the update's output over the batches and y'
        that of the matrix, both on the exact model's inputs. Logged, too.

    Raises:
        ValueError: adapters whose merge is exact; a `by` that the shortcut does not have; a layer
            that no batch reaches.
    """
    deltas = _deltas(adapters)
    if not all(isinstance(d, PassingDelta) for d in deltas.values()):
        raise ValueError(
            f"`{adapters.recipe.text()}` has a ΔW in every layer, or none at all; nothing needs an"
            " approximation. Type `lorica.merge(model)`"
        )
    stand, errors = _stand(adapters, deltas, [*batches], by)
    lines = "\n".join(f"  {name:<50} {error:8.2%}" for name, error in errors.items())
    logger.info("one matrix by %s; lost of each update's output:\n%s", by, lines)
    try:
        for name, delta in deltas.items():
            delta.merging = stand[name]
        yield errors
    finally:
        for delta in deltas.values():
            delta.merging = None


def _deltas(adapters: AdaptersLike) -> dict[str, Any]:
    return {name: layer.update.delta for name, layer in adapters}


@torch.no_grad()
def _stand(
    adapters: AdaptersLike, deltas: dict[str, Any], batches: list[Any], by: str
) -> tuple[dict[str, Factors], dict[str, float]]:
    """What stands for each update, and its error."""
    allowed = ("inputs", "projections" if next(iter(deltas.values())).middle else "weights")
    if by not in allowed:
        raise ValueError(
            f"`by={by!r}` under `{adapters.recipe.text()}`; allowed: {allowed[0]!r}, {allowed[1]!r}"
        )
    if by == "weights":
        means = _sizes(adapters)
    else:
        means = _norms(adapters.model, deltas, batches, by)
    alphas = {n: _alphas(d, means, by) for n, d in deltas.items()}
    stand = {
        n: d.approximation(alphas[n], collapsed=by == "projections") for n, d in deltas.items()
    }
    return stand, _errors(adapters.model, deltas, batches, stand)


def _alphas(delta: PassingDelta, means: dict[str, float], by: str) -> tuple[float, ...]:
    names = [m.site.name for m in delta.earlier]
    if by == "weights":
        before = delta.earlier[0].earlier if delta.earlier else ()
        return (means[before[0].site.name] / means[names[0]] if before else 1.0,)
    if not names and not delta.middle:
        return (1.0,)
    return tuple(means[name] / means[delta.site.name] for name in names)


def _sizes(adapters: AdaptersLike) -> dict[str, float]:
    """f of every layer; the base stays as it is."""
    out = {}
    for name, layer in adapters:
        product = layer.update.delta.approximation((), collapsed=True).weight()
        out[name] = float((layer.store.weight().to(product.dtype) + product).norm())
    return out


def _norms(model: nn.Module, deltas: Any, batches: list[Any], by: str) -> dict[str, float]:
    """Mean norm of each layer's input, or of its projection."""
    found: dict[str, list[float]] = {n: [] for n in deltas}

    def look(name: str, delta: PassingDelta, x: Tensor, y: Tensor) -> None:
        seen = F.linear(x, delta.A.to(x.dtype)) if by == "projections" else x
        found[name].append(float(seen.float().norm()))

    _watch(model, deltas, batches, look)
    if idle := [n for n, norms in found.items() if not sum(norms)]:
        raise ValueError(
            f"`batches`: none gives {idle[0]!r} an input, so its size is not known there; give"
            " batches that reach every adapted layer"
        )
    return {n: sum(norms) / len(norms) for n, norms in found.items()}


def _errors(model: nn.Module, deltas: Any, batches: list[Any], stand: Any) -> dict[str, float]:
    squares = {n: [0.0, 0.0] for n in deltas}

    def look(name: str, delta: PassingDelta, x: Tensor, y: Tensor) -> None:
        f = stand[name]
        near = F.linear(F.linear(x, f.A.to(x.dtype)), (f.scale * f.B).to(x.dtype))
        squares[name][0] += float((y - near).float().square().sum())
        squares[name][1] += float(y.float().square().sum())

    _watch(model, deltas, batches, look)
    return {n: (lost / all_) ** 0.5 if all_ else 0.0 for n, (lost, all_) in squares.items()}


def _watch(model: nn.Module, deltas: Any, batches: list[Any], look: Callable[..., None]) -> None:
    """Run the batches in evaluation mode and let `look` see each delta's input and output."""
    modes = {m: m.training for m in model.modules()}
    hooks = [
        delta.register_forward_hook(lambda d, args, y, name=name: look(name, d, args[0], y))
        for name, delta in deltas.items()
    ]
    try:
        model.eval()
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
