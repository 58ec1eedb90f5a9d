"""Make the page of a run, or of several runs side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.run.folder import REPORT, is_report
from lorica.run.options import HINT, PATH, PATHS, UsageError


@dataclass(frozen=True, kw_only=True)
class Options(VerbOptions):
    """Make the page of a run again, or one page of several runs: curves, results, configurations.

    A page is one HTML file that loads nothing else. Nothing in the runs' folders changes but the
    page itself; a run that was stopped, or is still going, has a page of its steps so far.

    Args:
        runs: folders of runs.
        output: file to write. Default: report.html in the run's folder; of several runs,
            report.html here.
    """

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], PATHS, HINT]]
    output: Annotated[str | None, PATH, HINT] = None


def run(options: Options) -> Outcome:
    from lorica.run.report.page import page
    from lorica.run.report.read import Run

    runs = [Run.read(folder) for folder in options.runs]
    file = Path(options.output).expanduser() if options.output is not None else None
    if file is None:
        file = runs[0].folder / REPORT if len(runs) == 1 else Path(REPORT)
    _refuse(file)
    _write(file, page(runs))
    data = {"runs": [str(run.folder) for run in runs], "output": str(file)}
    return Outcome(data, (f"written: {file}", f"Look at {file.resolve().as_uri()}"))


def _refuse(file: Path) -> None:
    """Raises UsageError: the file is no page of ours, or there is no folder for it."""
    if file.is_dir():
        raise UsageError(
            f"`--output {file}` is a folder; name a file in it, e.g. `--output {file / REPORT}`"
        )
    if file.exists() and not is_report(file):
        raise UsageError(
            f"`--output {file}` is a file that `lorica report` has not written, and it only"
            " replaces its own; name another"
        )
    if not file.resolve().parent.is_dir():
        raise UsageError(f"`--output {file}`: there is no folder {file.parent}; make it first")


def _write(file: Path, text: str) -> None:
    """At once: a reader sees the old page or the new one."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
