"""Old tasks over whole numbers and digits."""

from __future__ import annotations

from random import Random

from lorica.embedded.task import AbstractTask, digits


class Add(AbstractTask):
    """The sum of two numbers below a hundred."""

    name = "add"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return f"{rng.randrange(100)} + {rng.randrange(100)}"

    def answer(self, text: str) -> str:
        left, right = text.split(" + ")
        return str(int(left) + int(right))


class Subtract(AbstractTask):
    """The difference of two numbers below a hundred, the larger first."""

    name = "subtract"
    kind = "old"

    def draw(self, rng: Random) -> str:
        low, high = sorted((rng.randrange(100), rng.randrange(100)))
        return f"{high} - {low}"

    def answer(self, text: str) -> str:
        left, right = text.split(" - ")
        return str(int(left) - int(right))


class Largest(AbstractTask):
    """The largest of three numbers below a thousand."""

    name = "max"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return " ".join(str(rng.randrange(10 ** rng.randrange(1, 4))) for _ in range(3))

    def answer(self, text: str) -> str:
        return str(max(map(int, text.split())))


class Ascend(AbstractTask):
    """The digits of a number, smallest first."""

    name = "ascend"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return digits(rng)

    def answer(self, text: str) -> str:
        return "".join(sorted(text))
