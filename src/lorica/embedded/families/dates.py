"""Old tasks over the calendar."""

from __future__ import annotations

from datetime import date, timedelta
from random import Random

from lorica.embedded.task import AbstractTask

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
FIRST = date(1900, 1, 1)
DAYS = (date(2100, 1, 1) - FIRST).days


class Tomorrow(AbstractTask):
    """The day after a date of 1900 to 2099."""

    name = "tomorrow"
    kind = "old"

    def draw(self, rng: Random) -> str:
        drawn = FIRST + timedelta(rng.randrange(DAYS))
        # One date in three ends a month: a plain draw would leave the month's turn to 1 in 30.
        turn = drawn.replace(day=1) - timedelta(1)
        return str(turn if turn >= FIRST and rng.randrange(3) == 0 else drawn)

    def answer(self, text: str) -> str:
        return str(date.fromisoformat(text) + timedelta(1))


class Next(AbstractTask):
    """The weekday after each of several: `next: mon thu` is tue fri."""

    name = "next"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return " ".join(WEEKDAYS[rng.randrange(7)] for _ in range(rng.randrange(2, 5)))

    def answer(self, text: str) -> str:
        return " ".join(WEEKDAYS[(WEEKDAYS.index(day) + 1) % 7] for day in text.split())
