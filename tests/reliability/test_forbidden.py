"""Files and folders that this user may not use: one clear error, wherever they are looked at."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_runs import lacks
from hostile_subjects import tokenizer

import lorica
import models
from lorica import cli
from lorica.data import read
from lorica.data.chat import template_of
from lorica.data.stream import has_txt
from lorica.data.streamed import Streamed
from lorica.formats import inspect
from lorica.methods.kernels._measured import Table
from lorica.run import checkpoints, config, load_model, model_configs, quantization
from lorica.run.folder import HEAD, RunFolder
from lorica.run.options import TrainOptions
from lorica.run.options.kinds import TOKENS
from lorica.text import clear_errors, refusal

NOBODY = 65534
ROW = '{"text": "the cat sees the dog"}\n'


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so it is somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture(scope="module")
def good() -> Iterator[Path]:
    """A model, an adapter, a run and other files, all readable."""
    root = Path(tempfile.mkdtemp(prefix="lorica-"))
    root.chmod(0o755)
    models.llama(vocab_size=64).save_pretrained(root / "model")
    tokenizer(root / "model")
    lorica.save(lorica.attach(models.llama(), "lora", r=2, verbose=False), root / "adapter")
    run = root / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "config.yaml").write_text(f"{HEAD}\nmethod: lora\n")
    (run / "defaults.json").write_text('{"lorica": "0", "defaults": {}}')
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 1}\n')
    (run / "result.json").write_text('{"versions": {"lorica": "0"}}')
    (run / "checkpoint-2" / "trainer_state.json").write_text("{}")
    checkpoints.seal(run / "checkpoint-2", whole=True)
    (root / "data" / "inner").mkdir(parents=True)
    (root / "data" / "inner" / "rows.jsonl").write_text(ROW)
    (root / "files").mkdir()
    for name, text in {
        "rows.jsonl": ROW, "tokens.txt": "<a>\n", "options.json": '{"quant_method": "torchao"}',
        "run.yaml": "r: 2\n", "chat.jinja": "{{ messages[0]['content'] }}",
        "config.json": '{"model_type": "llama"}', "orders.json": '{"orders": []}',
    }.items():  # fmt: skip
        (root / "files" / name).write_text(text)
    for path in root.rglob("*"):  # safetensors makes its files private
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield root
    shutil.rmtree(root, ignore_errors=True)


def check(path: Path, resume: str | None = None) -> object:
    return RunFolder(path).check(resume=resume, overwrite=resume is None)


def option(name: str, path: Path) -> None:
    TrainOptions(method="lora", r=2, further={name: str(path)}).check()


# what is forbidden, what is called, and the path that the message names
CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("run", lambda p: RunFolder(p).checkpoints(), "run"),
    ("run", lambda p: check(p), "run"),
    ("run", lambda p: check(p, "last"), "run"),
    ("run", lambda p: RunFolder(p).lines(), "run/metrics.jsonl"),
    ("run/config.yaml", lambda p: check(p.parent), "run/config.yaml"),
    ("run/config.yaml", lambda p: clear_errors()(config.read)(p.parent), "run/config.yaml"),
    ("run/defaults.json", lambda p: check(p.parent), "run/defaults.json"),
    ("run/result.json", lambda p: check(p.parent), "run/result.json"),
    ("run/metrics.jsonl", lambda p: RunFolder(p.parent).lines(), "run/metrics.jsonl"),
    ("run/checkpoint-2", lambda p: check(p.parent, "last"), "run/checkpoint-2/checkpoint.json"),
    ("run/checkpoint-2", lambda p: checkpoints.flaw(p), "run/checkpoint-2/checkpoint.json"),
    ("run/checkpoint-2/trainer_state.json", lambda p: checkpoints.damage(p.parent), ""),
    ("data", lambda p: read(p), "data"),
    ("data/inner", lambda p: read(p.parent), "data/inner"),
    ("data", lambda p: has_txt([str(p)]), "data"),
    ("data", lambda p: Streamed(str(p)), "data"),
    ("files/rows.jsonl", lambda p: read(p), ""),
    ("files", lambda p: read(p / "rows.jsonl"), "files/rows.jsonl"),
    ("files/chat.jinja", lambda p: template_of(None, str(p), starts=False), ""),
    ("files/tokens.txt", lambda p: TOKENS.from_yaml(str(p)), ""),
    ("files", lambda p: TOKENS.from_yaml(str(p / "tokens.txt")), "files/tokens.txt"),
    ("files/options.json", lambda p: quantization.asked(quantization=str(p)), ""),
    ("files/options.json", lambda p: option("accelerator_config", p), ""),
    ("files/options.json", lambda p: option("fsdp_config", p), ""),
    ("files/config.json", lambda p: model_configs.find(str(p)), ""),
    ("files/orders.json", lambda p: Table.read(p), ""),
    ("model", lambda p: load_model.check_source(str(p)), "model/config.json"),
    ("model/config.json", lambda p: load_model.read_config(str(p.parent)), ""),
    ("model/generation_config.json", lambda p: load_model.check_source(str(p.parent)), ""),
    ("model/model.safetensors", lambda p: load_model.read_config(str(p.parent)), ""),
    ("model/tokenizer_config.json", lambda p: load_model.load_tokenizer(str(p.parent)), ""),
    ("adapter", lambda p: lorica.load(models.llama(), p), "adapter/lorica.json"),
    ("adapter", lambda p: inspect(p), "adapter/lorica.json"),
    ("adapter/adapter_config.json", lambda p: inspect(p.parent), ""),
    ("adapter/adapter_model.safetensors", lambda p: lorica.load(models.llama(), p.parent), ""),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_path_without_permission_is_named_with_the_way_out(number, good):
    name, call, named = CASES[number]
    path = good / name
    with contextlib.suppress(ValueError):  # everything is imported by the one who may
        call(path)
    before = path.stat().st_mode
    path.chmod(0)
    try:
        with as_nobody(), pytest.raises(ValueError) as caught:
            call(path)
    finally:
        path.chmod(before)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError) and lacks(text) is None, text
    assert str(good / (named or name)) in text and "Permission denied" in text
    assert "`ls -ld`" in text or "Name a file" in text, text


def test_the_command_line_says_it_too(good, capsys, tmp_path):
    file = good / "files" / "run.yaml"
    for words in (["train", file], ["pretrain", "--resume", "--output-dir", good / "run"]):
        target = file if file in words else good / "run"
        before = target.stat().st_mode
        target.chmod(0)
        try:
            with as_nobody():
                assert cli.main([str(word) for word in words]) == 1
        finally:
            target.chmod(before)
        said = capsys.readouterr().err
        assert said.startswith(f"lorica: `{target}") and "Permission denied. Give this" in said


def test_what_the_system_refuses_has_a_way_out_for_each_number():
    for number in range(1, 134):
        error = OSError(number, "what the system says", "some/where")
        text = refusal(error)
        assert text is not None and text.startswith("`some/where`: ") and lacks(text) is None
    assert refusal(OSError("worded by whoever raised it")) is None
    with pytest.raises(OSError, match="worded"), clear_errors():
        raise OSError("worded by whoever raised it")
    with pytest.raises(ValueError, match=r"^`a\\u001b\[2J`: No space left on device\. Make room"):
        with clear_errors():
            raise OSError(28, "No space left on device", b"a\x1b[2J")


@pytest.mark.parametrize("text, why", [
    ("{1", "line 1, column 2: Expecting property name"), ("[1]", "it holds a list, not a mapping"),
    ("{" + '"a": {' * 300 + "}" * 301, "nested more than 100 levels"), ("", "line 1, column 1"),
    (None, "no UTF-8 text"), ("{}\n{}", "line 2, column 1: Extra data"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["quantization", "accelerator_config", "deepspeed", "fsdp_config"])
def test_options_that_are_json_or_a_file_of_it(name, text, why, tmp_path):
    file = tmp_path / "options.json"
    file.write_bytes(b'{"a": "\xff"}' if text is None else text.encode())
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=why) as caught:
        if name == "quantization":
            quantization.asked(quantization=str(file))
        else:
            option(name, file)
    assert flag in str(caught.value) and "JSON itself is wanted" in str(caught.value)
    assert str(file) in str(caught.value)


BROKEN = {
    "rows.jsonl": (ROW.encode() * 3000 + b'{"text": \n', "Invalid value|Expected object"),
    "cut.parquet": (b"PAR1" + b"x" * 100 + b"PAR1", "Parquet"),
    "cut.jsonl.gz": (b"no gzip" * 30, "Not a gzipped file"),
    "words.txt": (b"the \xff\xfe\n" * 9, "can't decode byte 0xff"),
    "ragged.csv": (b"text,x\na,1\na,b,c,d\n", "Expected 2 fields in line 3"),
    "empty.jsonl": (b"", "a file of it holds no rows"),
    "a.xml": (b"<a>", "No such file"),
    "a.tar": (b"x" * 2000, "ReadError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_streamed_files_that_are_broken(name, tmp_path):
    data, why = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=why) as caught:
        for _ in Streamed(str(tmp_path)).texts(10**7):
            pass
    text = str(caught.value)
    assert type(caught.value) is ValueError and str(tmp_path) in text and lacks(text) is None
    assert "leaving `--streaming` out" in text


def test_a_card_of_a_data_set_that_is_no_yaml(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    for card in (
        "configs: [",
        "configs: 3\ndataset_info: x",
        "configs:\n- data_files: /etc/passwd",
    ):
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
        with pytest.raises(ValueError, match="could not be read"):
            Streamed(str(tmp_path))
    assert json.loads(ROW)["text"] in read(tmp_path)["text"][:]
