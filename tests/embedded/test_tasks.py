"""The task world: deterministic draws, disjoint sides, and answers that obey their own rule."""

from __future__ import annotations

import calendar
import collections
import datetime
import functools
import subprocess
import sys

import pytest

from lorica import embedded

TASKS = [*embedded.tasks("old"), *embedded.tasks("new")]


def ahead(text: str) -> str:
    """The next day by the calendar's length of the month alone."""
    year, month, day = map(int, text.split("-"))
    if day < calendar.monthrange(year, month)[1]:
        return f"{year:04}-{month:02}-{day + 1:02}"
    return f"{year:04}-{month + 1:02}-01" if month < 12 else f"{year + 1:04}-01-01"


def behind(text: str) -> str:
    """The day whose next day is `text`, found by trying every day before it."""
    near = datetime.date.fromisoformat(text).toordinal()
    days = (str(datetime.date.fromordinal(near - back)) for back in range(1, 4))
    return next(day for day in days if ahead(day) == text)


def capital(letter: str) -> str:
    return chr(ord(letter) - 32)


def by_counting(symbols: str, text: str) -> str:
    """A sort that only counts: each symbol in turn, as often as it stands in the text."""
    return "".join(symbol * text.count(symbol) for symbol in symbols)


def without_repeats(text: str) -> str:
    return "".join(text[i] for i in range(len(text)) if text.find(text[i]) == i)


def looked_up(text: str) -> str:
    return text.split(text[-1] + "=")[1].split(" ")[0]


def from_end(text: str) -> str:
    return "".join(text[-i] for i in range(1, len(text) + 1))


ALPHABET = "".join(map(chr, range(97, 123)))
NAMES = [name.lower() for name in calendar.day_abbr] * 2

# The same rules, written another way.
ORACLES = {
    "add": lambda t: str(eval(t)),
    "ascend": lambda t: by_counting("0123456789", t),
    "copy": lambda t: t,
    "count": lambda t: str(len(t[2:].split(t[0])) - 1),
    "first": lambda t: next(iter(t)),
    "get": looked_up,
    "last": lambda t: collections.deque(t).pop(),
    "length": lambda t: str(sum(1 for _ in t)),
    "lower": lambda t: "".join(chr(ord(letter) + 32) for letter in t),
    "max": lambda t: sorted(t.split(), key=lambda number: number.zfill(9))[-1],
    "next": lambda t: " ".join(NAMES[NAMES.index(day) + 1] for day in t.split(" ")),
    "reverse": from_end,
    "sort": lambda t: by_counting(ALPHABET, t),
    "subtract": lambda t: str(eval(t)),
    "swap": lambda t: t[t.index(" ") + 1 :] + " " + t[: t.index(" ")],
    "tomorrow": ahead,
    "unique": without_repeats,
    "upper": lambda t: "".join(map(capital, t)),
    "descend": lambda t: by_counting("9876543210", t),
    "flip": lambda t: "".join(map(capital, from_end(t))),
    "mirror": lambda t: t + from_end(t),
    "tail": lambda t: t[len(t) - 2] + t[len(t) - 1],
    "yesterday": behind,
}


@functools.cache
def drawn(kind: str, side: str) -> list[dict[str, str]]:
    return embedded.generate(kind, 200 * len(embedded.tasks(kind)), seed=3, side=side)


def examples_of(name: str, kind: str, side: str = "train") -> list[dict[str, str]]:
    return [example for example in drawn(kind, side) if example["task"] == name]


def input_of(example: dict[str, str]) -> str:
    return example["prompt"].removeprefix(example["task"] + ": ").removesuffix("\n")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_obey_the_rule(task):
    for example in examples_of(task.name, task.kind):
        assert example["prompt"] == f"{task.name}: {input_of(example)}\n"
        assert example["completion"] == ORACLES[task.name](input_of(example)), example


def test_every_oracle_has_its_task():
    assert set(ORACLES) == {task.name for task in TASKS}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_describes_itself_and_has_many_inputs(task):
    assert task.description.endswith(".") or ":" in task.description
    assert len({example["prompt"] for example in examples_of(task.name, task.kind)}) > 100
    held_out = examples_of(task.name, task.kind, side="test")
    assert len({example["prompt"] for example in held_out}) > 60


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_one_byte_a_token_fits_the_context(task):
    for example in examples_of(task.name, task.kind):
        text = example["prompt"] + example["completion"]
        assert text.isascii() and example["completion"] and len(text) <= 48
        assert "\n" not in example["completion"]


@pytest.mark.parametrize("kind", ["old", "new"])
@pytest.mark.parametrize("side", ["train", "test"])
def test_draws_are_deterministic_balanced_and_prefix_stable(kind, side):
    count = len(embedded.tasks(kind))
    examples = embedded.generate(kind, 4 * count, seed=11, side=side)
    assert examples == embedded.generate(kind, 4 * count, seed=11, side=side)
    assert examples[:5] == embedded.generate(kind, 5, seed=11, side=side)
    assert examples != embedded.generate(kind, 4 * count, seed=12, side=side)
    assert set(collections.Counter(example["task"] for example in examples).values()) == {4}
    assert {frozenset(example) for example in examples} == {
        frozenset(("prompt", "completion", "task"))
    }


def test_draws_are_the_same_in_another_process():
    code = "from lorica import embedded; print(embedded.generate('old', 40, seed=5, side='test'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(embedded.generate("old", 40, seed=5, side="test"))


def test_no_input_of_the_test_side_is_trained_on():
    sides = {
        side: {
            input_of(example)
            for kind in ("old", "new")
            for seed in range(4)
            for example in embedded.generate(kind, 3000, seed=seed, side=side)
        }
        for side in ("train", "test")
    }
    assert not sides["train"] & sides["test"]
    for side, inputs in sides.items():
        assert {embedded.side_of(text) for text in inputs} == {side}


def test_the_import_is_light():
    code = (
        "import sys; from lorica import embedded; embedded.generate('old', 9, seed=0);"
        "embedded.base_path();"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"kind": "olt", "n": 1, "seed": 0}, ("'olt'", "'new', 'old'", "type kind=")),
        (
            {"kind": "old", "n": 1, "seed": 0, "side": "tset"},
            ("'tset'", "'train', 'test'", "type side="),
        ),
        ({"kind": "old", "n": -3, "seed": 0}, ("-3", "0 or more", "type n=3")),
    ],
)
def test_errors_say_what_is_allowed_and_what_to_type(arguments, parts):
    with pytest.raises(ValueError) as caught:
        embedded.generate(**arguments)
    for part in parts:
        assert part in str(caught.value)
