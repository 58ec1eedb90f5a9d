"""Families of transformers: attach, step, save, load, PEFT, merge, detach, checkpointing, bf16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from families import COLUMNS, FAMILIES, Trial

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
QUICK = ("mistral", "qwen2_moe", "gemma2", "gpt2", "falcon", "mamba", "bart", "vit")
pytestmark = pytest.mark.filterwarnings("ignore")  # each family's own code, and PEFT's


def documented() -> dict[str, dict[str, bool]]:
    """{family: {column: whether the page says that it holds}}."""
    rows = re.findall(
        r"^\| ([\w-]+) \| \w+ \| ((?:yes|no)[^\n]*) \|$", PAGE.read_text("utf-8"), re.M
    )
    return {
        family: {n: cell == "yes" for n, cell in zip(COLUMNS, cells.split(" | "), strict=True)}
        for family, cells in rows
    }


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES],
)
def test_a_family(family: str) -> None:
    pytest.importorskip("peft")
    found = Trial(family).run()
    assert {n: not why for n, why in found.items()} == documented()[family], found


def test_the_page_tells_of_all_and_most_pass() -> None:
    pages = documented()
    assert [*pages] == [*FAMILIES]
    assert len(pages) >= 50
    whole = sum(all(columns.values()) for columns in pages.values())
    assert whole >= 0.9 * len(pages)
