"""Other programs that save a model: while adapters are attached they write the adapters."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import transformers
from files import close
from transformers import AutoModelForCausalLM

import lorica
from lorica import Adapters
from models import batch, llama, logits, perturb


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    return folder


def adapted(base, method="dora", **fields):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters = lorica.attach(model, method, r=4, verbose=False, **fields)
    perturb(adapters)
    return model, adapters


@pytest.mark.parametrize("method", ["olora", "dora+olora"])
def test_save_pretrained_writes_the_adapters_and_from_pretrained_reads_them(
    base, tmp_path, caplog, method
):
    peft = pytest.importorskip("peft")
    model, adapters = adapted(base, method, modules_to_save=["lm_head"])
    want, out = logits(model), tmp_path / "out"
    with caplog.at_level(logging.INFO, "lorica"):
        model.save_pretrained(out)
    assert "holds the adapters, as `lorica.save` writes them" in caplog.text
    twin = lorica.save(adapters, tmp_path / "twin")
    assert {f.name for f in out.iterdir()} == {f.name for f in twin.iterdir()}
    assert (out / "adapter_model.safetensors").read_bytes() == (
        twin / "adapter_model.safetensors"
    ).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "olora":  # of PEFT's own DoRA files, too, transformers loses the magnitudes
            close(logits(AutoModelForCausalLM.from_pretrained(out)), want)
        close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(out)), want)
    close(logits(lorica.load(llama(), out).model), want)


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_a_copy_writes_its_own_and_a_plain_model_writes_itself(base, tmp_path, method):
    model, _ = adapted(base, method)
    twin = copy.deepcopy(model)
    perturb(Adapters.of(twin), 0.5)
    twin.save_pretrained(tmp_path / "twin")
    assert lorica.load(llama(), tmp_path / "twin").fingerprint() == Adapters.of(twin).fingerprint()
    want = logits(lorica.merge(model))
    model.save_pretrained(tmp_path / "plain")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), want)
    lorica.detach(twin)
    twin.save_pretrained(tmp_path / "detached")
    assert (tmp_path / "detached" / "config.json").exists()


def test_a_model_that_trains_in_place_writes_itself(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    perturb(lorica.attach(model, "full", verbose=False))
    model.save_pretrained(tmp_path / "out")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_folders_that_hold_something(base, tmp_path):
    model, adapters = adapted(base)
    out = tmp_path / "run"
    (out / "checkpoint-1").mkdir(parents=True)
    model.save_pretrained(out)
    perturb(adapters)
    model.save_pretrained(out)
    assert sorted(f.name for f in out.iterdir())[-2:] == ["checkpoint-1", "lorica.json"]
    assert lorica.load(llama(), out).fingerprint() == adapters.fingerprint()
    with pytest.raises(ValueError, match="holds a whole model"):
        model.save_pretrained(base)
    assert not (base / "lorica.json").exists()


@pytest.mark.parametrize("option", [{"push_to_hub": True}, {"variant": "fp16"}])
def test_options_without_a_meaning_for_adapters(base, tmp_path, option):
    model, _ = adapted(base)
    with pytest.raises(ValueError, match=f"`save_pretrained.{[*option][0]}=.*lorica.save"):
        model.save_pretrained(tmp_path / "out", **option)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def arguments(folder, **over):
    return transformers.TrainingArguments(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=1e-2, **over,
    )  # fmt: skip


def rows():
    return [{k: v[0] for k, v in batch(llama()).items()} for _ in range(8)]


def test_the_plain_trainers_checkpoints_hold_the_adapters(base, tmp_path):
    model, adapters = adapted(base, "lora")
    trainer = transformers.Trainer(model, arguments(tmp_path / "run"), train_dataset=rows())
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "run"):
        assert lorica.load(llama(), folder).fingerprint() == adapters.fingerprint()
    # It knows no way to read them back, and says so instead of going on with other weights.
    before = adapters.fingerprint()
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert adapters.fingerprint() == before


def test_accelerates_states_are_exact_also_after_links_were_finished(base, tmp_path):
    from accelerate import Accelerator

    model, adapters = adapted(base, "cola(every=1)")
    optimizer = lorica.optimizer(adapters, total_steps=4)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        model(**batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "state"))
    kept = adapters.fingerprint()
    other, fresh = adapted(base, "cola(every=1)")
    again = Accelerator(cpu=True)
    again.prepare(other, lorica.optimizer(fresh, total_steps=4))
    again.load_state(str(tmp_path / "state"))
    assert fresh.fingerprint() == kept
    torch.testing.assert_close(logits(other), logits(model))
