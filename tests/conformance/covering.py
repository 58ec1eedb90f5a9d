"""Full recipes that together hold every pair of words that may stand together."""

from __future__ import annotations

import functools
import itertools
import random

from walk import every

from lorica import Recipe
from lorica.recipe import registry

ARGUMENTS = {
    name: 2 for name in ("every", "interval", "update_proj_gap", "deltaT")
}  # events within a short run


@functools.cache
def spelt(word: str) -> str:
    """The word with an event in every second step, where it has events."""
    fields = registry.find(word).__dataclass_fields__
    told = ", ".join(f"{k}={v}" for k, v in ARGUMENTS.items() if k in fields)
    return f"{word}({told})" if told else word


@functools.cache
def lawful(words: frozenset[str]) -> bool:
    try:
        made = Recipe.parse("+".join(map(spelt, sorted(words))))
    except ValueError:
        return False
    return words <= {choice.name for choice in made.choices}


def pairs(words: frozenset[str]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in itertools.combinations(sorted(words), 2)}


def covering() -> list[frozenset[str]]:
    """Greedy: from the first pair that is missing, add what brings the most missing pairs. The same
    list every time."""
    words = sorted(word for _, word in every())
    open_pairs = {p for p in map(frozenset, itertools.combinations(words, 2)) if lawful(p)}
    order = random.Random(0)
    out = []
    while open_pairs:
        recipe = min(open_pairs, key=sorted)
        grown = True
        while grown:
            candidates = [w for w in words if w not in recipe]
            order.shuffle(candidates)
            gain = {w: len(pairs(recipe | {w}) & open_pairs - pairs(recipe)) for w in candidates}
            ranked = sorted((w for w in candidates if gain[w]), key=lambda w: -gain[w])
            best = next((w for w in ranked if lawful(recipe | {w})), None)
            grown = best is not None
            if best is not None:
                recipe |= {best}
        open_pairs -= pairs(recipe)
        out.append(recipe)
    return out
