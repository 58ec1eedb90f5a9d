"""The demonstration's page before it has a result, and the words that its tables share with the
terminal. With a result it is the page of a run (`lorica.run.report`), with `page.html` here around
it."""

from __future__ import annotations

from lorica.run.folder import REPORT_HEAD
from lorica.run.report.page import environment

HEAD = f"{REPORT_HEAD} demo -->"


def waiting() -> str:
    """The page while the demonstration runs; it looks again by itself."""
    said = "The demonstration is running. This page turns into its result."
    return _notice("One moment", said, refresh=True)


def stopped() -> str:
    """The page after a failure."""
    return _notice("No result", "The demonstration ended before its end. Run `lorica demo` again.")


def _notice(heading: str, said: str, *, refresh: bool = False) -> str:
    template = environment().get_template("demo/notice.html")
    return template.render(head=HEAD, heading=heading, said=said, refresh=refresh)


def shown(answer: str) -> str:
    """An answer on one line."""
    return answer.replace("\n", "↵") or "(nothing)"
