"""SwitchLoRA: vectors of A and B take turns with spare ones, so that updates sum to full rank.

    y = x Wᵀ + s·(x Aᵀ) Bᵀ, s = α/r;   pools C_A (c, in), C_B (c, out), c = min(in, out)
    aᵢ and slot j:   W ← W + s·bᵢ(aᵢ − C_A[j]);   C_A[slot i] ← aᵢ;   aᵢ ← C_A[j];   slot i ← j
    bᵢ and slot j:   W ← W + s·(bᵢ − C_B[j])aᵢ;   C_B[slot i] ← bᵢ;   bᵢ ← C_B[j];   slot i ← j
    k = ⌊σ + u⌋, u ~ U[0, 1);   σ = (r/interval)·ρ,   ρ = max(κ^((t+1)/(ratio·T)), 1e-8)
    k ≤ (p_A − f − p_B) mod r, (p_B − f − p_A) mod r, c − r

An exchange of aᵢ changes the gradient of bᵢ, its counterpart, and no other: bᵢ's optimizer state
starts anew, and it is frozen for `freeze` steps, this one included; aᵢ's stays. A and B exchange
the same k vectors a step, from ring positions p_A and p_B = p_A + ⌊r/2⌋ on; f are the frozen ones
behind each. This follows the authors' code; its README names the exchanged vectors as those that
freeze. κ is the paper's 1/3 (the code: 0.3). In random order the code may take a slot that is just
being vacated, and W is then wrong; here it cannot.

The start, uniform with these deviations, gives s·B·A the size of a fresh `nn.Linear` for every s,
and both factors an equal part in the change of it:

    std_A = (√out·r/in^1.5)^¼·3^-¼·√(1/(r·s)),   std_B = (r/√(out·in))^¼·3^-¼·√(1/(r·s))

W starts as W − s·B·A. The code's `origin_lora`, the usual A and a zero B, is the start `kaiming`.
Pools are training state: they are saved with the optimizer, (in + out)·c elements a layer. In half
precision each exchange rounds W: keep the base in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.interfaces import AdaptersLike, Pair, RecipeLike, TrainingLike
from lorica.methods.fields import one_of
from lorica.methods.inits.base import AbstractInit
from lorica.methods.schedules.base import State, pair_of
from lorica.methods.schedules.switchlora import ring
from lorica.methods.schedules.switchlora.pace import Paced
from lorica.methods.schedules.switchlora.pools import (
    Exchange,
    Order,
    PoolTransfer,
    draw_pools,
    index_on,
)
from lorica.tensors.dtensor_ops import draw, read_full, seeded, zero_rows


@dataclass(frozen=True, kw_only=True)
class SwitchloraInit(AbstractInit):
    """Uniform A and B of balanced size; a frozen start keeps the function.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("lora+init.switchlora").text()
        'init.switchlora'

    Reference:
        @inproceedings{zhou2024switchlora,
          title = {SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information},
          author = {Zhou, Kaiye and Wang, Shucheng and Xu, Jun}, year = {2024}, eprint =
          {2406.06564}
        }
    """

    def fill(self, weight: Tensor, pair: Pair, generator: torch.Generator) -> None:
        (r, n), m = pair.A.shape, pair.B.shape[0]
        both = 3**-0.25 * (r * pair.scale) ** -0.5
        for p, std in ((pair.A, (m**0.5 * r / n**1.5) ** 0.25), (pair.B, (r * r / m / n) ** 0.125)):
            p.copy_(draw(p.shape, generator, bound=3**0.5 * std * both))


@dataclass(frozen=True, kw_only=True)
class Switchlora(Paced):
    """Pre-training with rows of A and columns of B that are exchanged for spare ones, a few a step.

    Every exchange is corrected in the base weight, so the function stays. Ranks lie in 2 ..
    min(in, out) − 1. Rates and starts of A and B are balanced: LoRA+ would fight that.

    Cost: LoRA's; min(in, out) spare vectors of either side a layer, on the CPU by default; 1 to
    4 % of a step.
    When: pre-training, where full-rank learning is wanted at a pair's memory.

    Args:
        interval: steps between exchanges of one position at the start of the run, at least 2 and
            2·freeze. Default 40, the authors'; less where a position would not have two turns.
        swaps: instead of the interval, exchanges of each position in the run; the paper's has 91.
        ratio: after this part of the run the frequency has fallen to κ; default 0.1.
        kappa: κ in (0, 1]; default 1/3. At 1 it never falls, and no `total_steps` is needed.
        freeze: steps that a counterpart is frozen. Default 5; at most half of a given `interval`.
        reset: forget the counterpart's optimizer state; default True.
        select: the order in which spare vectors come, `sequential` (default) or `random`.
        pools: where they lie: `cpu` (default) or `device`, the layer's own.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("switchlora(interval=20)+dora", r=8).lora_alpha
        1

    Reference:
        @inproceedings{zhou2024switchlora,
          title = {SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information},
          author = {Zhou, Kaiye and Wang, Shucheng and Xu, Jun}, year = {2024}, eprint =
          {2406.06564}
        }
    """

    reset: bool = True
    select: str = "sequential"
    pools: str = "cpu"

    preset: ClassVar[Mapping[str, str]] = {
        "deltas": "lowrank", "inits": "init.switchlora", "rules": "vectoradamw",
    }  # fmt: skip
    needs: ClassVar[frozenset[str]] = frozenset(  # restarts: the init draws the spare vectors, too
        {"pair", "writable_base", "vector_step", "row_state", "restarts"}
    )
    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function", "sharded"})
    withdraws: ClassVar[frozenset[str]] = frozenset({"base_unchanged"})
    edits: ClassVar[frozenset[str]] = frozenset({"base", "pair", "gradient mask"})
    default_r: ClassVar[int | None] = 128
    default_learning_rate: ClassVar[float | None] = 0.02

    def default_lora_alpha(self, recipe: RecipeLike) -> float | None:
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "select", "sequential", "random")
        one_of(self, "pools", "cpu", "device")
        one_of(self, "reset", True, False)

    def init(self, adapters: AdaptersLike) -> State:
        assert self.freeze is not None, "init comes after fit"
        state: State = {"A": {}, "B": {}}
        for name, layer in adapters:
            size = ring.pool_size(self.name, layer)
            generator = seeded(f"{adapters.recipe.seed}/{name}/pools")
            pools = draw_pools(layer, adapters.recipe.init, generator, size)
            state["A"][name], state["B"][name] = pools
        return {**ring.start([*adapters.layers.values()], self.freeze), **state}

    def restore(self, state: State, training: TrainingLike) -> None:
        for name in ring.STATE:
            state[name] = state[name].cpu()  # read in every step
        for name, layer in training.adapters:
            device = layer.store.device if self.pools == "device" else "cpu"
            for side in ring.SIDES:
                state[side][name] = state[side][name].to(device)

    @torch.no_grad()
    def before_step(self, state: State, training: TrainingLike) -> None:
        layers, transfer = [*training.adapters], PoolTransfer.of(training.optimizer, state)
        step = training.step
        k, exchanges = transfer.take(step) or self._order(state, training, step, transfer)
        for i, side, at, slots, rows in exchanges:
            name, layer = layers[i]
            pair = pair_of(layer)
            where = index_on(pair.A.device, at)
            old = read_full(pair.A)[where] if side == "A" else read_full(pair.B)[:, where].T
            training.swap_(layer, side, at, rows.open(), keep_state=not self.reset)
            transfer.send_back(state[side][name], ring.occupy(state, i, side, at, slots), old)
        for i in ring.advance(state, k, step):
            frozen, pair = ring.frozen(state, layers[i][1], i), pair_of(layers[i][1])
            for p, side, axis in ((pair.A, "A", 0), (pair.B, "B", 1)):
                if p.grad is not None:
                    zero_rows(p.grad, frozen[side], axis)

    def after_step(self, state: State, training: TrainingLike) -> None:
        transfer, later = PoolTransfer.of(training.optimizer, state), training.step + 1
        transfer.flush()
        transfer.ahead = later, self._order(state, training, later, transfer)

    def _order(
        self, state: State, training: TrainingLike, step: int, transfer: PoolTransfer
    ) -> Order:
        """The exchanges of this step or of the next, their rows on the way; changes nothing
        else."""
        layers = training.adapters.layers
        generator = seeded(f"{training.seed}/{step}/{self.name}")  # in either step the same draws
        often = self.frequency(step, training.total_steps)
        k = ring.counts(state, [*layers.values()], often, step, generator)
        random = generator if self.select == "random" else None
        out: list[Exchange] = []
        for i, (name, layer) in enumerate(layers.items()):
            for side in ring.SIDES if k[i] else "":
                at, slots = ring.turn(state, layer, i, side, int(k[i]), random)
                rows = transfer.fetch(state[side][name], slots, layer.store.device)
                out.append(Exchange(i, side, at, slots, rows))
        return Order(k, out)
