"""Fixtures and settings of every test: no network, one thread, one seed.

Two variables of the environment look for tests that pass on one machine alone:

    LORICA_TEST_THREADS=4     torch's threads; default: 1
    LORICA_TEST_ORDER=17      the tests in an order drawn with this seed; default: as written
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(int(os.environ.get("LORICA_TEST_THREADS", "1")))
# The same examples in every run; a slow machine is no failure.
settings.register_profile("lorica", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("lorica")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Draw the order of the files, and that of the tests in each: a file's tests stay together, so
    that what it makes once for all of them is made once."""
    seed = os.environ.get("LORICA_TEST_ORDER")
    if seed is None:
        return
    rng = random.Random(int(seed))
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    groups = list(files.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    items[:] = [item for group in groups for item in group]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of small models and data sets that lies beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the folder `shared` of small models and data is not beside the repository")
    return path


@pytest.fixture(autouse=True)
def seeded_draws():
    """Every test draws the same numbers, alone or in company."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Models made within the test are in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
