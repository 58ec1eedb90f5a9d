"""Started by torchrun, once per process: the command line with FSDP2 on CPU processes.

Accelerate shards over accelerators only and passes over `--fsdp` elsewhere, so its own branch for
them is forced here; all within it is its code and the Trainer's.

python -m torch.distributed.run --standalone --nproc-per-node=2 -- sharding.py train --fsdp ...
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState, DistributedType

from lorica.cli import main
from lorica.run import arguments

_init = AcceleratorState.__init__


def _sharding(self: Any, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    if (plugin := kwargs.get("fsdp_plugin")) is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _sharding  # type: ignore[method-assign]
    arguments.refuse_sharding = lambda plan, training, *, gathers: None
    sys.exit(main(sys.argv[1:]))
