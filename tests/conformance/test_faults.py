"""Each method's own tests, run with a fault planted into the method: at least one must fail.

`faults.tsv` beside this file is the table of method × fault, with the first test that fails. The
slow part of the suite runs every cell of it. For a new method, or after a change of its tests:

    python tests/conformance/test_faults.py METHOD ...    # writes their rows; without one, those
                                                          # that the table lacks

Each cell is a process of its own, forked from one that has imported what tests import.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
for own in (TESTS, TESTS / "conformance"):  # where pytest finds these, when this runs by hand
    if str(own) not in sys.path:
        sys.path.insert(0, str(own))

from faults import faults_of  # noqa: E402
from walk import every  # noqa: E402

from lorica.recipe import registry  # noqa: E402

TABLE = TESTS / "conformance" / "faults.tsv"


def own_tests(word: str) -> Path | None:
    """The file with the method's name, or that of another method which cites the same paper."""
    papers = {w: set(registry.source(registry.find(w)).bibtex) for _, w in every()}
    family = [word, *(w for w in sorted(papers) if papers[w] & papers[word])]
    paths = [TESTS / "papers" / f"test_{w}.py" for w in family]
    return next((path for path in paths if papers[word] and path.exists()), None)


CELLS = [(w, name) for _, w in every() if own_tests(w) for name in faults_of(w)]


# -- one cell --------------------------------------------------------------------------------------


def run_planted(word: str, name: str, path: str, report: str) -> None:
    """The body of a cell's process: pytest over one file, with the fault in place."""
    os.environ |= {"LORICA_FAULT": f"{word}:{name}", "LORICA_FAULT_REPORT": report}
    os.chdir(TESTS.parent)
    with open(f"{report}.log", "w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        options = ["-p", "no:cacheprovider", "-p", "faults", "-x", "-q", "-m", "not slow"]
        options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
        # A comparison has to notice what torch warns of: a parameter that two layers use.
        options += ["-W", "ignore:optimizer contains a parameter group with duplicate"]
        os._exit(pytest.main([*options, path]))


def processes() -> Any:
    """Processes that begin with the imports done, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "pytest", "lorica", "models"])
    return context


def cell(word: str, name: str) -> dict[str, Any]:
    """What the plugin reports of a run of the method's tests with the fault in place."""
    path = own_tests(word)
    assert path is not None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        process = processes().Process(target=run_planted, args=(word, name, str(path), str(report)))
        process.start()
        process.join()
        log = Path(f"{report}.log").read_text(encoding="utf-8")[-3000:]
        assert report.exists(), log
        found = json.loads(report.read_text(encoding="utf-8"))
    assert bool(found["caught"]) == (process.exitcode == 1), log
    return found


def survives(found: dict[str, Any]) -> str | None:
    """Why a cell proves nothing, or None where a test has caught its fault."""
    if found["broke"]:
        return f"the fault itself raised: {found['broke']}"
    if not found["acted"]:
        return "none of its tests runs what the fault changes"
    return None if found["caught"] else "all tests pass with the fault in place"


# -- the table -------------------------------------------------------------------------------------


def read_table() -> dict[tuple[str, str], str]:
    """{(method, fault): the first test that fails}."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {(word, name): caught for word, name, caught in rows}


def write_table(rows: dict[tuple[str, str], str]) -> None:
    lines = ["\t".join((*key, rows[key])) for key in CELLS if key in rows]
    text = "\n".join(["method\tfault\tfirst test that fails", *lines])
    TABLE.write_text(text + "\n", encoding="utf-8")


def test_every_published_method_has_three_faults():
    for word in {word for word, _ in CELLS}:
        assert len(faults_of(word)) >= 3, (word, faults_of(word))


def test_the_table_names_a_test_for_every_cell():
    rows = read_table()
    stale = sorted({word for word, _ in set(CELLS) ^ set(rows)})
    for (word, _), caught in rows.items():
        path = own_tests(word)
        defined = path is not None and re.search(rf"^def {caught}\(", path.read_text("utf-8"), re.M)
        stale += [] if defined or word in stale else [word]
    command = f"python tests/conformance/test_faults.py {' '.join(stale)}"
    assert not stale, f"type `{command}` and commit {TABLE.name}"


@pytest.mark.slow
@pytest.mark.parametrize(("word", "name"), CELLS)
def test_its_own_tests_notice(word, name):
    problem = survives(cell(word, name))
    assert problem is None, problem


def main(chosen: list[str]) -> int:
    """Run the cells of these methods, or those that the table lacks, and keep their rows. Returns
    how many faults survive."""
    failed, rows = 0, read_table() if TABLE.exists() else {}
    for word, name in CELLS:
        if word not in chosen if chosen else (word, name) in rows:
            continue
        found = cell(word, name)
        problem = survives(found)
        failed += problem is not None
        rows.pop((word, name), None)
        if problem is None:
            rows[word, name] = re.split(r"[ \[]", found["caught"])[0]
        write_table(rows)
        print(f"{word}: {name}: {found['caught'] if problem is None else problem}", flush=True)
    return failed


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]) > 0)
