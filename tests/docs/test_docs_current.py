"""What the pages say is so: generated parts, links, names of make's doors, nothing of a machine."""

from __future__ import annotations

import ast
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


# -- docs/architecture.md --------------------------------------------------------------------------


def packages() -> set[str]:
    """Packages and modules of `lorica`, without `__init__.py` and `__main__.py`."""
    inside = [p for p in (ROOT / "src/lorica").iterdir() if not p.name.startswith(("_", "."))]
    return {p.stem for p in inside if p.suffix == ".py" or (p / "__init__.py").is_file()}


def imports() -> dict[tuple[str, str], str]:
    """{(package, package that it imports): one place that does}, local imports included."""
    found = {}
    for file in sorted((ROOT / "src/lorica").rglob("*.py")):
        path = file.relative_to(ROOT / "src/lorica")
        own = path.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "lorica" and parts[1:] and parts[1] in packages() - {own}:
                    found[own, parts[1]] = f"{path}, line {node.lineno}"
    return found


def arrows() -> set[tuple[str, str]]:
    """The arrows of the picture."""
    (picture,) = [b for b in blocks(ROOT / "docs/architecture.md") if b.language == "mermaid"]
    return set(re.findall(r"^ +(\w+)(?:\[.*?\])? --> (\w+)", picture.text, re.M))


def reachable(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that arrows join over one or more steps."""
    pairs = set(arrows)
    while more := {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs:
        pairs |= more
    return pairs


def test_the_picture_shows_every_package_and_no_circle():
    shown = arrows()
    assert {name for arrow in shown for name in arrow} == packages()
    assert not [a for a, b in reachable(shown) if a == b]


def test_imports_follow_the_arrows_of_the_picture():
    allowed = reachable(arrows())
    wrong = {
        pair: place
        for pair, place in imports().items()
        if pair not in allowed and not pair[0].startswith("__")
    }
    assert not wrong, wrong


def test_files_named_in_the_architecture_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b[a-z_]+(?:/[a-z_]+)+\.py\b", re.sub(r"(?:src/)?lorica/", "", text)))
    named |= {f"{folder}/" for folder in re.findall(r"\b((?:methods|model)/[a-z]+)/(?!\w)", text)}
    assert len(named) > 15
    missing = sorted(n for n in named if not (ROOT / "src/lorica" / n.rstrip("/")).exists())
    assert not missing
