"""The page of a run, report.html: what it learned, what trained, how to go on.

`read.py` reads a run's folder, `page.py` makes the page of it (or of several runs, side by side),
`chart.py` lays out a chart, and `samples.py` asks the model a few examples before and after
training. The page is one file: no network, charts as inline SVG. Every figure on it is in one of
the folder's files, so `lorica report` can make it again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorica.run.folder import REPORT
from lorica.run.plan import RunPlan

logger = logging.getLogger("lorica")


@contextlib.contextmanager
def reported(plan: RunPlan[Any, Any]) -> Iterator[None]:
    """Write the page when the run ends, with its result or without one.

    The result is written before the page, and a page that cannot be made is a warning: what was
    trained is complete without it. The page of a run that fails shows the steps it took; the
    failure is what is raised.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if plan.main and plan.options.report_html and plan.folder.lines():
                write(plan.folder.path)
        raise
    if plan.main and plan.options.report_html:
        try:
            write(plan.folder.path)
        except Exception as error:
            logger.warning(
                f"{plan.folder / REPORT} was not written: {type(error).__name__}: {error}. The run"
                f" is complete without it; `lorica report {plan.folder.path}` makes the page"
            )


def write(folder: str | Path) -> Path:
    """Make a run's page of the files in its folder, and put it there.

    Raises:
        ValueError: no run is in the folder.
        OSError: the disk refuses the file.
    """
    from lorica.run.folder import RunFolder
    from lorica.run.report.page import page
    from lorica.run.report.read import Run

    run = Run.read(folder)
    RunFolder(run.folder).write(REPORT, page([run]))
    return run.folder / REPORT
