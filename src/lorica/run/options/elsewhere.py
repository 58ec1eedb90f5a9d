"""What other programs call these options. Errors about unknown keys and flags use the table, and
docs/start.md shows it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorica.text import nearest

# {our option: its usual names elsewhere}. Where two options share a name, the first one that the
# command has is meant. One text for an option, its names apart by spaces.
_NAMES: dict[str, str] = {
    "model": (
        "model_name_or_path base_model model_name pretrained_model_name_or_path model_id model_path"
    ),
    "data": (
        "dataset datasets dataset_name dataset_path data_path train_file training_data data_files"
    ),
    "eval_data": "eval_dataset test_datasets val_dataset validation_file test_file eval_file",
    "eval_fraction": "val_set_size val_size split_dataset_ratio validation_split",
    "split": "dataset_train_split",
    "max_samples": "limit max_train_samples num_samples dataset_num_samples",
    "max_length": (
        "cutoff_len max_seq_length max_seq_len sequence_len model_max_length block_size seq_len"
    ),
    "chat_template": "template",
    "train_on": (
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss roles_to_train"
    ),
    "packing": "sample_packing neat_packing",
    "r": "lora_rank lora_r rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "lora_target lora_target_modules lora_modules modules",
    "modules_to_save": "additional_target lora_modules_to_save",
    "add_tokens": "new_tokens additional_tokens add_special_tokens new_special_tokens",
    "adapter": "adapter_name_or_path lora_model_dir adapter_path resume_adapter",
    "method": (
        "finetuning_type train_type peft_type use_dora use_rslora peft_use_dora peft_use_rslora "
        "init_lora_weights peft_init_lora_weights"
    ),
    "learning_rate": "lr max_lr",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
    "warmup_steps": "warmup num_warmup_steps",
    "num_train_epochs": "num_epochs epochs n_epochs train_epochs",
    "max_steps": "num_steps num_train_steps train_iters iters max_train_steps",
    "per_device_train_batch_size": (
        "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size"
    ),
    "per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "gradient_accumulation_steps": (
        "gradient_accumulation accumulation_steps grad_accumulation_steps grad_accum"
    ),
    "optim": "optimizer",
    "max_grad_norm": "gradient_clip_val grad_clip clip_grad_norm",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "steps_per_eval val_check_interval evals_per_epoch",
    "save_steps": "save_every saves_per_epoch",
    "train_sampling_strategy": "group_by_length",
    "output_dir": "out_dir save_dir output_path",
    "resume": "resume_from ckpt_path",
    "report_to": "use_wandb wandb_project report",
    "dtype": "torch_dtype model_dtype",
    "bf16": "mixed_precision precision",
    "attn_implementation": "flash_attn flash_attention attn_impl use_flash_attn",
    "gradient_checkpointing": "grad_checkpoint activation_checkpointing",
    "seed": "random_seed random_state",
    "neftune_noise_alpha": "neftune_alpha",
}

# What to know where an option of another name also counts in another way.
_NOTES: dict[str, str] = {
    "train_on_inputs": "`train_on: all` trains on the prompts, too",
    "train_on_prompt": "`train_on: all` trains on the prompts, too",
    "completion_only_loss": "`completion` is the default",
    "assistant_only_loss": "`completion` is the default",
    "sample_packing": "its values are none, best_fit and wrapped",
    "neat_packing": "its values are none, best_fit and wrapped",
    "warmup": "`warmup_ratio` is a fraction of the steps",
    "batch_size": "it counts the sequences of one forward pass; a step has"
    " `gradient_accumulation_steps` of them",
    "use_wandb": "its value is then `wandb`",
    "wandb_project": "its value is then `wandb`",
    "group_by_length": "its value is then `group_by_length`",
    "evals_per_epoch": "it counts steps",
    "saves_per_epoch": "it counts steps",
    "mixed_precision": "it is a switch",
    "precision": "it is a switch",
}

_NO_NEED: dict[str, str] = {
    "do_train": "a run always trains",
    "do_eval": "a run evaluates where there is something to evaluate on",
    "stage": "the data decides what is learnt",
    "remove_unused_columns": "columns that are not read are named before training",
    "disable_tqdm": "progress is logged in lines",
}


def table() -> list[tuple[str, tuple[str, ...]]]:
    """Our options with their names elsewhere, as docs/start.md shows them."""
    return [(option, tuple(names.split())) for option, names in _NAMES.items()]


def named_here(name: str, known: Iterable[str], *, flag: bool = False) -> str:
    """What ends an error about an unknown option: what it is called here, or the closest name.

    Args:
        name: what was given; `-` and `_` count as the same.
        known: the options that the command has.
        flag: write options as they are typed on the command line.

    Returns:
        A sentence with a space before it, or an empty string where nothing is like it.

    Example:
        >>> named_here("lora_rank", ["r", "seed"])
        ' Here it is `r`.'
        >>> named_here("do-train", ["r", "seed"], flag=True)
        ' Leave it out: a run always trains.'
    """
    known = list(known)
    name = name.replace("-", "_")
    if name in _NO_NEED:
        return f" Leave it out: {_NO_NEED[name]}."
    for option, others in table():
        if name in others and option in known:
            shown = "--" + option.replace("_", "-") if flag else option
            note = f" ({_NOTES[name]})" if name in _NOTES else ""
            return f" Here it is `{shown}`{note}."
    return nearest(name, known, flag=flag)


def unknown(
    names: Collection[tuple[str, str]], known: Iterable[str], *, flag: bool, prog: str
) -> str:
    """The error about every unknown key or flag of a call.

    Args:
        names: each with the place that comes before it in the message; "" for none.
        known: the options that the command has.
        flag: whether they were typed on the command line.
        prog: the command, e.g. `lorica train`.
    """
    known = list(known)
    kind = "option" if flag else "key"
    lines = []
    for name, place in names:
        bare = name.split("=")[0].lstrip("-") if flag else name
        before = f"{place}: " if place else ""
        lines.append(f"{before}unknown {kind} `{name}`.{named_here(bare, known, flag=flag)}")
    end = f"`{prog} --help` lists the options"
    if not flag:
        end += "; keys are their names with underscores"
    return " ".join([*lines, end]) if len(lines) == 1 else "\n  ".join([*lines, end])
