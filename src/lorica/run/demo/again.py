"""Answers and logits of a model, and a fresh process that takes them from files alone.

    python again.py ASKED FOLDER

reads ASKED, a JSON file with the fields of `Asked`, and writes answers.json and logits.safetensors
into FOLDER. Run as a file, not as a module, it imports nothing of Lorica unless the reader is
`lorica`: what PEFT computes from an adapter is then PEFT's own word.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWERS, LOGITS = "answers.json", "logits.safetensors"
BATCH = 256  # prompts at a time


@dataclass(frozen=True)
class Asked:
    """What a fresh process is asked.

    Attributes:
        reader: one of `READERS`.
        base, adapter: folders.
        threads: of torch; sums come out alike where they are split alike.
        prompts: token ids, as training has them before the answer.
        texts: token ids of prompts with their answers, whose logits are wanted.
        new_tokens: of an answer at most.
        end: the token that ends an answer.
    """

    reader: str
    base: str
    adapter: str
    threads: int
    prompts: list[list[int]]
    texts: list[list[int]]
    new_tokens: int
    end: int


def answers(model: Any, prompts: list[list[int]], *, new_tokens: int, end: int) -> list[list[int]]:
    """The likeliest answer to each prompt, token by token, without the `end`."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    made: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        width = len(prompts[chosen[-1]])
        gaps = [width - len(prompts[i]) for i in chosen]
        ids = [[end] * gap + prompts[i] for i, gap in zip(chosen, gaps, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            made[i] = row[: row.index(end)] if end in row else row
    return made


def logits(model: Any, texts: list[list[int]], *, end: int) -> Any:
    """Logits (text, place, token) in float32; padding stands behind, where no text sees it."""
    import torch

    width = max(map(len, texts))
    ids = torch.tensor([text + [end] * (width - len(text)) for text in texts])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def _plain(base: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _lorica(base: str, adapter: str) -> Any:
    import lorica

    model = _plain(base)
    lorica.load(model, adapter, trainable=False)
    return model


def _peft(base: str, adapter: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_plain(base), adapter)


def _transformers(base: str, adapter: str) -> Any:
    return _plain(adapter)  # it holds a whole model


# who reads: (what it is called, how)
READERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "lorica": ("Lorica", _lorica),
    "peft": ("PEFT, without Lorica", _peft),
    "transformers": ("transformers, without Lorica", _transformers),
}


def main(asked: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    job = Asked(**json.loads(asked.read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    began = time.perf_counter()
    model = READERS[job.reader][1](job.base, job.adapter).eval()
    told = {
        "answers": answers(model, job.prompts, new_tokens=job.new_tokens, end=job.end),
        "seconds": time.perf_counter() - began,
        "lorica_imported": "lorica" in sys.modules,
    }
    save_file({"logits": logits(model, job.texts, end=job.end)}, folder / LOGITS)
    (folder / ANSWERS).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
