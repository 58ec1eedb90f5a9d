"""How `--help` groups the options of a run: by what people look for.

Every option is in exactly one group; an option that no group names fails a test.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A heading of `--help`.

    Attributes:
        title: the heading.
        names: the options below it, in this order; those that a command lacks are left out.
        further: fields of transformers' TrainingArguments that belong here, as a last line.
    """

    title: str
    names: tuple[str, ...]
    further: tuple[str, ...] = ()


GROUPS: tuple[Group, ...] = (
    Group(
        "model and data",
        (
            "model", "model_config", "data", "tokenizer", "vocab_size", "adapter",
            "ignore_base_hash", "trust_remote_code", "load_in_4bit", "load_in_8bit", "quantization",
            "split", "columns", "header", "shape",
            "documents", "streaming", "task", "max_samples", "max_length", "packing",
            "chat_template", "now", "train_on", "max_lost_text",
        ),
        ("dataloader_num_workers", "dataloader_drop_last"),
    ),
    Group(
        "method",
        (
            "method", "r", "lora_alpha", "lora_dropout", "lora_dropout_on", "target_modules",
            "target_parameters", "exclude_modules", "adapt_towers", "layers_to_transform",
            "rank_pattern", "alpha_pattern", "modules_to_save", "add_tokens", "bias",
        ),
    ),
    Group(
        "training",
        (
            "max_steps", "num_train_epochs", "max_tokens", "learning_rate",
            "modules_learning_rate", "lr_scheduler_type", "warmup_ratio",
            "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
        ),
        (
            "warmup_steps", "weight_decay", "max_grad_norm", "optim", "label_smoothing_factor",
            "neftune_noise_alpha",
        ),
    ),
    Group(
        "evaluation and checkpoints",
        (
            "eval_data", "eval_split", "eval_fraction", "max_eval_tokens",
            "early_stopping_patience", "resume",
        ),
        (
            "eval_strategy", "eval_steps", "per_device_eval_batch_size", "metric_for_best_model",
            "load_best_model_at_end", "save_strategy", "save_steps", "save_total_limit",
        ),
    ),
    Group(
        "output",
        (
            "output_dir", "overwrite_output_dir", "report_to", "report_html", "verbose", "json",
            "dry_run",
        ),
        ("logging_steps", "logging_first_step", "run_name"),
    ),
    Group(
        "hardware",
        ("dtype", "bf16", "gradient_checkpointing", "attn_implementation"),
        ("fp16", "tf32", "torch_compile", "use_cpu", "fsdp", "ddp_timeout"),
    ),
)  # fmt: skip
