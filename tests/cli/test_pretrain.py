"""`lorica pretrain`: a run's folder, its model, resuming, repeating, streaming, refusals."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

WORDS = "the a cat dog bird sees likes hears red blue small big and not very good bad".split()
METHODS = ["full", "lora", "relora(every=2)+dora", "galore"]


def story(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """One document of about 4,000 words, in paragraphs."""
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("\n\n".join(story(i, 40) for i in range(100)) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A config.json of 2 layers x 16."""
    file = tmp_path_factory.mktemp("shape") / "config.json"
    shape = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 300,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    file.write_text(json.dumps(shape))
    return file


@pytest.fixture
def pretrain(lorica, tiny, book, tmp_path) -> Callable:
    """`pretrain("--r", 2, out="a")`: six steps of the tiny shape into tmp_path / out."""

    def call(*words, out="out", data=book, steps=6, config=tiny):
        length = () if steps is None else ("--max-steps", steps)
        sources = data if isinstance(data, tuple) else (data,)
        return lorica(
            "pretrain", "--model-config", config, "--data", *sources, "--max-length", 16,
            "--output-dir", tmp_path / out, "--per-device-train-batch-size", 4, "--json", *length,
            *words,
        )  # fmt: skip

    return call


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def small(method: str) -> tuple:
    return ("--method", method) if method == "full" else ("--method", method, "--r", 2)


# -- what a run leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_an_ordinary_model(pretrain, tmp_path, monkeypatch, method):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorica.run import pretrain as running

    trained, save = {}, running.save
    ids = torch.arange(3, 15)[None]

    @torch.no_grad()
    def watched(plan):
        trained["logits"] = plan.model.eval()(ids).logits
        return save(plan)

    monkeypatch.setattr(running, "save", watched)
    ran = pretrain(*small(method), "--eval-fraction", 0.1, "--learning-rate", 0.1)
    assert ran.status == 0, ran.err
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "defaults.json", "metrics.jsonl", "result.json", "report.html",
        "samples.json", "model", "tokenizer", "checkpoint-4", "checkpoint-6",
    }  # fmt: skip
    assert {p.name for p in (out / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert ran.json == json.loads((out / "result.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        logits = plain(ids).logits
    torch.testing.assert_close(logits, trained["logits"], atol=1e-4, rtol=1e-4)
    assert float(logits.std()) > 0.1  # it has learnt something to compare
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert plain.config.use_cache and plain.config.eos_token_id == tokenizer.eos_token_id
    assert plain.config.pad_token_id is None  # the end of text trains, so it pads nothing
    told = ran.json
    assert told["parameters"] == sum(p.numel() for p in plain.parameters())
    assert told["gradient_bytes"] == 4 * told["trainable"]
    assert told["optimizer_bytes"] == told["summary"]["memory"]["optimizer"]
    assert told["schedule_bytes"] == 0


def test_the_pools_of_a_schedule_are_among_the_figures(pretrain, lorica, tiny, tmp_path):
    import torch

    words = small("switchlora(interval=10)")
    ran = pretrain(*words)
    assert ran.status == 0, ran.err
    saved = torch.load(tmp_path / "out" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    (state,) = saved["param_groups"][0]["lorica"]["schedules"].values()
    pools = [p for side in "AB" for p in state[side].values()]
    held = sum(p.numel() * p.element_size() for p in pools)
    assert ran.json["schedule_bytes"] == held > 0
    # min(in, out) spare vectors of either side: attention is 16 x 16, the rest 16 x 24.
    assert held == 2 * 4 * 16 * (4 * (16 + 16) + 3 * (16 + 24))
    dry = ("pretrain", "--model-config", tiny, *words, "--dry-run")
    assert lorica(*dry, "--json").json["schedule_bytes"] == held
    assert "of the optimizer's state, 31.0 KiB of schedules' state" in lorica(*dry).out


def test_tokens_are_counted(pretrain, tmp_path):
    ran = pretrain("--gradient-accumulation-steps", 2, "--max-tokens", 300, steps=None)
    assert ran.status == 0, ran.err
    assert ran.json["tokens_per_step"] == 4 * 2 * 16
    assert ran.json["steps"] == 3 and ran.json["tokens"] == 3 * 128  # 300 rounded up
    seen = [(line["step"], line["tokens"]) for line in lines(tmp_path / "out")]
    assert seen == [(1, 128), (2, 256), (3, 384)]
    a_pass = pretrain("--num-train-epochs", 2, out="pass", steps=None)
    assert a_pass.json["tokens"] == 2 * a_pass.json["data"]["rows"] * 16
    assert a_pass.json["steps"] * 4 == 2 * a_pass.json["data"]["rows"]


def test_every_method_starts_from_the_same_weights_and_sees_the_same_rows(pretrain, tmp_path):
    rate = ("--learning-rate", 1e-30)  # nothing moves, so the losses are those of the start
    losses = []
    for method in (*METHODS, "switchlora", "dora+olora"):
        assert pretrain(*small(method), *rate, out=method).status == 0
        losses.append([line["loss"] for line in lines(tmp_path / method)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)
    assert pretrain(*rate, "--seed", 7, out="seed").status == 0
    other = [line["loss"] for line in lines(tmp_path / "seed")]
    assert other[0] != pytest.approx(losses[0][0], abs=1e-5)


def test_the_evaluation_is_the_model_s_loss_on_full_rows(pretrain, book, tmp_path):
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ran = pretrain("--eval-data", book, "--eval-steps", 3, "--save-strategy", "no")
    assert ran.status == 0, ran.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids = torch.tensor(tokenizer(book.read_text())["input_ids"] + [tokenizer.eos_token_id])
    rows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    with torch.no_grad():
        logits = model(rows).logits[:, :-1].double()
    loss = float(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    found = ran.json["evaluation"]
    assert found["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert ran.json["eval_data"]["tokens"] == rows.numel()
    assert [x["step"] for x in lines(tmp_path / "out") if "eval_loss" in x] == [3, 6]
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    # The pace is that of training: evaluations, which took most of the time here, are left out.
    assert ran.json["tokens_per_second"] > ran.json["tokens"] / ran.json["seconds"]


def test_a_held_fraction_is_not_trained_on(pretrain):
    whole, part = pretrain(out="whole"), pretrain("--eval-fraction", 0.25, out="part")
    assert part.status == 0, part.err
    held, kept = part.json["eval_data"]["rows"], part.json["data"]["rows"]
    assert held == pytest.approx(whole.json["data"]["rows"] / 4, abs=4)
    assert kept + held == pytest.approx(whole.json["data"]["rows"], abs=4)


def test_the_first_tokens_of_a_held_fraction(pretrain):
    words = ("--eval-fraction", 0.25)
    whole = pretrain(*words, out="whole")
    found = {n: pretrain(*words, "--max-eval-tokens", n, out=str(n)) for n in (16, 40, 10**6)}
    for n, ran in found.items():
        assert ran.status == 0, ran.err
        most = whole.json["eval_data"]["rows"]
        assert ran.json["eval_data"]["rows"] == min(math.ceil(n / 16), most)
        assert ran.json["data"] == whole.json["data"]  # the rest is not trained on
    assert found[10**6].json["evaluation"] == whole.json["evaluation"]
    assert found[16].json["evaluation"] != whole.json["evaluation"]


def test_splits_and_the_first_tokens_to_evaluate_on(pretrain, shards):
    (shards / "valid.jsonl").write_text('{"text": "the cat sees the dog and the bird"}\n' * 50)
    few = ("--max-eval-tokens", 40)
    found = [
        pretrain("--eval-split", "valid", *few, out="a", data=shards),
        pretrain("--eval-data", shards / "valid.jsonl", *few, out="b", data=shards),
    ]
    for ran in found:
        assert ran.status == 0, ran.err
        assert ran.json["eval_data"]["rows"] == 3  # 40 tokens, in whole rows of 16
    one, other = (ran.json["eval_data"]["sha256"] for ran in found)
    assert one == other
    whole = pretrain("--eval-split", "valid", out="c", data=shards)
    assert whole.json["eval_data"]["rows"] > 3


def test_a_stream_s_own_split_to_evaluate_on(pretrain, shards, tmp_path):
    (shards / "validation.jsonl").write_text('{"text": "the cat sees the dog and the bird"}\n' * 50)
    made = pretrain(out="made", data=shards)
    assert made.status == 0, made.err
    words = ("--max-eval-tokens", 40, "--tokenizer", tmp_path / "made" / "tokenizer")
    found = [
        pretrain("--streaming", "--eval-split", "validation", *words, out="a", data=shards),
        pretrain("--eval-data", shards / "validation.jsonl", *words, out="b", data=shards),
    ]
    one, other = (ran.json["eval_data"] for ran in found)
    assert one == other and one["rows"] == 3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bf16_and_checkpointing_run(pretrain, method):
    ran = pretrain(
        *small(method), "--bf16", "--gradient-checkpointing", "--attn-implementation", "eager"
    )
    assert ran.status == 0, ran.err
    assert ran.json["model"]["dtype"] == "float32"


def test_config_yaml_repeats_the_run(pretrain, lorica, tmp_path):
    first = pretrain(*small("lora"), "--eval-fraction", 0.1, "--vocab-size", 280)
    assert first.status == 0, first.err
    again = lorica(
        "pretrain", tmp_path / "out" / "config.yaml", "--output-dir", tmp_path / "b", "--json"
    )
    assert again.status == 0, again.err
    assert same(tmp_path / "out", tmp_path / "b")
    assert again.json["loss"] == first.json["loss"]
    one, other = (yaml.safe_load((tmp_path / n / "config.yaml").read_text()) for n in ("out", "b"))
    assert {**one, "output_dir": ""} == {**other, "output_dir": ""}


def test_a_yaml_file_may_stand_first(lorica, tiny, book, tmp_path):
    file, out = tmp_path / "run.yaml", ("--output-dir", tmp_path / "out")
    file.write_text(
        f"model_config: {tiny}\ndata: [{book}]\nmethod: {{dora: null}}\nr: 2\nmax_tokens: 100\n"
        "max_length: 16\nper_device_train_batch_size: 2\nweight_decay: 1e-2\n"
    )
    ran = lorica("pretrain", file, "--r", 1, *out, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["method"] == "dora" and ran.json["recipe"]["r"] == 1
    assert ran.json["steps"] == 4
    file.write_text("vocab_sise: 300")
    ran = lorica("pretrain", file, *out)
    assert ran.status == 2 and "line 1: unknown key `vocab_sise`. Did you mean" in ran.err


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys\nfrom lorica.cli import main\nmain(['pretrain', '--help'])\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model-config" in done.stdout and "llama-1m" in done.stdout


def test_the_result_can_be_measured_and_asked(pretrain, lorica, book, tmp_path):
    assert pretrain().status == 0
    model = tmp_path / "out" / "model"
    measured = lorica("eval", "--model", model, "--data", book, "--json")
    assert measured.status == 0, measured.err
    assert measured.json["metrics"]["perplexity"] > 1
    asked = lorica(
        "generate", "--model", model, "--prompt", "the cat", "--max-new-tokens", 4, "--json"
    )
    assert asked.status == 0, asked.err
    assert asked.json["answers"][0]["tokens"] == 4
    tuned = lorica(
        "train", "--model", model, "--data", book, "--r", 2, "--max-steps", 1, "--output-dir",
        tmp_path / "tuned", "--json",
    )  # fmt: skip
    assert tuned.status == 0, tuned.err


def test_left_out_everything_means_the_embedded_text(lorica, tmp_path):
    ran = lorica(
        "pretrain", "--max-steps", 2, "--max-length", 32, "--output-dir", tmp_path / "out", "--json"
    )
    assert ran.status == 0, ran.err
    assert ran.json["parameters"] == 1_328_256 and ran.json["evaluation"]["eval_perplexity"] > 1


# -- data ------------------------------------------------------------------------------------------


def test_several_files_and_columns(pretrain, book, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": story(i, 30)}) + "\n" for i in range(20)))
    ran = pretrain("--columns", "text=body", data=rows)
    assert ran.status == 0, ran.err
    assert ran.json["data"]["documents"] == 20
    rows.write_text(rows.read_text().replace("body", "text"))
    both = pretrain("--documents", "paragraph", out="both", data=(book, rows))
    assert both.status == 0, both.err
    assert both.json["data"]["documents"] == 120
    one = pretrain(out="one")
    assert one.json["data"]["documents"] == 1


def test_a_given_tokenizer(pretrain, tmp_path):
    assert pretrain("--vocab-size", 290).status == 0
    made = tmp_path / "out" / "tokenizer"
    ran = pretrain("--tokenizer", made, out="given", config="llama-1m", steps=1)
    assert ran.status == 0, ran.err
    assert not (tmp_path / "given" / "tokenizer").exists()  # it lies with the model
    config = json.loads((tmp_path / "given" / "model" / "config.json").read_text())
    assert config["vocab_size"] == 290 and config["max_position_embeddings"] == 16
    wide = pretrain("--tokenizer", made, "--vocab-size", 320, out="wide")
    config = json.loads((tmp_path / "wide" / "model" / "config.json").read_text())
    assert wide.status == 0 and config["vocab_size"] == 320
    narrow = pretrain("--tokenizer", made, "--vocab-size", 280, out="narrow")
    assert narrow.status == 2 and "has 290 tokens; type `--vocab-size 290`" in narrow.err


# -- going on --------------------------------------------------------------------------------------


@pytest.fixture
def die(monkeypatch):
    """`die(5)`: the next run stops after step 5; `die(None)`: no more."""
    from lorica.run.log import RunLog

    step_end = RunLog.on_step_end

    def at(step):
        def stop(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise RuntimeError("the power went")
            return step_end(self, args, state, control, **kwargs)

        monkeypatch.setattr(RunLog, "on_step_end", stop)

    return at


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder that `datasets` streams: two files of 60 documents."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        rows = [{"text": story(100 * shard + i, 8 + i % 5)} for i in range(60)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"train-{shard}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_the_straight_run(pretrain, lorica, tmp_path, die, method):
    words = (*small(method), "--save-steps", 2, "--eval-fraction", 0.2, "--eval-steps", 2)
    straight = pretrain(*words, out="straight")
    assert straight.status == 0, straight.err
    die(5)
    killed = pretrain(*words, out="killed")
    assert killed.status == 1 and "the power went" in killed.err
    die(None)
    resumed = lorica("pretrain", "--output-dir", tmp_path / "killed", "--resume", "--json")
    assert resumed.status == 0, resumed.err
    assert same(tmp_path / "straight", tmp_path / "killed")
    for name in ("loss", "train_loss", "tokens", "evaluation", "adapter_sha256"):
        assert resumed.json[name] == straight.json[name], name
    kept = [
        [(x["step"], x.get("tokens")) for x in lines(tmp_path / n)] for n in ("straight", "killed")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("characters", [1_000_000, 500])
def test_a_stream_is_gone_on_with_where_it_stood(
    pretrain, lorica, tmp_path, die, shards, monkeypatch, characters
):
    """In one block of documents, and in many of which each ends within a step."""
    from lorica.data import streamed

    monkeypatch.setattr(streamed, "BATCH", characters)
    words = ("--streaming", "--save-steps", 2, "--gradient-accumulation-steps", 3)
    straight = pretrain(*words, out="straight", data=shards, steps=30)  # several passes
    assert straight.status == 0, straight.err
    die(21)
    assert pretrain(*words, out="killed", data=shards, steps=30).status == 1
    die(None)
    resumed = lorica("pretrain", "--output-dir", tmp_path / "killed", "--resume", "--json")
    assert resumed.status == 0, resumed.err
    assert same(tmp_path / "straight", tmp_path / "killed")
    assert resumed.json["tokens"] == straight.json["tokens"] == 30 * 12 * 16


@pytest.mark.parametrize("warm", [(), ("--warmup-ratio", 0.5), ("--warmup-steps", 2)])
def test_a_curve_that_a_schedule_brings_is_resumed_with_the_same_words(
    pretrain, tmp_path, die, warm
):
    """config.yaml has it in its method, with a warm-up that follows from the run's length."""
    curve = ("--lr-scheduler-type", "jagged_cosine", *warm, "--save-steps", 2)
    words = (*small("relora(every=2)"), *curve)
    straight = pretrain(*words, out="straight")
    assert straight.status == 0, straight.err
    die(5)
    assert pretrain(*words).status == 1
    die(None)
    method = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["method"]
    assert "lr_scheduler_type='jagged_cosine'" in method
    assert ("warmup_steps=" in method) == bool(warm), "by default less than a step warms up"
    for other in ("relora(every=3)", "dora+relora(every=2)"):
        ran = pretrain(*small(other), *curve, "--resume")
        assert ran.status == 2 and f"`method` is {method!r}, not {other!r}" in ran.err, ran.err
    flag, value = ("--warmup-steps", 3) if "--warmup-steps" in warm else ("--warmup-ratio", 0.4)
    ran = pretrain(*words, flag, value, "--resume")
    assert ran.status == 2 and f"`{flag[2:].replace('-', '_')}` is" in ran.err, ran.err
    resumed = pretrain(*words, "--resume")
    assert resumed.status == 0, resumed.err
    assert same(tmp_path / "straight", tmp_path / "out")


def test_a_resumed_run_is_the_same_run(pretrain, lorica, book, tmp_path, monkeypatch):
    from lorica.data.stream import Text

    data = tmp_path / "data.txt"
    data.write_text(book.read_text())
    assert pretrain(*small("lora"), "--save-steps", 2, data=data).status == 0
    again = ("pretrain", "--output-dir", tmp_path / "out", "--resume")
    data.write_text(book.read_text().upper())
    changed = lorica(*again)
    assert changed.status == 1 and "a file has changed" in changed.err

    def read(*args, **kwargs):
        raise AssertionError("data are read too early")

    monkeypatch.setattr(Text, "read", read)
    for words, part in [
        (("--seed", 1), "`seed` is 42, not 1"),
        (("--method", "dora"), "`method` is 'lora', not 'dora'"),
        (("--r", 4), "`r` is 2, not 4"),
        (("--data", book), "`data` is"),
        (("--learning-rate", 1e-4), "`learning_rate` is 0.001, not 0.0001"),
        (("--max-length", 32), "`max_length` is 16, not 32"),
    ]:
        ran = lorica(*again, *words)
        assert ran.status == 2 and part in ran.err, ran.err


# -- what is refused -------------------------------------------------------------------------------


def refused(ran, tmp_path: Path, status: int, *parts: str) -> None:
    assert ran.status == status, ran.err
    for part in parts:
        assert part in ran.err, ran.err
    assert "Traceback" not in ran.err and not (tmp_path / "out").exists()


USAGE = [
    (["--model-config", "llama-1n"], "llama-130m, llama-250m", "Did you mean `llama-1m`?"),
    (["--model-config", "no/config.json"], "is no shape, file or folder"),
    (["--vocab-size", "0"], "`--vocab-size 0`: it is a whole number of at least 1"),
    (["--max-tokens", "9", "--num-train-epochs", "1"], "the length of a run is given once"),
    (["--max-length", "65"], "ends at 64 tokens"),
    (["--max-length", "1"], "a row needs 2 tokens at least"),
    (["--lr-scheduler-type", "cosin"], "cosin"),
    (["--modules-to-save", "lm_head"], "unknown option `--modules-to-save`"),
    (["--vocab-sise", "9"], "Did you mean `--vocab-size`"),
    (["--eval-steps", "2"], "give `--eval-data`, `--eval-split` or `--eval-fraction` too"),
    (["--max-eval-tokens", "2"], "needs something to evaluate on"),
    (["--streaming", "--max-steps", "2", "--eval-split", "test"], "give `--max-eval-tokens` too"),
    (["--streaming"], "give `--max-steps` or `--max-tokens`"),
    (["--streaming", "--max-steps", "2", "--documents", "line"], "`--documents` has no effect"),
    (["--method", "full", "--r", "4"], "no effect"),
    (["--optim", "sgd"], "is not the rule of the method `full`"),
]


@pytest.mark.parametrize(("words", "parts"), [(u[0], u[1:]) for u in USAGE])
def test_wrong_usage_is_status_2(pretrain, tmp_path, words, parts):
    refused(pretrain(*words, steps=None), tmp_path, 2, *parts)


SHAPES = [
    ({"hidden_size": 18, "num_attention_heads": 4}, "makes no model", "attention heads (4)"),
    ({"model_type": "t5"}, "is of the type `t5`", "no causal language model"),
    ({"model_type": "bert", "max_position_embeddings": 64}, "tokens see those after them"),
    ({"model_type": "lama"}, "makes no model", "lama"),
    ({"model_type": None}, "makes no model"),
]


@pytest.mark.parametrize(("change", "parts"), [(s[0], s[1:]) for s in SHAPES])
def test_shapes_that_make_no_model_are_refused(pretrain, tiny, tmp_path, change, parts):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(tiny.read_text()), **change}))
    ran = pretrain(config=file)
    refused(ran, tmp_path, 1, *parts)
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_files_that_are_no_configuration_are_refused(pretrain, tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    refused(pretrain(config=file), tmp_path, 1, "with its `model_type`", str(file))


def test_too_little_text_is_counted(pretrain, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    refused(pretrain(data=short), tmp_path, 1, "too short", "one row needs 16")
    short.write_text(story(0, 60))
    ran = pretrain("--per-device-train-batch-size", 64, data=short)
    refused(ran, tmp_path, 1, "make", "one step (64 rows of 16) needs 1,024",
            "`--per-device-train-batch-size` (64)")  # fmt: skip
    ran = pretrain("--vocab-size", 9000, data=short)
    refused(ran, tmp_path, 1, "`--vocab-size 9000`", "tokens only")
    refused(pretrain("--vocab-size", 100), tmp_path, 1, "257 tokens at least")


def test_data_that_is_wrong_is_named(pretrain, tmp_path):
    refused(pretrain(data=tmp_path / "none.txt"), tmp_path, 1, "no file or folder", "none.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"colour": "red"}\n')
    refused(pretrain(data=rows), tmp_path, 1, "fit no shape of data")
    rows.write_text('{"text": "red"}\n{"text": 3}\n')
    refused(pretrain(data=rows), tmp_path, 1, "rows.jsonl, line 2")
    ran = pretrain("--documents", "line", data=rows)
    refused(ran, tmp_path, 2, "`--documents line`", "leave it out")
    ran = pretrain("--streaming", data="no-one/nothing")
    refused(ran, tmp_path, 1, "could not be found here, nor loaded")


# -- what it would cost ----------------------------------------------------------------------------


def test_a_dry_run_counts_and_writes_nothing(lorica, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("pretrain", "--model-config", "llama-1b", "--method", "lora", "--r", 512, "--dry-run")
    told = lorica(*words, "--json")
    assert told.status == 0, told.err
    assert told.json["parameters"] == 1_339_492_352 and told.json["trainable"] == 609_720_320
    assert told.json["gradient_bytes"] == 4 * 609_720_320
    assert told.json["optimizer_bytes"] == 8 * 609_720_320
    shown = lorica(*words)
    assert "609,720,320 train (54.5% less)" in shown.out and "GiB of gradients" in shown.out
    assert told.json["schedule_bytes"] == 0 and "schedules" not in shown.out
    wider = lorica("pretrain", "--vocab-size", 4096, "--dry-run", "--json")
    assert wider.json["parameters"] - 1_328_256 == 2 * 2048 * 128
    assert not list(tmp_path.iterdir())


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_equal_one(pretrain, tiny, shards, tmp_path, streaming):
    """Twice the batch in one process: the same tokens a step, and the same weights to rounding."""
    import os
    import subprocess
    import sys

    words = ["--streaming"] if streaming else []
    one = pretrain(*words, "--per-device-train-batch-size", 8, out="one", data=shards)
    assert one.status == 0, one.err
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lorica",
            "pretrain", "--model-config", str(tiny), "--data", str(shards), "--max-length", "16",
            "--per-device-train-batch-size", "4", "--max-steps", "6", "--output-dir",
            str(tmp_path / "two"), "--json", *words,
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)
    assert two["processes"] == 2
    assert two["tokens"] == one.json["tokens"] and two["tokens_per_step"] == 8 * 16
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize("words", [(), ("--streaming",)])
@pytest.mark.parametrize("method", ["loraga(batches=2)", "eva(batches=2)"])
def test_a_start_is_made_of_the_first_rows(pretrain, lorica, tmp_path, die, shards, method, words):
    words = (*small(method), *words, "--save-steps", 2)
    straight = pretrain(*words, out="straight", data=shards)
    assert straight.status == 0, straight.err
    assert f"`{method}` starts from 2 batches" in straight.err
    die(3)
    assert pretrain(*words, out="killed", data=shards).status == 1
    die(None)
    resumed = lorica("pretrain", "--output-dir", tmp_path / "killed", "--resume", "--json")
    assert resumed.status == 0, resumed.err
    assert same(tmp_path / "straight", tmp_path / "killed")
    assert "starts from 2 batches" not in resumed.err
    counted = pretrain(*words, "--dry-run", out="dry", data=shards)
    assert counted.status == 0, counted.err  # from shapes alone
