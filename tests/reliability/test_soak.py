"""Long runs stay flat: a short form of benchmarks/soak.py, for every schedule and rule."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

STEPS, WARM = 300, 100
UNSETTLED = 2.0  # blocks a step: a run as short as this still fills the interpreter's caches
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"

if not Path("/proc/self/statm").is_file():
    pytest.skip("memory is read from /proc, which is not here", allow_module_level=True)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


soak = load()


@functools.cache
def control():
    """The plain model under torch's optimizer, after a run of it that settles what settles once."""
    soak.soak(soak.CONTROL, STEPS, WARM)
    return soak.soak(soak.CONTROL, STEPS, WARM)


@pytest.mark.slow
@pytest.mark.parametrize("word", [*soak.words(), soak.TRAINER])
def test_nothing_grows(word):
    run = soak.soak(word, STEPS, WARM)
    assert len(run.resident) == soak.STRETCHES + 1
    assert not run.growth(control(), UNSETTLED), run


@pytest.mark.slow
def test_a_stack_that_grows_by_design_is_told_from_a_leak():
    run = soak.soak("cola(accumulate='factors')", STEPS, WARM)
    in_and_out = 4 * (16 + 16) + 3 * (16 + 24)  # of the seven layers; keys and values are whole
    assert run.frozen_factors[-1] - run.frozen_factors[0] == 4 * soak.R * in_and_out
    assert not run.growth(control(), UNSETTLED), run


LEAKS = {
    "memory": lambda kept: kept.append(torch.ones(50_000)),
    "blocks": lambda kept: kept.extend(len(kept) + i / 8 for i in range(4)),
    "objects": lambda kept: kept.append([]),
    "files": lambda kept: kept.append(open("/dev/null")),  # noqa: SIM115
    "temporary": lambda kept: kept.append(tempfile.mkstemp()[1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_seen(what):
    kept: list = []
    run = soak.soak("adamw", STEPS, WARM, extra=lambda step: LEAKS[what](kept))
    grown = run.growth(control(), UNSETTLED)
    for file in kept if what == "files" else []:
        file.close()
    assert any(words.startswith(f"{what} by") for words in grown), (grown, run)
