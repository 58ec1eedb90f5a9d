"""Embedded tasks by name, where a data set's path would stand."""

from __future__ import annotations

import pytest

from lorica.data import detect, read, read_splits
from lorica.embedded import generate, tasks
from lorica.embedded.source import BOTH, NEW, examples, is_embedded

OLD = "lorica:old"


def test_a_name_is_a_data_set_of_prompts_and_completions():
    rows = read(NEW)
    assert len(rows) == 2000 and rows["task"][:3] == [r["task"] for r in generate("new", 3, seed=0)]
    assert detect(rows.column_names).name == "prompt-completion"
    assert rows["__where__"][1] == "lorica:new (train), row 2"
    assert len(read(NEW, split="test")) == 200
    assert is_embedded(OLD) and not is_embedded("old.jsonl")


def test_as_many_rows_as_are_asked_for_and_fewer_are_the_beginning():
    assert len(read(OLD, max_samples=2500)) == 2500
    assert examples(BOTH, count=7) == examples(BOTH, count=50)[:7]
    train, held = read_splits(NEW, eval_fraction=0.1, max_samples=3000)
    assert (len(train), held is not None and len(held)) == (2700, 300)


def test_both_kinds_take_turns():
    new = {task.name for task in tasks("new")}
    assert [row["task"] in new for row in examples(BOTH, "test", 6)] == [True, False] * 3


def test_the_sides_share_no_input():
    one, other = ({r["prompt"] for r in examples(BOTH, side, 3000)} for side in ("train", "test"))
    assert not one & other


@pytest.mark.parametrize(
    "source, options, part",
    [
        ("lorica:nwe", {}, "`lorica:new+old`"),
        (NEW, {"split": "dev"}, "`train` and `test`"),
        (NEW, {"header": ["a"]}, "`header` was given for lorica:new"),
        (NEW, {"txt_split": "line"}, "`txt_split='line'` was given for lorica:new"),
        (NEW, {"columns": {"text": "promt"}}, "`prompt`"),
    ],
)
def test_what_it_has_not_is_said(source, options, part):
    with pytest.raises(ValueError, match=part.replace("+", r"\+")):
        read(source, **options)
