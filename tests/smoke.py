"""What a fresh installation must be able to do, as one program: `python tests/smoke.py`.

It needs no pytest and none of the repository: `make lowest` runs it with the oldest packages that
pyproject.toml admits, and `make package` with the built wheel, each in an environment of its own
and in an empty folder. The commands are run as a user types them, in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

COMMANDS = (
    "train --method dora+olora --max-steps 6 --max-samples 48 --output-dir first --json",
    "train --output-dir first --resume --max-steps 6 --json",
    "inspect first/adapter --json",
    "eval --adapter first/adapter --limit 4 --json",
    "generate --adapter first/adapter --prompt cat --json",
    "merge --adapter first/adapter --output-dir merged --json",
    "export --adapter first/adapter --output-dir plain --r 4 --json",
    "pretrain --model-config llama-1m --method switchlora --max-steps 4 --output-dir new --json",
    "demo --max-steps 4 --examples 2 --json",
)


def library() -> None:
    """Attach, train, save, load: the same logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorica

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, vocab_size=32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, use_cache=False)
    )
    ids = torch.randint(32, (4, 8))
    adapters = lorica.attach(model, "dora+olora", r=2, verbose=False)
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=10)
    losses = []
    for _ in range(10):
        outputs = model(input_ids=ids, labels=ids)
        loss = adapters.loss(outputs, {})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    with torch.no_grad():
        before = model(input_ids=ids).logits
    lorica.save(adapters, "tiny")
    lorica.detach(model)
    lorica.load(model, "tiny")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        library()
        told: dict[str, dict[str, object]] = {}
        for command in COMMANDS:
            print("lorica", command, flush=True)
            ran = subprocess.run(
                [sys.executable, "-m", "lorica", *command.split()], capture_output=True, text=True
            )
            assert ran.returncode == 0, ran.stderr[-2000:]
            told[command.split()[0]] = json.loads(ran.stdout)
        assert Path("merged/model.safetensors").is_file()
        assert told["train"]["steps"] == 6
        if find_spec("peft") is not None:
            rows: object = told["demo"]["demo"]
            assert isinstance(rows, dict) and all("skipped" not in r for r in rows["reread"])
        os.chdir("/")
    print("all is well")


if __name__ == "__main__":
    main()
