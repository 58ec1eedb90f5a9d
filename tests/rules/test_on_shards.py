"""Every rule on sharded parameters: what one process computes, and an exact resume of shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from lorica.recipe import registry

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo here, so no processes can talk", allow_module_level=True)


@pytest.mark.slow
def test_rules_that_declare_it_are_the_same_on_shards():
    rules = [w for w in registry.names("rules") if "sharded" in registry.find(w).gives]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"),
        *("--nproc-per-node=2", str(Path(__file__).with_name("sharded_rules.py")), *rules),
        "lorafa+riemannian",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    for rule in rules:
        assert f"ok {rule}" in done.stdout.splitlines(), done.stderr[-3000:]
    assert done.returncode == 0
