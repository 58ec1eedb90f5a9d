"""Several processes compute what one does: verbs, moves, training, checkpoints, on shards and
under DDP.

torchrun is started once a world size; the scenarios (see `distributed_scenarios`) run there, and
each test here reports one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
LAUNCH_SECONDS = 300

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo here, so no processes can talk", allow_module_level=True)
if sys.platform == "win32":
    pytest.skip("the worker forks, which Windows cannot", allow_module_level=True)

import distributed_scenarios  # noqa: E402


def launch(out: Path, world: int) -> None:
    """Run torchrun; everything it prints goes to OUT/log. Done when OUT/done is there."""
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = [str(HERE.parent), environment.get("PYTHONPATH")]  # of the tests' own modules
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        *(f"--nproc-per-node={world}", str(HERE / "worker.py"), str(out)),
    ]
    with (out / "log").open("w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            agent.wait(LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            agent.terminate()  # not kill: it takes its workers with it
            agent.wait(60)
            log.write(f"\nstopped after {LAUNCH_SECONDS} s")
    (out / "done").touch()


@pytest.fixture(scope="session")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[str]]:
    """What each rank said of a scenario; the launch is shared by all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def ask(name: str, world: int) -> list[str]:
        out = root / f"processes{world}"
        try:
            launch(out, world)
        except FileExistsError:
            until = time.monotonic() + LAUNCH_SECONDS + 30
            while not (out / "done").exists():
                assert time.monotonic() < until, "the other pytest worker's launch never ended"
                time.sleep(0.2)
        answers = [out / f"{name}.{rank}" for rank in range(world)]
        lost = "said nothing; torchrun printed:\n" + (out / "log").read_text()[-4000:]
        return [a.read_text() if a.exists() else lost for a in answers]

    return ask


@pytest.mark.parametrize(
    ("name", "world"), [(n, world) for world in (2, 4) for n in distributed_scenarios.names(world)]
)
def test_scenario(name: str, world: int, said: Callable[[str, int], list[str]]) -> None:
    answers = said(name, world)
    failed = [f"rank {rank}: {a}" for rank, a in enumerate(answers) if not a.startswith("ok")]
    assert not failed, "\n\n".join(failed)
