"""COLA: a chain of low-rank updates, each fitted to what the ones before it have left.

    W_i = W_{i−1} + s·B_i·A_i,   (A_i, B_i) ≈ argmin L(W_{i−1} + s·B·A),   i = 1 .. M

A *knot* ends a link: its product is merged, A is drawn anew, B = 0, the optimizer starts anew.
ΔW = Σ s·B_i·A_i has rank up to M·r, at the memory of one update. The authors published no code, and
their listing leaves two questions open: whether a link starts from the first A or a fresh one (here
fresh, since one A keeps all links in about one row space), and what the rate does (here each link
has its own complete curve).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorica.methods.schedules._restart import Chain


@dataclass(frozen=True, kw_only=True)
class Cola(Chain):
    """Fine-tuning in links: train an update, tie it to the model, train the next on what is left.

    The last link stays an adapter, so a run of one link would be plain training. A start that is
    not zero (`pissa`, `olora`) is computed for each link from the weight at that time. Dropout
    applies to the link in training alone; with such a start also to the frozen factors, which then
    hold the start itself.

    Cost: LoRA's; frozen links add r of rank each, unless they are written to the base.
    When: the wanted change has a higher rank than fits at once.

    Args:
        every: steps of a link. Default: fitted, 2 knots a run, the paper's longest chain of 3.
        accumulate: where finished links go: `factors` (default: frozen beside the base, which keeps
            its bytes; saved as one plain LoRA whose rank grows by r at each knot, or by 2r with a
            start that is not zero) or `base` (written to it, at no cost in memory).
        lr_scheduler_type: the rate within each link, from the full one: `cosine` (default) or
            `linear` to 0, `constant`; it replaces the run's scheduler, warm-up included.
            `continued`: the run's scheduler covers all links.

    Example:
        >>> from lorica import Recipe
        >>> Recipe.parse("cola(every=500)+rslora").text()
        'rslora+cola(every=500)'

    Reference:
        @misc{xia2024chain,
          title = {Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning},
          author = {Xia, Wenhan and Qin, Chengwei and Hazan, Elad}, year = {2024},
          eprint = {2401.04151}
        }
    """

    lr_scheduler_type: str = "cosine"

    links: ClassVar[int] = 2
