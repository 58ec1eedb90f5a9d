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
import models
from lorica import Adapters, embedded, run
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


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_a_plain_trainer_that_is_to_load_the_best_is_refused_at_its_first_save(
    base, tmp_path, method
):
    model, adapters = adapted(base, method)
    fields = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    data = {"train_dataset": rows(), "eval_dataset": rows()}
    trainer = transformers.Trainer(model, arguments(tmp_path / "run", **fields), **data)
    with pytest.raises(ValueError, match="load_best_model_at_end.*lorica.run.Trainer"):
        trainer.train()
    assert not list((tmp_path / "run").rglob("lorica.json"))
    # Lorica's own reads them back, and a save by hand within it is nobody's mistake.
    trainer = run.Trainer(model, arguments(tmp_path / "own", **fields), **data)
    trainer.add_callback(SaveByHand(tmp_path / "hand"))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert lorica.load(llama(), best).fingerprint() == adapters.fingerprint()
    assert (tmp_path / "hand" / "lorica.json").exists()


class SaveByHand(transformers.TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, model=None, **others):
        model.save_pretrained(self.folder)


def test_accelerates_save_model_is_refused_until_the_adapters_are_merged(base, tmp_path):
    from accelerate import Accelerator, load_checkpoint_in_model

    model, _ = adapted(base, "lora")
    accelerator = Accelerator(cpu=True)
    for held in (model, torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match="`Accelerator.save_model`.*lorica.save"):
            accelerator.save_model(held, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    want = logits(lorica.merge(model))
    assert not model._state_dict_pre_hooks
    accelerator.save_model(model, tmp_path / "out")
    plain = llama()
    load_checkpoint_in_model(plain, tmp_path / "out")
    close(logits(plain), want)


class Holder(torch.nn.Module):
    """As `sentence-transformers` and Lightning hold a model of transformers."""

    def __init__(self, base):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(base)


def test_a_part_of_what_was_adapted_is_refused(base, tmp_path):
    holder = Holder(base)
    adapters = lorica.attach(holder, "lora", r=4, verbose=False)
    perturb(adapters)
    for part in (holder.model, holder.model.model):
        with pytest.raises(ValueError, match="of a part of this Holder.*lorica.save"):
            part.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    twin = copy.deepcopy(holder)
    lorica.detach(twin)
    twin.model.save_pretrained(tmp_path / "twin")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twin")), logits(llama()))
    want = logits(holder.model)
    lorica.save(adapters, tmp_path / "adapter")
    again = Holder(base)
    lorica.load(again, tmp_path / "adapter")
    close(logits(again.model), want)
    lorica.merge(holder)
    holder.model.save_pretrained(tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)


def sentences(folder):
    """`sentence-transformers`' model over the embedded one, without its head."""
    st = pytest.importorskip("sentence_transformers")
    from transformers import AutoTokenizer

    base, inner = embedded.base_path(), folder / "inner"
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(inner)
    AutoTokenizer.from_pretrained(base).save_pretrained(inner)
    return st.SentenceTransformer(str(inner), device="cpu")


def test_sentence_transformers(tmp_path):
    model = sentences(tmp_path)
    lorica.attach(model, "lora", r=4, verbose=False)
    with pytest.raises(ValueError, match="of a part of this SentenceTransformer"):
        model.save(str(tmp_path / "whole"))
    lorica.detach(model)
    inner = next(m for m in model.modules() if isinstance(m, transformers.PreTrainedModel))
    adapters = lorica.attach(inner, "lora", r=4, verbose=False)
    perturb(adapters)
    want = torch.tensor(model.encode(["stone"]))
    model.save(str(tmp_path / "saved"))
    pytest.importorskip("peft")
    again = type(model)(str(tmp_path / "saved"), device="cpu")
    close(torch.tensor(again.encode(["stone"])), want)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about torch
@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("method", ["lora", "cola(every=1)"])
def test_lightnings_checkpoint_resumes_exactly(tmp_path, method, automatic):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic
            self.model = llama()
            self.adapters = lorica.attach(self.model, method, r=4, verbose=False)

        def training_step(self, ids, index):
            loss = self.model(input_ids=ids, labels=ids).loss
            if not automatic:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self):
            return lorica.optimizer(self.adapters, total_steps=4)

    def fit(module, epochs, **fields):
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        ids = torch.arange(20).reshape(4, 5) % 8
        trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=2), **fields)
        return trainer

    half, whole, resumed = Module(), Module(), Module()
    fit(half, 1).save_checkpoint(tmp_path / "half.ckpt")
    read = Module.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    assert read.adapters.fingerprint() == half.adapters.fingerprint()
    fit(whole, 2)
    fit(resumed, 2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.adapters.fingerprint() == whole.adapters.fingerprint()


@pytest.mark.filterwarnings("ignore")  # TRL's own, about transformers
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trls_plain_trainers_write_the_adapters_and_cannot_resume(tmp_path, kind):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    base = embedded.base_path()
    model, adapters = adapted(base, "lora")
    pair = {"prompt": "stone", "chosen": " a", "rejected": " b"}
    more = {"ref_model": AutoModelForCausalLM.from_pretrained(base)} if kind == "DPO" else {}
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_steps=1, save_steps=1,
        per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([pair if kind == "DPO" else {"text": "a stone"}])
    words = AutoTokenizer.from_pretrained(base)
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=args, train_dataset=rows, processing_class=words, **more
    )
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    fresh = AutoModelForCausalLM.from_pretrained(base)
    assert lorica.load(fresh, folder).fingerprint() == adapters.fingerprint()
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_model_that_holds_the_adapted_one_is_not_saved_under_its_names(tmp_path):
    model = llama(num_hidden_layers=1)
    adapters = lorica.attach(model.model, "lora", r=2, verbose=False)
    with pytest.raises(ValueError, match="LlamaModel at 'model' has adapters"):
        model.save_pretrained(tmp_path / "whole")
    assert [*model.state_dict()] and adapters.model is model.model, "others may take the tensors"
    lorica.merge(model.model)
    model.save_pretrained(tmp_path / "whole")
    again = type(model).from_pretrained(tmp_path / "whole")
    assert torch.equal(models.logits(again.eval()), models.logits(model))
