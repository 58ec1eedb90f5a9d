"""Files that lie: each is read, or refused in one clear message; none hangs, crashes, eats the
memory, runs code or leads out of its folder. `benchmarks/fuzz.py` does the same at length."""

from __future__ import annotations

import copy
import gzip
import json
import lzma
import os
import re
import struct
import time
from pathlib import Path

import hostile_bytes
import pytest
import torch
from hostile_runs import GOOD, forked
from hostile_subjects import Subjects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorica
import models
from lorica import formats
from lorica.data import detect, prepare, read
from lorica.formats.safe_files import read_json, read_tensors
from lorica.run import load_model

GROUPS = ("native", "peft", "classifier", "data", "model", "config")
KINDS = ("pattern", "template", "columns", "escape", "call")  # values planted, see hostile_kinds.py


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("hostile"), checkpoints=False)


def bad(subjects: Subjects, seed: int, count: int, only: str) -> list[str]:
    """What came of so many inputs that is neither success nor one clear error."""
    return [
        f"input {number} of seed {seed}: {result.subject}, {result.file}, {result.change}: {found}"
        for number in range(count)
        for result in [subjects.run(seed, number, only)]
        for found in result.outcomes
        if found.kind not in GOOD
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_inputs_are_read_or_refused(subjects, group):
    assert not bad(subjects, seed=1, count=30, only=group)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_values_are_read_or_refused(subjects, kind, monkeypatch):
    monkeypatch.setattr("lorica.data.bounded.PATIENCE", 0.3)
    monkeypatch.setattr("lorica.patterns.PATIENCE", 0.1)
    assert not bad(subjects, seed=1, count=8, only=kind)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("group", (*GROUPS, *KINDS))
def test_many_hostile_inputs_are_read_or_refused(subjects, group, seed):
    assert not bad(subjects, seed, count=300, only=group)


def test_the_judge_sees_what_it_is_there_for(subjects):
    """The harness itself: a hang, a foreign error, memory, code, a message without its parts."""

    def kind(step, seconds=20.0):
        return forked([("step", step)], seconds=seconds, canary=subjects.canary)[-1].kind

    def big():
        torch.ones(400 << 20, dtype=torch.uint8)

    assert kind(lambda: None) == "success"
    assert kind(lambda: time.sleep(30), seconds=0.5) == "hang"
    assert kind(lambda: [][0]) == kind(lambda: json.loads("{")) == "foreign"
    assert kind(big) == "memory"
    assert kind(lambda: os.kill(os.getpid(), 9)) == "killed"
    assert kind(lambda: subjects.canary.touch()) == "executed"
    assert kind(lambda: read_json(Path("/nowhere/at/../all"))) in ("refused", "foreign")


# -- properties ------------------------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes_as_a_configuration(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("json") / "adapter_config.json"
    file.write_bytes(data)
    try:
        assert isinstance(read_json(file), dict)
    except ValueError as error:
        assert type(error) is ValueError and str(file) in str(error)


SHAPES = st.lists(st.integers(-2, 2**63), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "F8_E4M3", "F4", "X", "C64"]),
        "shape": SHAPES,
        "data_offsets": st.lists(st.integers(-4, 2**64), min_size=1, max_size=3),
    }
)


@given(
    st.dictionaries(st.text(max_size=9), ENTRIES, max_size=3), st.binary(max_size=32),
    st.none() | st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_any_header_as_tensors(tmp_path_factory, header, body, length):
    """Declared sizes are compared with the file's before anything of that size is made."""
    file = tmp_path_factory.mktemp("tensors") / "adapter_model.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    try:
        tensors = read_tensors(file)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(body)
    except ValueError as error:
        assert type(error) is ValueError and str(file) in str(error)


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.strip()))
def test_any_text_comes_back_as_it_was(tmp_path_factory, text):
    """Also one that begins with the mark of cells that are kept as JSON."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    for value in (text, "\x1e" + text, '\x1e["a"]'):
        file.write_text(json.dumps({"text": value}) + "\n")
        if "\ud800" <= max(value) <= "\udfff":
            continue
        rows = read(file)
        (row,) = detect(rows.column_names).rows(rows[:])
        assert row.values["text"] == value


@given(st.binary(max_size=300), st.sampled_from(sorted(hostile_bytes.PACKERS)), st.integers(1, 3))
def test_packed_streams_are_whole_or_refused(tmp_path_factory, data, suffix, streams):
    """Several streams read as one, zeros pad them, and anything else behind them is an error."""
    from lorica.data.formats import OPENERS

    packed = hostile_bytes.PACKERS[suffix](data) * streams
    assert OPENERS[suffix](packed, 1 << 20) == data * streams
    assert OPENERS[suffix](packed + bytes(8), 1 << 20) == data * streams
    assert len(OPENERS[suffix](packed, 7)) == min(7, len(data) * streams)
    file = tmp_path_factory.mktemp("packed") / f"rows.txt{suffix}"
    for broken in (packed[:-3], packed + b"junk"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="can't be read as a"):
            read(file)


# -- one test for each bug that was found ----------------------------------------------------------


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA adapter of the tiny Llama as PEFT writes it."""
    folder = native(tmp_path / "adapter")
    (folder / "lorica.json").unlink()
    return folder


def native(folder: Path, method: str = "lora") -> Path:
    adapters = lorica.attach(models.llama(), method, r=4, verbose=False)
    return formats.save(adapters, folder)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, match: str, *, inspected: bool = True) -> None:
    """Loading refuses and leaves the model as it was; so does looking at it."""
    model = models.llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        lorica.load(model, folder)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    if inspected:
        try:
            seen = " ".join(formats.inspect(folder)["problems"])
        except ValueError as error:
            seen = str(error)
        assert re.search(match, seen), seen


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_something_else_than_a_file(adapter, name, kind):
    """A pipe was waited for without end, and /dev/zero read until the memory was full."""
    path = adapter / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    refused(adapter, "no ordinary file|no adapter folder|is missing")


def test_a_link_to_a_file_is_a_file(adapter):
    """As in the cache of a hub."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).rename(adapter / f"blob-{name}.kept")
        (adapter / name).symlink_to(adapter / f"blob-{name}.kept")
    assert len(lorica.load(models.llama(), adapter)) == 14


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}])
def test_a_rank_beyond_everything_makes_nothing(adapter, tmp_path, changes):
    edit(adapter / "adapter_config.json", **changes)
    refused(adapter, "the rank 1000000000 is larger")
    own = native(tmp_path / "own")
    recipe = json.loads((own / "lorica.json").read_text())["recipe"]
    edit(own / "lorica.json", recipe={**recipe, **changes})
    refused(own, "the rank 1000000000 is larger")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"rank_pattern": {"q_proj": "x"}}, "'rank_pattern' holds 'x', not int"),
        ({"alpha_pattern": {"q_proj": [1]}}, "'alpha_pattern' holds"),
        ({"target_modules": ["q_proj", 3]}, "'target_modules' holds 3, not str"),
        ({"modules_to_save": [None]}, "'modules_to_save' holds None, not str"),
        ({"lora_alpha": [16]}, r"'lora_alpha' is \[16\], not int or float"),
        ({"base_model_name_or_path": "\x1b[2J"}, "control characters"),
        ({"revision": "\ud800"}, "control characters"),
        ({"r": "a" * 100_000}, r"'r' is 'a{110,130}\.\.\., not int"),
    ],
)  # fmt: skip
def test_values_of_another_type(adapter, changes, match):
    edit(adapter / "adapter_config.json", **changes)
    refused(adapter, match)


@pytest.mark.parametrize(
    "layer, match",
    [
        ("x", "'layers' holds 'x', not dict"),
        ({"r": 4}, "must be given"),
        ({"in": 32, "out": 32, "r": 4, "frozen_rank": [0], "scale": 2.0}, "'frozen_rank' is"),
        ({"in": 32, "out": 32, "r": 4, "frozen_rank": -1, "scale": 2.0}, "at least 0"),
        ({"in": 32, "out": 32, "r": 4, "frozen_rank": 0, "scale": "2"}, "'scale' is '2'"),
    ],
)
def test_layers_of_another_form(tmp_path, layer, match):
    own = native(tmp_path / "own", "mora")
    edit(own / "lorica.json", layers={"model.layers.0.self_attn.q_proj": layer})
    refused(own, match)


def test_a_path_out_of_the_folder_is_no_file_of_it(tmp_path):
    own = native(tmp_path / "own")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"elsewhere")
    for name in ("../adapter_model.safetensors", str(tmp_path / "adapter_model.safetensors")):
        edit(own / "lorica.json", files={name: "0" * 64})
        refused(own, "lacks")
        assert "lacks" in formats.inspect(own)["problems"][0]


@pytest.mark.parametrize(
    "field",
    [
        lambda p: {"target_modules": p},
        lambda p: {"exclude_modules": p},
        lambda p: {"modules_to_save": [p]},
        lambda p: {"rank_pattern": {p: 2}},
        lambda p: {"alpha_pattern": {p: 2}},
        lambda p: {"layers_to_transform": [0], "layers_pattern": [p]},
    ],
)
def test_a_pattern_without_an_end(adapter, field, monkeypatch):
    monkeypatch.setattr("lorica.patterns.PATIENCE", 0.1)
    edit(adapter / "adapter_config.json", **field(r"(\w|.)+!"))  # one repeat, and exponential
    refused(adapter, "adapter_config.json: matching .* has not ended after")


def test_tensors_of_another_kind(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    shape = tensors[first].shape
    for value, match in (
        (torch.zeros(shape, dtype=torch.float8_e4m3fn), "float8_e4m3fn; an adapter's tensors"),
        (torch.zeros(shape, dtype=torch.complex64), "complex64; an adapter's tensors"),
    ):
        save_file({**tensors, first: value}, file)
        refused(adapter, match)
    save_file({**tensors, first: torch.ones(shape, dtype=torch.int64)}, file)
    refused(adapter, "of torch.int64, of torch.float32 expected", inspected=False)
    refused(adapter, f"{re.escape(first)} is of torch.int64, ")
    save_file({**tensors, "\x1b[2J": torch.ones(1)}, file)
    refused(adapter, "is no name")
    save_file({**tensors, first: tensors[first][None]}, file)
    assert "no complete pair" in formats.inspect(adapter)["problems"][0]


def test_carried_factors_of_another_shape(tmp_path):
    from hashlib import sha256

    own = native(tmp_path / "own", "mora+add")
    file = own / "lorica.safetensors"
    site = "model.layers.0.self_attn.q_proj"
    told = json.loads((own / "lorica.json").read_text())
    told["layers"][site]["frozen_rank"] = 2
    carried = {f"{site}.update.frozen_A": torch.ones(2, 5)}
    carried[f"{site}.update.frozen_B"] = torch.ones(32, 2)
    save_file({**load_file(file), **carried}, file)
    told["files"][file.name] = sha256(file.read_bytes()).hexdigest()
    (own / "lorica.json").write_text(json.dumps(told))
    refused(own, r"frozen_A is \(2, 5\), two dimensions, one of 32 expected", inspected=False)


# -- data


@pytest.mark.parametrize("suffix", sorted(hostile_bytes.PACKERS))
def test_a_bomb_is_not_unpacked(tmp_path, suffix, monkeypatch):
    from lorica.data import formats

    monkeypatch.setattr(formats, "PLAIN", 1 << 20)
    packed = hostile_bytes.PACKERS[suffix](b" " * (8 << 20))
    assert len(formats.OPENERS[suffix](packed, 1 << 20)) == 1 << 20
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(packed)
    with pytest.raises(ValueError, match="unpacks to more than"):
        read(file)


def test_an_endless_dictionary_gets_no_memory(tmp_path):
    file = tmp_path / "rows.jsonl.xz"
    file.write_bytes(hostile_bytes.wide_dictionary())
    with pytest.raises(ValueError, match="can't be read as a .xz file: Memory usage limit"):
        read(file)


def test_a_text_that_packs_well_is_read(tmp_path):
    file = tmp_path / "rows.jsonl.xz"
    file.write_bytes(lzma.compress(b'{"text": "the cat sees the dog"}\n' * 2000))
    assert len(read(file)) == 2000


def test_a_broken_gzip_stream(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    data = bytearray(gzip.compress(b'{"text": "the cat"}\n' * 50, mtime=0))
    for at in range(10, len(data) - 8, 3):
        changed = bytes(data[:at]) + b"\xff\xff" + bytes(data[at + 2 :])
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="rows.jsonl"):
            read(file)


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: a number of thousands of digits"),
        ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]", "line 1: a number of thousands of digits"),
        ("a.jsonl", b"[" * 100_000, "line 1: a number of thousands of digits, or lists within"),
        ("a.jsonl", b'{"text": "a", "\\u001b[2J": 1}', "is no name"),
        ("a.csv", b"a\x00,text\n1,2\n", "is no name"),
        ("a.csv", b"__where__,text\n1,2\n", "starts with two underscores"),
    ],
)  # fmt: skip
def test_rows_that_no_reader_can_take(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        read(tmp_path / name)
    assert type(error.value) is ValueError and str(tmp_path / name) in str(error.value)


NO_PATHS = {
    "a" * 300: "at most 255 bytes",
    "d/" * 3000 + "d": "at most 4,000 bytes",
    "~nobody-of-this-name/a": "names no user here",
    "a\x00b": "printable characters",
    "a\x1b[2J.jsonl": "printable characters",
    "\ud800": "printable characters",
}


@pytest.mark.parametrize("name", NO_PATHS, ids=range(len(NO_PATHS)))
def test_a_name_that_no_file_can_have(name, tmp_path, monkeypatch):
    """The operating system's own error came from wherever the path was first looked at."""
    from lorica.data.chat import template_of
    from lorica.data.stream import has_txt
    from lorica.run.options import PATH, PATHS, TrainOptions, UsageError
    from lorica.run.options.kinds import RESUME

    monkeypatch.chdir(tmp_path)
    adapters = lorica.attach(models.llama(), "lora", r=2, verbose=False)
    how = {"method": "lora", "r": 2}
    for use in (
        lambda: read(name), lambda: has_txt([name]), lambda: lorica.load(models.llama(), name),
        lambda: lorica.save(adapters, name), lambda: load_model.check_source(name),
        lambda: template_of(None, name, starts=False), lambda: PATH.from_yaml(name),
        lambda: PATHS.from_yaml([name]), lambda: RESUME.from_yaml(name),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=NO_PATHS[name]) as error:
            use()
        assert type(error.value) is ValueError and str(error.value).isascii()
    for field in ("deepspeed", "fsdp_config", "accelerator_config"):
        with pytest.raises(UsageError, match=NO_PATHS[name]):
            TrainOptions(**how, further={field: name}).check()
    for field in ("output_dir", "data", "model", "eval_data", "adapter"):
        with pytest.raises(UsageError, match=NO_PATHS[name]):
            TrainOptions(**how, **{field: name}).check()
    assert not list(tmp_path.iterdir())


def test_what_arrow_says_is_printable(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1" + bytes(range(64)) + struct.pack("<I", 40) + b"PAR1")
    with pytest.raises(ValueError, match="is not a whole parquet file") as error:
        read(file)
    assert str(error.value).isprintable()


def test_notes_of_a_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["a", "b"]})
    for note in (b"[", b"3", b"\xff", b'{"info": 3}', b'{"info": {"features": {"text": 3}}}',
                 b'{"info": {"features": {"text": {"_type": "Nothing"}}}}'):  # fmt: skip
        pq.write_table(table.replace_schema_metadata({"huggingface": note}), file)
        with pytest.raises(ValueError, match="what the file says of its own columns"):
            read(file)
    good = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(good)}), file)
    assert read(file)["text"][:] == ["a", "b"]
    pq.write_table(pa.table({"text": ["a"], "__where__": ["b"]}), file)
    with pytest.raises(ValueError, match="starts with two underscores"):
        read(file)


def test_a_parquet_file_of_one_value_for_ever(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    rows = pa.DictionaryArray.from_arrays(pa.repeat(0, 10**6), ["the cat sees the dog"])
    pq.write_table(pa.table({"text": rows}), file)
    monkeypatch.setattr("lorica.data.formats.PLAIN", 1 << 20)
    with pytest.raises(ValueError, match="unpacks to more than"):
        read(file)


@pytest.mark.parametrize("rows, value", [(6 * 10**6, "the cat"), (3000, "a" * 200_000)])
def test_a_parquet_file_of_words_for_repeated_values(tmp_path, rows, value):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), rows), [value])
    pq.write_table(pa.table({"text": column}), file)
    with pytest.raises(ValueError, match="unpacks to more than"):
        read(file)


def test_categories_in_a_parquet_file_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    label = pa.DictionaryArray.from_arrays(pa.array([0, None, 1], pa.int8()), ["no", "yes"])
    number = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1], pa.int8()), [3, 5])
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": label, "n": number}), file)
    assert read(file)["n"][:] == [3, 5, 5]


def test_half_a_surrogate_pair_within_a_list(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"tokens": ["a", "\\ud800"], "tags": ["O", "B"]}\n')
    with pytest.raises(ValueError, match="`tokens` holds half a surrogate pair"):
        read(file)


def test_ids_that_the_tokenizer_has_not(subjects, tmp_path):
    words = load_model.load_tokenizer(str(subjects.root / "model"))
    file = tmp_path / "a.jsonl"
    for wrong in (2**40, -3, len(words)):
        file.write_text(json.dumps({"input_ids": [1, wrong, 2]}) + "\n")
        with pytest.raises(ValueError, match=f"line 1: `input_ids` holds {wrong}"):
            prepare(read(file), words, max_length=8)


@pytest.mark.parametrize(
    "labels, match",
    [
        (["20261122", "3"], "can't teach 2"),
        ([10**9, 0], "can't teach 2"),
    ],
)
def test_a_class_for_every_number_up_to_a_huge_one(labels, match):
    from lorica.data import Labels

    values = [int(label) for label in labels]
    with pytest.raises(ValueError, match=match):
        Labels.of(values, ["row 1", "row 2"])


def test_digits_without_an_end_are_names():
    from lorica.data import Labels

    assert Labels.of(["9" * 5000, "1"], ["row 1", "row 2"]).num_labels == 2
    assert Labels.of(["²", "1"], ["row 1", "row 2"]).num_labels == 2


# -- models


def copied(subjects: Subjects, name: str, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(subjects.root / name, tmp_path / name))


def test_code_of_a_model_is_never_run(subjects, tmp_path):
    """transformers would ask; a "y" on standard input ran it."""
    from hostile_subjects import _bring_code

    folder = copied(subjects, "model", tmp_path)
    _bring_code(folder, subjects._own_code(b"", __import__("random").Random(0))[1])
    found = forked(subjects._load_model(folder), seconds=60, canary=subjects.canary)
    assert [f.kind for f in found] == ["refused"] * 4
    assert all("which is run only where you trust it and type" in f.text for f in found[:1])

    def trusted():
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path / "modules")
        load_model.read_config(str(folder), trust_remote_code=True)

    found = forked([("trusted", trusted)], seconds=60, canary=subjects.canary)
    assert found[-1].kind == "executed"


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "paged|someone/kernel@main:forward"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"experts_implementation": "sonicmoe"},
        {"experts_implementation": "someone/experts"},
        {"parts": [{"_experts_implementation_internal": "someone/experts"}]},
        {"attn_implementation": ["sdpa"]},
        {"use_kernels": True},
        {"kernel_config": {"MLP": "someone/mlp:MLP"}},
    ],
)
def test_a_configuration_that_fetches_code(subjects, tmp_path, changes):
    folder = copied(subjects, "model", tmp_path)
    edit(folder / "config.json", **changes)
    for read_it in (
        lambda: load_model.read_config(str(folder)),
        lambda: load_model.load_model(
            str(folder), "causal-lm", labels=None, dtype="auto", widen=True
        ),
        lambda: load_model.empty_model(str(folder)),
    ):
        with pytest.raises(ValueError, match="Nothing that a file names is run: take the key out"):
            read_it()


def test_what_is_installed_or_typed_is_no_foreign_code(monkeypatch):
    from lorica.formats import foreign_code

    def refused(config, **typed):
        try:
            foreign_code.refuse_code(config, "config.json", **typed)
        except ValueError:
            return True
        return False

    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    for way in ("eager", "sdpa", None, "flex_attention", "paged|sdpa", "flash_attention_2"):
        assert not refused({"attn_implementation": way}), way
    assert not refused(quantised)
    assert not refused({"attn_implementation": "someone/kernel"}, attn_implementation="a/kernel")
    assert refused({"experts_implementation": "someone/x"}, attn_implementation="a/kernel")
    monkeypatch.setattr(foreign_code, "find_spec", {"kernels": "there"}.get)  # and no flash_attn
    assert refused({"attn_implementation": "flash_attention_2"}) and refused(quantised)
    assert not refused({"attn_implementation": "sdpa"})


@pytest.mark.parametrize("part", ["../model/model.safetensors", "/etc/passwd", 3, None, ""])
def test_parts_of_a_model_lie_beside_their_index(subjects, tmp_path, part):
    folder = copied(subjects, "model-parts", tmp_path)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["lm_head.weight"] = part
    index.write_text(json.dumps(told))
    how = {"labels": None, "dtype": "auto", "widen": True}
    with pytest.raises(ValueError, match="which is no file of this folder"):
        load_model.load_model(str(folder), "causal-lm", **how)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 10**9}, {"num_hidden_layers": []}, {"architectures": [3]}, {"model_type": []}],
)
def test_a_configuration_that_is_none(subjects, tmp_path, changes):
    folder = copied(subjects, "model", tmp_path)
    edit(folder / "config.json", **changes)
    found = forked(subjects._load_model(folder), seconds=60, canary=subjects.canary)
    said = [f.text for f in found if f.kind == "refused"]
    assert {f.kind for f in found} <= {"success", "refused"}
    assert said and all("cannot load" in text for text in said)


@pytest.mark.parametrize("text", ["[", "{}", '["a", "a", "b"]', '["a"]', "[1, 2, 3]", "[]"])
def test_names_of_classes(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match="is no list of the 3 different names"):
        load_model._labels(tmp_path, 3)
    (tmp_path / "labels.json").write_text('["a", "b", "c"]')
    assert load_model._labels(tmp_path, 3).names == ("a", "b", "c")
