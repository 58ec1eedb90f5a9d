"""Approximates an update that reads earlier layers by one matrix per layer.

α is the ratio of an earlier input's size to that of a layer's own:

    inputs       α_{n,k} = mean ‖x_{n−k}‖ / mean ‖x_n‖                  over the batches
    projections  α_{n,k} = mean ‖x_{n−k} A_{n−k}ᵀ‖ / mean ‖x_n A_nᵀ‖    over the batches
    weights      α_n = f_{n−2} / f_{n−1}, f_n = ‖W_n + s·B_n A_n‖       1 for a chain's first two

    input shortcut                   ΔW_n ≈ s·(1 + α_n) B_n A_n         the first is exact, α = 1
    middle shortcut, inputs          ΔW_n ≈ s·B_n (A_n + Σ_k α_{n,k} A_{n−k})
    middle shortcut, projections     ΔW_n ≈ s·(1 + Σ_k α_{n,k}) B_n A_n

Norms are Frobenius norms of whole batches. α has a size but no direction: where the inputs of
consecutive layers are not parallel, no α is exact.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.interfaces import AdaptersLike, Batch, Factors
from lorica.methods.deltas.reslora.links import PassingDelta
from lorica.tensors.linalg import vector_norm
from lorica.tensors.modules import evaluating

logger = logging.getLogger("lorica")

# Called with (module path, delta, its input, its output).
Look = Callable[[str, PassingDelta, Tensor, Tensor], None]


@contextlib.contextmanager
def approximated(
    adapters: AdaptersLike, batches: Iterable[Batch], *, by: str = "inputs"
) -> Generator[dict[str, float]]:
    """Within, the update of every layer has a matrix, so that the model can be merged or exported.

        with approximated(adapters, batches) as lost:
            lorica.merge(model)

    Args:
        adapters: with the input or the middle shortcut.
        batches: keyword arguments of the model, each a mapping; the authors take 100.
        by: what α is computed from: `inputs`, `weights` (input shortcut) or `projections` (middle
            shortcut).

    Returns:
        A context of {module path: ‖y − y'‖ / ‖y‖}, y the update's output over the batches and y'
        that of the matrix, both on the exact model's inputs. It is logged, too.

    Raises:
        ValueError: adapters whose merge is exact; a `by` that the shortcut does not have; a layer
            that no batch reaches.
    """
    deltas = {n: d for n, x in adapters if isinstance(d := x.update.delta, PassingDelta)}
    if len(deltas) < len(adapters):
        raise ValueError(
            f"`{adapters.recipe.text()}` has a ΔW in every layer, or none at all, so there is"
            " nothing to approximate. Type `lorica.merge(model)`"
        )
    matrices, errors = _approximate(adapters, deltas, [*batches], by)
    lines = "\n".join(f"  {name:<50} {error:8.2%}" for name, error in errors.items())
    logger.info("one matrix by %s; lost of each update's output:\n%s", by, lines)
    try:
        for name, delta in deltas.items():
            delta.merging = matrices[name]
        yield errors
    finally:
        for delta in deltas.values():
            delta.merging = None


@torch.no_grad()
def _approximate(
    adapters: AdaptersLike, deltas: Mapping[str, PassingDelta], batches: Sequence[Batch], by: str
) -> tuple[dict[str, Factors], dict[str, float]]:
    """The matrix of each update as factors, and its error."""
    allowed = ("inputs", "projections" if next(iter(deltas.values())).middle else "weights")
    if by not in allowed:
        raise ValueError(
            f"`by={by!r}` under `{adapters.recipe.text()}`; allowed: {allowed[0]!r}, {allowed[1]!r}"
        )
    if by == "weights":
        means = _sizes(adapters, deltas)
    else:
        means = _norms(adapters.model, deltas, batches, by)
    alphas = {n: _alphas(d, means, by) for n, d in deltas.items()}
    matrices = {
        n: d.approximation(alphas[n], collapsed=by == "projections") for n, d in deltas.items()
    }
    return matrices, _errors(adapters.model, deltas, batches, matrices)


def _alphas(delta: PassingDelta, means: Mapping[str, float], by: str) -> tuple[float, ...]:
    names = [m.site.name for m in delta.earlier]
    if by == "weights":
        before = delta.earlier[0].earlier if delta.earlier else ()
        return (means[before[0].site.name] / means[names[0]] if before else 1.0,)
    if not names and not delta.middle:
        return (1.0,)
    return tuple(means[name] / means[delta.site.name] for name in names)


def _sizes(adapters: AdaptersLike, deltas: Mapping[str, PassingDelta]) -> dict[str, float]:
    """f of every layer; the base stays as it is."""
    out: dict[str, float] = {}
    for name, layer in adapters:
        product = deltas[name].approximation((), collapsed=True).weight()
        out[name] = float(vector_norm(layer.store.weight().to(product.dtype) + product))
    return out


def _norms(
    model: nn.Module, deltas: Mapping[str, PassingDelta], batches: Sequence[Batch], by: str
) -> dict[str, float]:
    """Mean norm of each layer's input, or of its projection."""
    found: dict[str, list[float]] = {n: [] for n in deltas}

    def look(name: str, delta: PassingDelta, x: Tensor, y: Tensor) -> None:
        seen = F.linear(x, delta.A.to(x.dtype)) if by == "projections" else x
        found[name].append(float(vector_norm(seen.float())))

    _watch(model, deltas, batches, look)
    if idle := [n for n, norms in found.items() if not sum(norms)]:
        raise ValueError(
            f"`batches`: none gives {idle[0]!r} an input, so the input's size is not known; give"
            " batches that reach every adapted layer"
        )
    return {n: sum(norms) / len(norms) for n, norms in found.items()}


def _errors(
    model: nn.Module,
    deltas: Mapping[str, PassingDelta],
    batches: Sequence[Batch],
    matrices: Mapping[str, Factors],
) -> dict[str, float]:
    squares = {n: [0.0, 0.0] for n in deltas}

    def look(name: str, delta: PassingDelta, x: Tensor, y: Tensor) -> None:
        f = matrices[name]
        near = F.linear(F.linear(x, f.A.to(x.dtype)), (f.scale * f.B).to(x.dtype))
        squares[name][0] += float((y - near).float().square().sum())
        squares[name][1] += float(y.float().square().sum())

    _watch(model, deltas, batches, look)
    return {n: (lost / all_) ** 0.5 if all_ else 0.0 for n, (lost, all_) in squares.items()}


def _watch(
    model: nn.Module, deltas: Mapping[str, PassingDelta], batches: Sequence[Batch], look: Look
) -> None:
    """Run the batches in evaluation mode and call `look` with each delta's input and output."""

    def hook(name: str) -> Callable[[PassingDelta, tuple[Tensor, ...], Tensor], None]:
        return lambda delta, args, y: look(name, delta, args[0], y)

    handles = [delta.register_forward_hook(hook(name)) for name, delta in deltas.items()]
    try:
        with evaluating(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
