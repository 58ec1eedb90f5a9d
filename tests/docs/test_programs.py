"""The table of docs/files.md: other programs read what it says, and compute the same."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorica
import models
from models import batch, logits, perturb

PAGE = Path(__file__).parents[2] / "docs" / "files.md"


def with_peft(base, adapter, merged):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter))


def with_transformers_and_peft(base, adapter, merged):
    base.load_adapter(str(adapter))
    return base


def with_transformers(base, adapter, merged):
    return AutoModelForCausalLM.from_pretrained(merged)


def with_trl(base, adapter, merged):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    args = SFTConfig(
        output_dir=str(adapter.parent / "trl"), report_to=[], use_cpu=True, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=8,
    )  # fmt: skip
    model = with_peft(base, adapter, merged)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=_words()).model


def _words():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lorica.embedded.base_path())


PROGRAMS = {
    "PEFT": with_peft,
    "transformers, with PEFT installed": with_transformers_and_peft,
    "transformers": with_transformers,
    "TRL": with_trl,
}


def test_the_table_names_these_programs():
    section = PAGE.read_text().split("## Which program reads what")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    tried = [program.strip() for program, _, how in rows if "not tried" not in how]
    assert tried == [*PROGRAMS]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compute_the_same(program, tmp_path):
    pytest.importorskip("trl" if program == "TRL" else "peft")
    model = models.llama()
    base = copy.deepcopy(model)
    # transformers reads no magnitudes by itself, as the page says.
    method = "olora" if program == "transformers, with PEFT installed" else "dora+olora"
    perturb(lorica.attach(model, method, r=2, verbose=False))
    wanted = logits(model)
    adapter = lorica.save(model, tmp_path / "adapter")
    lorica.formats.merge_to(model, tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = PROGRAMS[program](base, adapter, tmp_path / "merged").eval()
        with torch.no_grad():
            found = other(**batch(model)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
