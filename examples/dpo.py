"""Preference training with TRL's DPOTrainer: the reference is the model with its adapters disabled.

    python examples/dpo.py [--model FOLDER_OR_HUB_ID] [--output-dir out]

No second model is loaded. Without `--model` the embedded model learns to prefer the answers of one
task over those of another.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import lorica
from lorica.embedded import base_path, generate
from lorica.run import Reference, TrainerMixin


class Trainer(TrainerMixin, DPOTrainer):
    """DPOTrainer with the recipe's optimizer, schedules and checkpoints."""


def pairs(count: int) -> list[dict[str, str]]:
    """Prompts with the right answer chosen and the answer in the other case rejected."""
    examples = generate("old", count, seed=1)
    return [
        {"prompt": e["prompt"], "chosen": e["completion"], "rejected": e["completion"].swapcase()}
        for e in examples
        if e["completion"] != e["completion"].swapcase()
    ]


def main(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(base_path()))
    parser.add_argument("--method", default="dora+olora")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--output-dir", default="dpo-out")
    options = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    adapters = lorica.attach(model, options.method)
    trainer = Trainer(
        model=model,
        ref_model=Reference(adapters),
        args=DPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_length=64,
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(pairs(400)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{options.output_dir}/adapter")
    return trainer


if __name__ == "__main__":
    main()
