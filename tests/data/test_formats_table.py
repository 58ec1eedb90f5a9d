"""The table of other programs' formats in docs/data.md, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from lorica.data import prepare, read
from lorica.data.turns import FLAGS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def _rows():
    section = PAGE.read_text("utf-8").split("<!-- formats -->")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert all(len(row) == 5 for row in cells)
    return {row[0]: row[1:4] for row in cells}


ROWS = _rows()


def test_every_program_is_in_the_table():
    for program in ("TRL", "LLaMA-Factory, alpaca", "LLaMA-Factory, sharegpt",
                    "Axolotl, chat_template", "Axolotl, completion", "OpenAI", "Unsloth",
                    "ms-swift"):  # fmt: skip
        assert any(name.startswith(program) for name in ROWS), program


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_what_is_trained(name, tmp_path, tokenizer):
    row, shape, trained = ROWS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(row.strip("`"))
    turns = {"messages", "conversations"} & {shape}
    how = {"chat_template": "plain"} if turns else {}
    made = prepare(read(path), tokenizer, max_length=512, **how)
    assert made.report.shape == shape
    stretches, run = [], []
    for label in [*made.dataset[0]["labels"], -100]:
        if label != -100:
            run.append(label)
        elif run:
            stretches.append(f"[{tokenizer.decode(run)}]")
            run = []
    expected = trained.strip("`")
    if shape == "question-answer":  # the plain format has a space before an answer
        stretches = [part.replace("[ ", "[") for part in stretches]
    assert " ".join(stretches) == expected
    held = prepare(
        Dataset.from_list([json.loads(row.strip("`"))]), tokenizer, max_length=512, **how
    )
    assert held.dataset.to_list() == made.dataset.to_list()


def test_every_flag_is_in_the_table():
    table = PAGE.read_text("utf-8").split("## Conversations")[1].split("\n## ")[0]
    for flag in FLAGS:
        assert f"`{flag}`" in table
