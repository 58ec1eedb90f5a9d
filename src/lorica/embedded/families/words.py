"""Old tasks over the letters of one word or two."""

from __future__ import annotations

from random import Random

from lorica.embedded.task import AbstractTask, few_letters, pick, word


class Copy(AbstractTask):
    """The word again."""

    name = "copy"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text


class Reverse(AbstractTask):
    """The letters of a word, last first."""

    name = "reverse"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text[::-1]


class Sort(AbstractTask):
    """The letters of a word in the alphabet's order."""

    name = "sort"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng, 3, 6)

    def answer(self, text: str) -> str:
        return "".join(sorted(text))


class Upper(AbstractTask):
    """A word in capitals."""

    name = "upper"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text.upper()


class Lower(AbstractTask):
    """A word in capitals, in small letters."""

    name = "lower"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng).upper()

    def answer(self, text: str) -> str:
        return text.lower()


class First(AbstractTask):
    """The first letter of a word."""

    name = "first"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text[0]


class Last(AbstractTask):
    """The last letter of a word."""

    name = "last"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng)

    def answer(self, text: str) -> str:
        return text[-1]


class Count(AbstractTask):
    """How often a letter stands in a word: `count: e cheese` is 3."""

    name = "count"
    kind = "old"

    def draw(self, rng: Random) -> str:
        letters = few_letters(rng) if rng.randrange(2) else word(rng)
        return f"{pick(rng, letters)} {letters}"

    def answer(self, text: str) -> str:
        letter, letters = text.split()
        return str(letters.count(letter))


class Length(AbstractTask):
    """How many letters a word has."""

    name = "length"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return word(rng, 2, 9)

    def answer(self, text: str) -> str:
        return str(len(text))


class Unique(AbstractTask):
    """The letters of a word without those that stood there before."""

    name = "unique"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return few_letters(rng)

    def answer(self, text: str) -> str:
        return "".join(dict.fromkeys(text))


class Swap(AbstractTask):
    """Two words in the other order."""

    name = "swap"
    kind = "old"

    def draw(self, rng: Random) -> str:
        return f"{word(rng, 2, 5)} {word(rng, 2, 5)}"

    def answer(self, text: str) -> str:
        return " ".join(reversed(text.split()))
