"""Started by torchrun, once per process: runs every scenario of this world size, each in a fork.

A fork has a process group of its own, so a scenario that fails (or leaves its peer waiting) does
not touch the next one, and the heavy imports are paid once. What a scenario said lands in
OUT/<scenario>.<rank>: "ok" and its seconds, or the traceback.

    python -m torch.distributed.run --standalone --nproc-per-node=2 worker.py OUT [SCENARIO ...]
"""

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback
from pathlib import Path

import distributed_scenarios
import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 20  # how long one process waits for another that has failed


def run(name: str, out: Path, rank: int, world: int) -> str:
    began = time.perf_counter()
    try:
        dist.init_process_group(
            "gloo",
            init_method=(out / f"{name}.store").as_uri(),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        vars(distributed_scenarios)[name]()
        dist.barrier()  # nobody closes a connection that another still reads from
        dist.destroy_process_group()
    except BaseException:
        return traceback.format_exc()
    return f"ok {time.perf_counter() - began:.1f} s"


def main(out: Path, chosen: list[str]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    for name in chosen or distributed_scenarios.names(world):
        child = os.fork()
        if child == 0:
            said = run(name, out, rank, world)
            (out / f"{name}.{rank}").write_text(said)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
