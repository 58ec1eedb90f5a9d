"""EVA: start from the principal directions of each layer's inputs, and give rank where they vary.

    C = Σ (x − x̄)(x − x̄)ᵀ over the inputs x (in,) of the positions that count = V diag(σ²) Vᵀ
    A₀ = V[:, 1..r]ᵀ (r, in),   B₀ = 0;   explained variance of component i: σ_i² / tr C

V and σ come from an incremental SVD: each batch's centred inputs are put below diag(σ)Vᵀ, together
with what the mean has moved, and the SVD of that is cut to k = ρr components. A layer reads batches
until each component that it may need has a cosine of at least τ with the one of the batch before,
all layers at most `batches`. Layers that read the same tensor (query, key and value) share one SVD.

Ranks: of all components of all layers, the L·r with the largest explained variance count, at most
ρr of a layer; its α follows its rank so that s stays. This is the formula of the authors' code and
of PEFT 0.21, with two differences: they read the data again and again until all is converged, and
leave a layer without an adapter that gets no component. Here each batch is read once, and each
layer keeps at least rank 1, for which others have the less.

On several processes each reads batches of its own, and C is the mean of theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.interfaces import BaseLike, Batch, Pair, RecipeLike, Site
from lorica.methods.fields import number, one_of, whole
from lorica.methods.inits.base import AbstractInit
from lorica.methods.optional import Batches, RanksFromData, StartsFromData
from lorica.methods.ranks.base import AbstractRank
from lorica.tensors.dtensor_ops import draw, gather_processes, seeded
from lorica.tensors.linalg import floats, sketched_svd

IGNORED = -100  # the label of a position without a loss
NITER = 4  # power iterations of the sketched SVD, of twice the components


@dataclass(frozen=True)
class Components:
    """The largest components of some inputs."""

    S: Tensor  # (k,) σ, the largest first
    Vh: Tensor  # (k, in)
    mean: Tensor  # (in,)
    count: Tensor  # (), how many inputs
    total: Tensor  # (), tr C

    @property
    def ratios(self) -> list[float]:
        """The part of all variance that each component explains."""
        return floats(self.S**2 / self.total.clamp_min(torch.finfo(self.S.dtype).tiny))

    def first(self, k: int) -> Components:
        return Components(
            self.S[:k].clone(), self.Vh[:k].clone(), self.mean, self.count, self.total
        )


@dataclass(frozen=True, kw_only=True)
class Eva(StartsFromData, AbstractInit):
    """Principal directions of the layer's inputs as A, zero B, and ranks by how much of the inputs'
    variance a direction explains.

    Cost: at most `batches` forwards at the start, and an SVD for each of them and each distinct
    input, of (tokens + ρr, in).
    When: fine-tuning; as many trained parameters as at one rank r, distributed by the data.

    Args:
        rho: ρ, at least 1: a layer's rank is at most ρ·r, rounded. Default 2, the authors'; with 1
            every layer has r.
        tau: τ in (0, 1]: the cosine from which a component is converged. Default 0.99, the
            authors'.
        use_label_mask: leave out positions whose label is -100 (default), as padding is always.
        whiten: divide each row of A by √σ. Default False; the authors use it for images.
        batches: how many batches are read at most; fewer where all is converged before, at least 1.
            Default 32.

    Raises:
        ValueError: a target that no batch reaches; fewer inputs than its rank; inputs that are not
            finite; with `whiten`, inputs that vary in fewer directions.

    Example:
        >>> import torch, lorica
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20)
        >>> model, batches = GPT2LMHeadModel(config), [{"input_ids": torch.arange(20)[None]}]
        >>> adapters = lorica.attach(model, "eva(batches=1)", r=2, data=batches, verbose=False)
        >>> sum(layer.site.r for _, layer in adapters) == 2 * len(adapters)
        True

    Reference:
        @misc{paischer2024eva,
          title = {One Initialization to Rule them All: Fine-tuning via Explained Variance
          Adaptation}, author = {Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and
          Alkin, Benedikt and Deisenroth, Marc Peter and Hochreiter, Sepp}, year = {2024},
          eprint = {2410.07170}
        }
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    whiten: bool = False
    batches: int = 32

    preset: ClassVar[Mapping[str, str]] = {"ranks": "rank.eva"}
    requires: ClassVar[frozenset[str]] = frozenset({"ranks"})
    gives: ClassVar[frozenset[str]] = frozenset({"zero_start", "input_components"})
    experts: ClassVar[bool] = False
    withdraws: ClassVar[frozenset[str]] = frozenset({"restarts", "lookup"})

    def __post_init__(self) -> None:
        number(self, "rho", least=1, say="a number of at least 1, e.g. 2; 1: every layer has r")
        number(self, "tau", above=0, most=1, say="a cosine above 0 and at most 1, e.g. 0.99")
        one_of(self, "use_label_mask", True, False)
        one_of(self, "whiten", True, False)
        whole(self, "batches", say="a whole number of batches, at least 1, e.g. 32")

    # -- what the data say

    def observe(
        self, model: nn.Module, layers: Mapping[str, BaseLike], sites: Mapping[str, Site],
        data: Batches,
    ) -> Mapping[str, Components]:  # fmt: skip
        most = {n: round(self.rho * site.r) for n, site in sites.items()}
        reader = _Reader(layers, k=max(most.values()), tau=self.tau)
        with torch.no_grad():
            for batch in data:
                needed = self._needed(reader, sites)
                if not (reading := reader.unconverged(needed)):
                    break
                reader.read(model, batch, reading, self._masks(model, batch))
            found = {n: self._merged(reader.found.get(n), sites[n], reader.k) for n in reader.leads}
        own: dict[str, Components] = {}
        for name, site in sites.items():
            of_input = found[reader.lead(name)]
            available = len(of_input.S)
            if available < site.r:
                count = round(of_input.count.item())
                raise ValueError(
                    f"{count} positions of `data` reach {name!r} and count (labels of {IGNORED} and"
                    f" padding do not), and `r={site.r}` needs at least {site.r}; give longer"
                    f" batches or more of them, or type `{self.name}(use_label_mask=False)`"
                )
            own[name] = of_input.first(min(most[name], site.in_features, site.out_features))
        return own

    def _needed(self, reader: _Reader, sites: Mapping[str, Site]) -> dict[str, int]:
        """How many components of each distinct input have to be converged: as many as the largest
        rank that reads it would have now; all, before every layer has some."""
        if not all(n in reader.found for n in reader.leads):
            return dict.fromkeys(reader.leads, reader.k)
        most = {
            n: min(round(self.rho * s.r), s.in_features, s.out_features) for n, s in sites.items()
        }
        ratios = {n: reader.found[reader.lead(n)].ratios[: most[n]] for n in sites}
        needed: dict[str, int] = {}
        for name, rank in shares(ratios, sum(s.r for s in sites.values())).items():
            lead = reader.lead(name)
            needed[lead] = max(rank, needed.get(lead, 0))
        return needed

    def _masks(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Which positions count, (batch, length) each."""
        attention, labels = batch.get("attention_mask"), batch.get("labels")
        masks: list[Tensor] = []
        if isinstance(attention, Tensor):
            masks.append(attention != 0)
        if isinstance(labels, Tensor) and self.use_label_mask:
            masks.append(labels != IGNORED)
        config: object = vars(model).get("config")
        two_sided = config is not None and bool(vars(config).get("is_encoder_decoder"))
        if two_sided and len(masks) == 2 and masks[0].shape == masks[1].shape:
            return []  # which of the two a layer reads is told apart by the lengths
        return masks

    def _merged(self, mine: Components | None, site: Site, k: int) -> Components:
        """The mean over all processes."""
        if mine is None:
            wide = torch.promote_types(site.dtype, torch.float32)
            empty = torch.zeros(site.in_features, dtype=wide, device=site.device)
            none = empty.new_zeros(())
            mine = Components(empty.new_zeros(0), empty.new_zeros(0, len(empty)), empty, none, none)
        n = len(mine.mean)
        rows = mine.mean.new_zeros(k, n)
        rows[: len(mine.S)] = mine.S[:, None] * mine.Vh
        packed = torch.cat([rows.flatten(), mine.mean, mine.count[None], mine.total[None]])
        parts = gather_processes(packed)
        if not parts[:, -2].any():
            raise ValueError(
                f"no position of `data` reaches {site.name!r} and counts (labels of {IGNORED} and"
                f" padding do not), so `{self.name}` has no inputs to start it from; give batches"
                " that do, or leave such layers out with `exclude_modules`"
            )
        if len(parts) == 1:
            return mine
        share = len(parts) ** -0.5
        stack = [
            _Part(
                share * p[: k * n].view(k, n), p[k * n : -2], p[-2] / len(parts), p[-1] / len(parts)
            )
            for p in parts
            if p[-2] > 0
        ]
        return joined(stack, k)

    # -- the start

    def fill_from(
        self, seen: Components, weight: Tensor, pair: Pair, generator: torch.Generator
    ) -> None:
        r = pair.A.shape[0]
        rows, sigma = seen.Vh[:r], seen.S[:r]
        if self.whiten:
            least = seen.S[0] * torch.finfo(seen.S.dtype).eps * seen.Vh.shape[1]
            if not (sigma > least).all():
                raise ValueError(
                    f"the inputs of a layer vary in {int((seen.S > least).sum())} directions, and"
                    f" `{self.name}(whiten=True)` divides by the variance of {r}; give more"
                    " batches, a smaller `r`, or leave `whiten` out"
                )
            rows = rows / sigma.sqrt()[:, None]
        pair.A.copy_(rows)
        pair.B.zero_()


@dataclass(frozen=True, kw_only=True)
class EvaRank(RanksFromData, AbstractRank):
    """Ranks by the explained variance of the inputs' components, r on average.

    Comes with `eva` and needs what it observes.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("eva").rank.text()
        'rank.eva'
    """

    needs: ClassVar[frozenset[str]] = frozenset({"wrapped", "input_components"})

    def assign(
        self, names: Sequence[str], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        assert recipe.r is not None  # filled where it is taken
        return {name: (recipe.r, recipe.lora_alpha) for name in names}

    def assign_from(
        self, seen: Mapping[str, Components], sites: Mapping[str, Site], recipe: RecipeLike
    ) -> dict[str, tuple[int, float | None]]:
        r, alpha, scale = recipe.r, recipe.lora_alpha, recipe.scale
        assert r is not None  # as above
        ratios: dict[str, list[float]] = {}
        for name, site in sites.items():
            largest: int | None = recipe.delta.most_r(site.in_features, site.out_features)
            found = seen[name].ratios
            most = max(1, len(found) * r // site.r)  # a delta may build other ranks than it keeps
            ratios[name] = found[: most if largest is None else min(most, largest)]
        ranks = shares(ratios, r * len(sites))
        return {
            name: (own, alpha if alpha is None else scale.alpha_for(scale.factor(alpha, r), own))
            for name, own in ranks.items()
        }


def shares(ratios: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Ranks that sum to the budget: of each layer its first component, and then the components
    with the largest ratios, the earlier layer's first where they are equal."""
    ranks = dict.fromkeys(ratios, 1)
    others = [(value, n) for n, values in ratios.items() for value in values[1:]]
    for _, name in sorted(others, key=lambda one: -one[0])[: budget - len(ranks)]:
        ranks[name] += 1
    return ranks


# -- the incremental SVD


@dataclass(frozen=True)
class _Part:
    """Inputs, as rows whose products sum to their scatter around the mean."""

    rows: Tensor  # (n, in)
    mean: Tensor  # (in,)
    count: Tensor  # ()
    total: Tensor  # ()


def part_of(X: Tensor) -> _Part:
    """Inputs (n, in) of one batch."""
    mean = X.mean(0)
    rows = X - mean
    return _Part(rows, mean, mean.new_tensor(float(len(X))), rows.square().sum())


def part_again(found: Components) -> _Part:
    return _Part(found.S[:, None] * found.Vh, found.mean, found.count, found.total)


def joined(parts: Sequence[_Part], k: int) -> Components:
    """The k largest components of all the parts together."""
    count = torch.stack([p.count for p in parts]).sum()
    mean = torch.stack([p.mean * (p.count / count) for p in parts]).sum(0)
    moved = torch.stack([p.count.sqrt() * (p.mean - mean) for p in parts])
    total = torch.stack([p.total for p in parts]).sum() + moved.square().sum()
    stack = torch.cat([*(p.rows for p in parts), moved])
    wide = min(2 * k, *stack.shape)
    _, S, Vh = sketched_svd(stack, draw((stack.shape[1], wide), seeded("inputs")), NITER)
    most = min(k, round(count.item()))  # more rows than inputs hold nothing of their own
    return Components(S[:most].clone(), Vh[:most].clone(), mean, count, total)


class _Reader:
    """Reads inputs off forwards.

    Attributes:
        leads: a layer for each distinct input, in the order in which they are reached.
        found: {lead: the components so far}.
    """

    def __init__(self, layers: Mapping[str, BaseLike], *, k: int, tau: float) -> None:
        self.layers, self.k, self.tau = layers, k, tau
        self.leads: list[str] = [*layers]
        self.found: dict[str, Components] = {}
        self._followed: dict[str, str] = {}
        self._cosines: dict[str, Tensor] = {}
        self._fresh = True  # nothing is known yet of who reads what

    def lead(self, name: str) -> str:
        """The layer whose components are those of this one's inputs."""
        return self._followed.get(name, name)

    def unconverged(self, needed: Mapping[str, int]) -> list[str]:
        """Leads whose first `needed` components have not all converged."""
        out: list[str] = []
        for name in self.leads:
            cosines = self._cosines.get(name)
            if cosines is None:
                out.append(name)
                continue
            first = min(needed[name], len(self.found[name].mean))
            if len(cosines) < first or not (cosines[:first] >= self.tau).all():
                out.append(name)
        return out

    def read(
        self, model: nn.Module, batch: Batch, names: Sequence[str], masks: Sequence[Tensor]
    ) -> None:
        """One forward."""
        inputs: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        hooks = [
            self.layers[n].module.register_forward_pre_hook(self._hook(n, inputs, masks))
            for n in names
        ]
        try:
            model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.leads = [n for n in self.leads if n not in self._followed]
        self._fresh = False

    def _hook(
        self, name: str, inputs: dict[int, tuple[weakref.ref[Tensor], int, str]],
        masks: Sequence[Tensor],
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:  # fmt: skip
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            known = inputs.get(id(x))
            if self._fresh and known is not None and known[0]() is x and known[1] == x._version:
                if known[2] != name and name not in self.found:
                    self._followed[name] = known[2]
                return
            inputs[id(x)] = weakref.ref(x), x._version, name
            if len(X := kept(x, masks)):
                self._update(name, X)

        return read

    def _update(self, name: str, X: Tensor) -> None:
        if not X.isfinite().all():
            raise ValueError(
                f"the inputs of {name!r} over `data` have values that are not finite, and the start"
                " is made from these inputs; load the model in bfloat16 or float32"
            )
        before = self.found.get(name)
        parts = [part_of(X.to(torch.promote_types(X.dtype, torch.float32)))]
        if before is not None:
            parts.insert(0, part_again(before))
        now = self.found[name] = joined(parts, self.k)
        if before is not None:
            both = min(len(before.S), len(now.S))
            cosines = now.Vh.new_zeros(len(now.S))  # 0: a component that was not there before
            cosines[:both] = (now.Vh[:both] * before.Vh[:both]).sum(1).abs()
            self._cosines[name] = cosines


def kept(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The inputs (n, in) that count, of x (..., in): those of the masks of its length."""
    places = x.shape[:-1]
    keep = torch.ones(places, dtype=torch.bool, device=x.device)
    for mask in masks:
        if mask.shape == places:
            keep = keep & mask.to(x.device)
    return x.detach()[keep]
