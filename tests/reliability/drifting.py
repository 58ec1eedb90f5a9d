"""Started by torchrun, once per process: a run in which one process edits weights by its rank.

python -m torch.distributed.run --standalone --nproc-per-node=2 drifting.py OUT

What each process was told lands in OUT/said.<rank>.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from test_loud import trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import lorica  # noqa: E402
from models import llama  # noqa: E402


class Edit(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            adapters = lorica.Adapters.of(kwargs["model"])
            with torch.no_grad():
                next(adapters.pairs())[1].B[0, 0] += 1e-6 * int(os.environ["RANK"])


def main(out: Path) -> None:
    torch.set_num_threads(1)
    model = llama()
    lorica.attach(model, "lora", r=2, verbose=False)
    run = trainer(
        model, out / "run", max_steps=6, save_strategy="steps", save_steps=2, ddp_backend="gloo"
    )
    run.add_callback(Edit())
    said = "nothing"
    try:
        run.train()
    except ValueError as error:
        said = str(error)
    (out / f"said.{os.environ['RANK']}").write_text(said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
