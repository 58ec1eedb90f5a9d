"""Supervised fine-tuning with TRL's SFTTrainer over a Lorica recipe.

    python examples/sft.py [--model FOLDER_OR_HUB_ID] [--output-dir out]

Without `--model` the embedded model learns tasks that it has not seen.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lorica
from lorica.embedded import base_path, generate
from lorica.run import TrainerMixin


class Trainer(TrainerMixin, SFTTrainer):
    """SFTTrainer with the recipe's optimizer, schedules and checkpoints."""


def main(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(base_path()))
    parser.add_argument("--method", default="dora+olora")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--output-dir", default="sft-out")
    options = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lorica.attach(model, options.method)
    rows = [{k: e[k] for k in ("prompt", "completion")} for e in generate("new", 2000, seed=0)]
    trainer = Trainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            max_length=64,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(f"{options.output_dir}/adapter")
    return trainer


if __name__ == "__main__":
    main()
