"""An option of transformers that would change nothing is refused."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("words, where", [
    (("--fp16",), "on a CPU"),
    (("--tf32", "true"), "on a CPU"),
    (("--torch-empty-cache-steps", 2), "on a CPU"),
    (("--ddp-bucket-cap-mb", 9), "in a single process"),
    (("--dataloader-persistent-workers",), "without `--dataloader-num-workers`"),
    (("--eval-accumulation-steps", 2), "without data to evaluate on"),
    (("--hub-model-id", "a/b"), "without `--push-to-hub`"),
    (("--optim-target-modules", "q_proj"), "the method brings its own"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(train, tmp_path, words, where):
    ran = train(*words, "--use-cpu", steps=1)
    assert ran.status == 2 and words[0] in ran.err and where in ran.err
    assert not (tmp_path / "out").exists()


def test_the_table_names_fields_that_there_are():
    from transformers import TrainingArguments

    from lorica.run.effects import CONDITIONS

    assert CONDITIONS.keys() <= TrainingArguments.__dataclass_fields__.keys()
