"""Each method's own tests, run with a fault planted into the method: at least one must fail.

The table of method × fault is printed, a line per cell, and kept in `build/faults.tsv`. By hand:

    python tests/conformance/test_faults.py [METHOD ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from faults import faults_of
from walk import every

from lorica.recipe import registry

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "build" / "faults.tsv"


def own_tests(word: str) -> Path | None:
    """The file with the method's name, or that of another method which cites the same paper."""
    papers = {w: set(registry.source(registry.find(w)).bibtex) for _, w in every()}
    family = [word, *(w for w in sorted(papers) if papers[w] & papers[word])]
    paths = [TESTS / "papers" / f"test_{w}.py" for w in family]
    return next((path for path in paths if papers[word] and path.exists()), None)


CELLS = [(w, name) for _, w in every() if own_tests(w) for name in faults_of(w)]


def cell(word: str, name: str) -> dict[str, Any]:
    """What the plugin reports of a run of the method's tests with the fault in place."""
    path = own_tests(word)
    assert path is not None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        paths = [str(TESTS / "conformance"), str(TESTS), os.environ.get("PYTHONPATH", "")]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "faults", "-x", "-q",
             "-m", "not slow", str(path)],
            cwd=TESTS.parent, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                 "LORICA_FAULT": f"{word}:{name}", "LORICA_FAULT_REPORT": str(report)},
        )  # fmt: skip
        assert report.exists(), run.stdout[-3000:] + run.stderr[-3000:]
        found = json.loads(report.read_text(encoding="utf-8"))
    assert bool(found["caught"]) == (run.returncode == 1), run.stdout[-3000:]
    line = "\t".join([word, name, str(found["caught"]), f"acted {found['acted']} times"])
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("a", encoding="utf-8") as table:
        table.write(line + "\n")
    print(line, flush=True)
    return found


def test_every_published_method_has_three_faults():
    for word in {word for word, _ in CELLS}:
        assert len(faults_of(word)) >= 3, (word, faults_of(word))


@pytest.mark.slow
@pytest.mark.parametrize(("word", "name"), CELLS)
def test_its_own_tests_notice(word, name):
    found = cell(word, name)
    assert not found["broke"], f"the fault itself raised: {found['broke']}"
    assert found["acted"], "none of its tests runs what the fault changes"
    assert found["caught"], "all tests pass with the fault in place"


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for word, name in CELLS:
        if not chosen or word in chosen:
            found = cell(word, name)
            if found["broke"] or not found["acted"] or not found["caught"]:
                print("    NOT CAUGHT", found, flush=True)
