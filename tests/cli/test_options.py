"""The options of the command line, verb by verb: adding or renaming one is a decision."""

from __future__ import annotations

import importlib

import pytest

from lorica.cli import verbs
from lorica.run.options import kinds

OPTIONS = {
    "demo": ("examples json learning_rate max_steps method output_dir seed"),
    "doctor": ("json self_test"),
    "eval": (
        "adapter answer_pattern chat_template columns compare_base data dtype exact_match "
        "header ignore_base_hash json load_in_4bit load_in_8bit max_length max_new_tokens "
        "max_samples metrics model per_device_eval_batch_size quantization split task train_on "
        "trust_remote_code"
    ),
    "export": (
        "adapter dtype ignore_base_hash json model output_dir overwrite portable r to "
        "trust_remote_code"
    ),
    "generate": (
        "adapter batch_size chat chat_template columns do_sample dtype file header "
        "ignore_base_hash json load_in_4bit load_in_8bit max_new_tokens max_samples merged model "
        "num_beams num_return_sequences output quantization repetition_penalty seed "
        "stop_strings stream temperature top_k top_p trust_remote_code"
    ),
    "inspect": ("adapter json"),
    "merge": (
        "accept_change adapter approximate ignore_base_hash into json load_in_4bit load_in_8bit "
        "max_shard_size model output_dir overwrite published quantization trust_remote_code"
    ),
    "methods": ("json words"),
    "pretrain": (
        "alpha_pattern attn_implementation bf16 columns data documents dry_run eval_data "
        "eval_fraction eval_split exclude_modules gradient_accumulation_steps "
        "gradient_checkpointing json layers_to_transform learning_rate lora_alpha "
        "lora_dropout lora_dropout_on lr_scheduler_type max_eval_tokens max_length max_steps "
        "max_tokens method model_config modules_learning_rate num_train_epochs output_dir "
        "overwrite_output_dir per_device_train_batch_size r rank_pattern report_html report_to "
        "resume seed split streaming target_modules target_parameters tokenizer trust_remote_code "
        "verbose vocab_size warmup_ratio"
    ),
    "report": ("json output runs"),
    "push": ("folder json private repo_id revision"),
    "targets": (
        "adapt_towers exclude_modules json layers_to_transform load_in_4bit load_in_8bit "
        "lora_alpha method model quantization r target_modules target_parameters trust_remote_code"
    ),
    "train": (
        "adapt_towers adapter add_tokens alpha_pattern attn_implementation bf16 bias "
        "chat_template columns data documents dtype early_stopping_patience eval_data "
        "eval_fraction eval_split "
        "exclude_modules gradient_accumulation_steps gradient_checkpointing header "
        "ignore_base_hash json layers_to_transform learning_rate load_in_4bit load_in_8bit "
        "lora_alpha lora_dropout lora_dropout_on lr_scheduler_type max_length max_lost_text "
        "max_samples max_steps method model modules_learning_rate modules_to_save now "
        "num_train_epochs output_dir overwrite_output_dir packing per_device_train_batch_size "
        "quantization r rank_pattern report_html report_to resume seed shape split target_modules "
        "target_parameters task train_on trust_remote_code verbose warmup_ratio"
    ),
}


def test_the_verbs_are_these():
    assert sorted(verbs()) == sorted(OPTIONS)


@pytest.mark.parametrize("verb", sorted(OPTIONS))
def test_the_options_are_these(verb):
    options = importlib.import_module(f"lorica.cli.{verb}").Options
    assert sorted(kinds(options)) == sorted(OPTIONS[verb].split())
