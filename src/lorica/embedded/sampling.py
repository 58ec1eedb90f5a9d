"""Tasks found by walking, and seeded draws from them."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import pkgutil
from random import Random

from lorica.embedded import families
from lorica.embedded.task import AbstractTask

SIDES = ("train", "test")
TEST_SHARE = 8  # one input in eight is kept for tests


@functools.cache
def _all_tasks() -> tuple[AbstractTask, ...]:
    found = []
    for entry in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{entry.name}")
        found += [
            item()
            for _, item in inspect.getmembers(module, inspect.isclass)
            if issubclass(item, AbstractTask) and item.__module__ == module.__name__
        ]
    return tuple(sorted(found, key=lambda task: task.name))


def tasks(kind: str) -> list[AbstractTask]:
    """The tasks of one kind, by name.

    Args:
        kind: "old" (what the embedded base model knows) or "new" (what it has never seen).

    Raises:
        ValueError: `kind` is neither.

    Example:
        >>> from lorica.embedded import tasks
        >>> tasks("old")[3].example("e cheese")
        {'prompt': 'count: e cheese\\n', 'completion': '3', 'task': 'count'}
    """
    kinds = sorted({task.kind for task in _all_tasks()})
    if kind not in kinds:
        raise ValueError(
            f"`kind` is {kind!r} in the call of lorica.embedded; it must be one of "
            f"{', '.join(map(repr, kinds))}: type kind={kinds[-1]!r} for what the base model knows."
        )
    return [task for task in _all_tasks() if task.kind == kind]


def side_of(text: str) -> str:
    """The side, "train" or "test", on which an input (a prompt less its task's name) lies."""
    digest = hashlib.blake2b(text.encode(), digest_size=4, person=b"lorica").digest()
    return SIDES[int.from_bytes(digest, "big") % TEST_SHARE == 0]


def generate(kind: str, n: int, *, seed: int, side: str = "train") -> list[dict[str, str]]:
    """Examples of all tasks of one kind in equal shares, in a shuffled order.

    The same arguments give the same examples on every machine, and a smaller `n` gives the
    beginning of a larger one. Inputs may repeat, as in any sample.

    Args:
        kind: "old" or "new", as in `tasks`.
        n: how many examples.
        seed: of the draw.
        side: "train" or "test". The two share no input, whatever their seeds.

    Returns:
        `n` dicts with the keys `prompt`, `completion` and `task`, all strings.

    Raises:
        ValueError: an unknown `kind` or `side`, or a negative `n`.

    Example:
        >>> from lorica.embedded import generate
        >>> generate("old", 3, seed=0) == generate("old", 9, seed=0)[:3]
        True
    """
    chosen = tasks(kind)
    if side not in SIDES:
        raise ValueError(
            f"`side` is {side!r} in lorica.embedded.generate; it must be one of "
            f"{', '.join(map(repr, SIDES))}: type side='test' for inputs kept out of training."
        )
    if n < 0:
        raise ValueError(
            f"`n` is {n} in lorica.embedded.generate; it must be 0 or more: type n={-n} for as"
            " many."
        )
    rng = Random(f"{kind}/{side}/{seed}")
    order: list[AbstractTask] = []
    examples = []
    for _ in range(n):
        if not order:
            order = list(chosen)
            rng.shuffle(order)
        task = order.pop()
        text = task.draw(rng)
        while side_of(text) != side:
            text = task.draw(rng)
        examples.append(task.example(text))
    return examples
