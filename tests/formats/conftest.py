"""The file tests run in silence."""

from __future__ import annotations

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def quiet():
    """transformers reports every file it writes or reads."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()
