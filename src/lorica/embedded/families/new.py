"""New tasks: what a demonstration teaches. Each joins or turns skills of the old ones."""

from __future__ import annotations

from datetime import date, timedelta
from random import Random

from lorica.embedded.families.dates import Tomorrow
from lorica.embedded.task import AbstractTask, digits, word


class Descend(AbstractTask):
    """The digits of a number, largest first."""

    name = "descend"
    kind = "new"

    def draw(self, rng: Random) -> str:
        return digits(rng)

    def answer(self, text: str) -> str:
        return "".join(sorted(text, reverse=True))


class Flip(AbstractTask):
    """The letters of a word, last first, in capitals."""

    name = "flip"
    kind = "new"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text[::-1].upper()


class Mirror(AbstractTask):
    """A word, followed by its letters last first."""

    name = "mirror"
    kind = "new"

    def draw(self, rng: Random) -> str:
        return word(rng, 3, 5)

    def answer(self, text: str) -> str:
        return text + text[::-1]


class Tail(AbstractTask):
    """The last two letters of a word."""

    name = "tail"
    kind = "new"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text[-2:]


class Yesterday(AbstractTask):
    """The day before a date of 1900 to 2099."""

    name = "yesterday"
    kind = "new"

    def draw(self, rng: Random) -> str:
        return str(date.fromisoformat(Tomorrow().draw(rng)) + timedelta(1))

    def answer(self, text: str) -> str:
        return str(date.fromisoformat(text) - timedelta(1))
