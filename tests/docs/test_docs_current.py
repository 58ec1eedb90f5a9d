"""What the pages say is so: generated parts, links, names of make's doors, nothing of a machine."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from fenced import PAGES, ROOT, blocks


def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date():
    stale = [
        name
        for name, text in generate().pages().items()
        if (ROOT / name).read_text(encoding="utf-8") != text
    ]
    assert not stale, f"{stale}: run `python docs/generate.py`"


def test_every_method_has_an_entry():
    from lorica.recipe import registry

    headings = re.findall(r"^### (\S+)$", (ROOT / "docs/methods.md").read_text("utf-8"), re.M)
    assert sorted(headings) == sorted(n for axis in registry.AXES for n in registry.names(axis))


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match=r"page.md: no table 'nothing'; there are axes"):
        generate().filled("<!-- generated: nothing -->\n<!-- /generated -->", "page.md")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.is_file(), f"{page.name}: {target} leads nowhere"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_doors_of_make_exist(page):
    doors = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    shown = re.findall(r"^make ([\w-]+)$", "\n".join(b.text for b in blocks(page)), re.M)
    assert set(shown) <= doors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_of_a_machine_is_in_the_pages(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/", text)
    # Of LOG, CHANGELOG and the like the writers take care; these pages are read by newcomers.
    assert not re.search(r"[ \t]$", text, re.M), "spaces at a line's end"
