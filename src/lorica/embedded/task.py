"""The contract of a task, and the inputs that several tasks draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from random import Random
from typing import ClassVar

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class AbstractTask(ABC):
    """A pure rule from a short input to a short answer, and a way to draw inputs.

    The prompt is `name: input`, closed by a newline. The first line of the class docstring is the
    task's description. `answer` may look at nothing but its argument, `draw` at nothing but the
    generator, and the input space must be wide: an eighth of it is never trained on.
    """

    name: ClassVar[str]  # the word that opens the prompt
    kind: ClassVar[str]  # "old": the base model knows it; "new": it has never seen it

    @abstractmethod
    def draw(self, rng: Random) -> str:
        """One input, by nothing but the generator."""

    @abstractmethod
    def answer(self, text: str) -> str:
        """The completion that `text`, an input of `draw`, asks for."""

    @property
    def description(self) -> str:
        return (type(self).__doc__ or "").strip().partition("\n")[0]

    def example(self, text: str) -> dict[str, str]:
        """The example that the input `text` makes."""
        return {
            "prompt": f"{self.name}: {text}\n",
            "completion": self.answer(text),
            "task": self.name,
        }


def pick(rng: Random, options: str) -> str:
    return options[rng.randrange(len(options))]


def word(rng: Random, shortest: int = 3, longest: int = 7) -> str:
    """A made-up word: half of them can be pronounced, the others are any letters.

    The first look like what a user types, the second keep the task from being a language model's.
    """
    length = rng.randrange(shortest, longest + 1)
    if rng.randrange(2):
        return "".join(pick(rng, LETTERS) for _ in range(length))
    letters = ""
    while len(letters) < length:
        letters += pick(rng, CONSONANTS) + pick(rng, VOWELS)
        if rng.randrange(2):
            letters += pick(rng, CONSONANTS)
    return letters[:length]


def few_letters(rng: Random, shortest: int = 3, longest: int = 7) -> str:
    """A word over two to four different letters, so that letters repeat."""
    alphabet = "".join(pick(rng, LETTERS) for _ in range(rng.randrange(2, 5)))
    return "".join(pick(rng, alphabet) for _ in range(rng.randrange(shortest, longest + 1)))


def digits(rng: Random, shortest: int = 3, longest: int = 6) -> str:
    return "".join(pick(rng, "0123456789") for _ in range(rng.randrange(shortest, longest + 1)))
