"""Print the oldest version of each package that pyproject.toml admits, one `name==version` a line.

    python .ci/lowest.py [EXTRA...]

torch is left out: `constraints.txt` says which one the suite runs with, and older ones than that
are not tried.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

_BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")


def lowest(project: dict, extras: list[str]) -> list[str]:
    """`name==version` of every dependency and of those of the extras.

    Raises:
        ValueError: one that is not written as `name>=version`.
    """
    optional = project["optional-dependencies"]
    found = []
    for requirement in [*project["dependencies"], *(r for e in extras for r in optional[e])]:
        bound = _BOUND.fullmatch(requirement)
        if bound is None:
            raise ValueError(f"`{requirement}`: a dependency is written `name>=version`")
        if bound[1] != "torch":
            found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(lowest(tomllib.loads(text)["project"], sys.argv[1:])))
