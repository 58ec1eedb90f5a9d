"""The description that a package index shows: README.md with links that work anywhere.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

HOME = ""  # the address of a file of the repository up to its path; "": there is no public one
PICTURES = ""  # the same for raw files, such as pictures

_RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")


def description(readme: str, home: str = HOME, pictures: str = PICTURES) -> str:
    """README.md without relative links: they lead to the repository if it has a public address;
    otherwise a link becomes its text, and a picture is left out."""

    def absolute(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        if picture:
            return f"![{text}]({pictures}{path})" if pictures else ""
        return f"[{text}]({home}{path})" if home else text

    text = re.sub(r"^<!-- .*? -->\n", "", readme, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", _RELATIVE.sub(absolute, text))


if __name__ == "__main__":
    setup(
        long_description=description(
            (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
        ),
        long_description_content_type="text/markdown",
    )
