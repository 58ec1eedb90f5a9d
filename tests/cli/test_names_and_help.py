"""Keys of other programs, words that YAML takes for booleans, and the groups of `--help`."""

from __future__ import annotations

import dataclasses

import pytest

from lorica.cli._help import explanations
from lorica.cli._parse import parse
from lorica.cli.pretrain import Options as Pretrain
from lorica.cli.train import Options as Train
from lorica.run.options import GROUPS, UsageError, elsewhere, kinds


def read(tmp_path, text: str, *words: str) -> Train:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return parse(Train, [str(file), *words], prog="lorica train")


@pytest.mark.parametrize("word", ["no", "No", "off", "NO"])
def test_a_word_that_yaml_reads_as_false_is_what_the_option_takes(tmp_path, word):
    made = read(tmp_path, f"bf16: {word}\ngradient_checkpointing: on\nmodel: {word}\n")
    assert made.bf16 is False and made.gradient_checkpointing is True and made.model == word


def test_strategies_of_transformers_are_words(tmp_path):
    made = read(tmp_path, "eval_strategy: no\nsave_strategy: no\nbf16_full_eval: yes\n")
    assert made.further == {"eval_strategy": "no", "save_strategy": "no", "bf16_full_eval": True}
    assert read(tmp_path, "report_to: [no, yes]").report_to == ("no", "yes")


def test_a_boolean_is_not_a_text(tmp_path):
    with pytest.raises(UsageError, match="line 1: `model`: PATH is wanted, not false"):
        read(tmp_path, "model: false")
    with pytest.raises(UsageError, match="line 1: `r`: a whole number is wanted"):
        read(tmp_path, "r: off")


def test_every_unknown_key_is_named_with_what_it_is_called_here(tmp_path):
    keys = "lora_rank: 8\nr: 4\ncutoff_len: 9\nlerning_rate: 1\nxyzzyq: 1\ndo_train: true\n"
    with pytest.raises(UsageError) as found:
        read(tmp_path, keys)
    told = str(found.value)
    for part in (
        "line 1: unknown key `lora_rank`. Here it is `r`.",
        "line 3: unknown key `cutoff_len`. Here it is `max_length`.",
        "line 4: unknown key `lerning_rate`. Did you mean `learning_rate`?",
        "line 5: unknown key `xyzzyq`.",
        "line 6: unknown key `do_train`. Leave it out: a run always trains.",
        "`lorica train --help`",
    ):
        assert part in told
    assert "line 2" not in told


def test_every_unknown_flag_is_named_with_what_it_is_called_here():
    words = ["--lora-rank", "8", "--micro_batch_size=4", "--seed", "3", "--num-epochs", "2"]
    with pytest.raises(UsageError) as found:
        parse(Train, words, prog="lorica train")
    for part in (
        "`--lora-rank`. Here it is `--r`.",
        "`--micro_batch_size=4`. Here it is `--per-device-train-batch-size`.",
        "`--num-epochs`. Here it is `--num-train-epochs`.",
    ):
        assert part in str(found.value)


def test_an_option_that_the_command_lacks_is_not_proposed():
    assert elsewhere.named_here("val_size", kinds(Pretrain)).startswith(
        " Here it is `eval_fraction"
    )
    assert "`model`" not in elsewhere.named_here("base_model", kinds(Pretrain))


def test_the_table_names_options_that_there_are():
    from lorica.cli._training import TrainingFields
    from lorica.run.options import TrainOptions

    ours = kinds(Train).keys() | TrainingFields(TrainOptions, "train").names()
    names = [name for _, others in elsewhere.table() for name in others]
    assert {option for option, _ in elsewhere.table()} <= ours
    assert len(names) == len(set(names)) and not ours & set(names)
    assert {name for group in GROUPS for name in group.further} <= ours


@pytest.mark.parametrize("options", [Train, Pretrain])
def test_every_option_is_in_one_group_and_explained(options, capsys):
    grouped = [name for group in GROUPS for name in group.names]
    assert len(grouped) == len(set(grouped))
    assert kinds(options).keys() <= set(grouped)
    with pytest.raises(SystemExit):
        parse(options, ["--help"], prog="lorica x")
    page = capsys.readouterr().out
    for field in dataclasses.fields(options):
        if field.name in kinds(options):
            assert page.count(f"\n  --{field.name.replace('_', '-')}") >= 1
            assert explanations(options).get(field.name), field.name
    titles = [line[:-1] for line in page.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [group.title for group in GROUPS]
