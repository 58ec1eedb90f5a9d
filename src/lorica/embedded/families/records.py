"""Old tasks over a line of keys and values."""

from __future__ import annotations

from random import Random

from lorica.embedded.task import LETTERS, AbstractTask, pick


class Get(AbstractTask):
    """The value of a key: `get: a=31 b=7 c=12 b` is 7."""

    name = "get"
    kind = "old"

    def draw(self, rng: Random) -> str:
        keys: list[str] = []
        while len(keys) < 3:
            key = pick(rng, LETTERS)
            if key not in keys:
                keys.append(key)
        line = " ".join(f"{key}={rng.randrange(100)}" for key in keys)
        return f"{line} {keys[rng.randrange(3)]}"

    def answer(self, text: str) -> str:
        *pairs, key = text.split()
        return dict(pair.split("=") for pair in pairs)[key]
