"""Fixtures and settings of every test: no network, one thread, one seed."""

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

torch.set_num_threads(1)
# The same examples in every run; a slow machine is no failure.
settings.register_profile("lorica", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("lorica")


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
