"""Reading: every format, and every fault of a file named with its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import time

import pytest

from lorica.data import hold_out, read, read_splits
from lorica.data.words import WHERE, revive

ROWS = [{"text": "one", "n": 1}, {"text": 'a "quoted", two', "n": 2}]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def rows_of(dataset):
    return dataset.remove_columns(WHERE).to_list()


def test_importing_the_package_is_light():
    code = (
        "import lorica.data, sys; print([m for m in ('torch', 'transformers', 'datasets', "
        "'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "pack, suffix",
    [(None, ""), (lzma.compress, ".xz"), (gzip.compress, ".gz"), (bz2.compress, ".bz2")],
)
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(ROWS, indent=4)),
        ("a.json", lines(*ROWS)),
        ("a.jsonl", lines(*ROWS)),
        ("a.jsonl", "\ufeff" + lines(ROWS[0]) + "\r\n\n" + lines(ROWS[1])),
    ],
)
def test_json_in_every_layout_and_packing(tmp_path, name, content, pack, suffix):
    data = content.encode()
    path = put(tmp_path / (name + suffix), pack(data) if pack else data)
    dataset = read(path)
    assert rows_of(dataset) == ROWS
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]  # nothing beside it


def test_places_of_rows(tmp_path):
    array = put(tmp_path / "a.json", '[\n {\n  "text":\n "x"},\n\n {"text": "y"}]')
    assert [place.rsplit(" ", 1)[1] for place in read(array)[WHERE]] == ["2", "6"]
    csv = put(tmp_path / "a.csv", 'text\n"over\ntwo lines"\nthird\n')
    assert [place.rsplit(" ", 1)[1] for place in read(csv)[WHERE]] == ["2", "4"]
    txt = put(tmp_path / "a.txt", "\n\none\nstill one\n\n \n\ntwo\n")
    assert [place.rsplit(" ", 1)[1] for place in read(txt)[WHERE]] == ["3", "8"]
    kept = read(array).select([1])
    assert kept[WHERE][0].endswith("line 6")


def test_csv_quotes_and_tsv_does_not(tmp_path):
    csv = put(tmp_path / "a.csv", 'text,n\n"say ""no"", two",1\n')
    assert rows_of(read(csv)) == [{"text": 'say "no", two', "n": "1"}]
    tsv = put(tmp_path / "a.tsv", 'text\tn\nHe said "no.\t1\n"yes\t2\n')
    assert [row["text"] for row in rows_of(read(tsv))] == ['He said "no.', '"yes']


def test_header_names_the_columns(tmp_path):
    path = put(tmp_path / "a.tsv", 's1\t1\t\tHe said "no.\ns2\t0\t*\tshe did\n')
    dataset = read(path, header=["source", "label", "_", "text"], max_samples=1)
    assert rows_of(dataset) == [{"source": "s1", "label": "1", "text": 'He said "no.'}]
    with pytest.raises(ValueError, match=r"line 1: the column name '' is empty.*`header="):
        read(path)
    with pytest.raises(ValueError, match=r"line 1: 4 field\(s\) where 2 are needed"):
        read(path, header=["a", "b"])


def test_long_csv_field(tmp_path):
    import csv

    limit = csv.field_size_limit()
    path = put(tmp_path / "a.csv", 'text\n"' + "x" * 300_000 + '"\n')
    assert len(read(path)["text"][0]) == 300_000
    assert csv.field_size_limit() == limit


def test_txt_documents(tmp_path):
    path = put(tmp_path / "a.txt", "one\r\ntwo\r\n\r\n\r\nthree\n")
    assert read(path)["text"][:] == ["one\ntwo", "three"]
    assert read(path, txt_split="line")["text"][:] == ["one", "two", "three"]
    assert read(path, txt_split="file")["text"][:] == ["one\ntwo\n\n\nthree\n"]
    with pytest.raises(ValueError, match="`txt_split` is 'paragraf'.*Did you mean `paragraph`"):
        read(path, txt_split="paragraf")


def test_parquet_keeps_class_names(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    again = read(tmp_path / "a.parquet")
    assert again.features["label"].names == ["no", "yes"]
    assert again[WHERE][1].endswith("row 1")
    put(tmp_path / "b.parquet", b"not parquet at all")
    with pytest.raises(ValueError, match="not a whole parquet file"):
        read(tmp_path / "b.parquet")


def test_folder_and_its_splits(tmp_path):
    put(tmp_path / "README.md", "words")
    put(tmp_path / "train-1.jsonl", lines({"text": "b"}))
    put(tmp_path / "train-0.jsonl", lines({"text": "a"}))
    put(tmp_path / "dev.jsonl", lines({"text": "c"}))
    assert read(tmp_path)["text"][:] == ["a", "b"]
    assert read(tmp_path, split="validation")["text"][:] == ["c"]
    train, held = read_splits(tmp_path, eval_split="dev")
    assert (train["text"][:], held["text"][:]) == (["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"no split 'test'.*`train`, `validation`"):
        read(tmp_path, split="test")
    put(tmp_path / "train-2.jsonl", lines({"prompt": "b"}))
    with pytest.raises(ValueError, match="different columns.*train-2.jsonl has `prompt`"):
        read(tmp_path)


def test_folder_without_split_names(tmp_path):
    put(tmp_path / "b.txt", "two")
    put(tmp_path / "a.txt", "one")
    assert read(tmp_path)["text"][:] == ["one", "two"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data file: readable are `.json`"):
        read(tmp_path / "empty")


def test_nested_cells_survive(tmp_path):
    """Arrow alone would give each dictionary the keys of all the others."""
    unlike = [{"name": "f", "p": {"x": 1}}, {"name": "g", "p": {"y": ["a"]}}]
    alike = [{"role": "user", "content": "hi"}]
    path = put(tmp_path / "a.jsonl", lines({"tools": unlike, "messages": alike}))
    dataset = read(path)
    assert revive(dataset["tools"][0]) == unlike
    assert dataset["messages"][0] == alike


def test_columns_are_renamed(tmp_path):
    path = put(tmp_path / "a.jsonl", lines({"text": "do it", "code": "pass", "id": 1}))
    dataset = read(path, columns={"prompt": "text", "completion": "code"})
    assert rows_of(dataset) == [{"prompt": "do it", "completion": "pass", "id": 1}]
    assert rows_of(read(path, columns={"text": "code"})) == [{"text": "pass", "id": 1}]
    swapped = read(path, columns={"text": "code", "code": "text"})
    assert rows_of(swapped) == [{"code": "do it", "text": "pass", "id": 1}]
    with pytest.raises(ValueError, match="lacks: it has `text`, `code`, `id`. Did you mean `code`"):
        read(path, columns={"text": "codes"})
    with pytest.raises(ValueError, match="two names"):
        read(path, columns={"a": "code", "b": "code"})


FAULTS = {
    "broken line": ("a.jsonl", '{"text": "a"}\n{"text": "b}\n', r"line 2, column \d+: not valid"),
    "broken line of a .json": ("a.json", '{"text": "a"}\n{"text" "b"}\n', "line 2, column 9"),
    "one object": ("a.json", '{\n"data": [{"text": "a"}]}', "single JSON object .its keys: `data`"),
    "broken array": ("a.json", '[{"text": "a"},\n {"text": }]', "line 2, column 11: not valid"),
    "no comma": ("a.json", '[{"text": "a"}\n {"text": "b"}]', "line 2, column 2: .*expecting"),
    "endless array": ("a.json", '[{"text": "a"},\n', "line 2, column 1: not valid"),
    "after the array": ("a.json", '[{"text": "a"}]\nmore', "line 2, column 1: .*more text"),
    "no object": ("a.jsonl", '{"text": "a"}\n["b"]\n', r'line 2: \["b"\] is a list'),
    "bytes": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: the byte 0xe9 is not UTF"),
    "utf-16": ("a.csv", "text\nä".encode("utf-16"), "line 1: .*iconv -f UTF-16"),
    "mixed types": ("a.jsonl", lines({"text": "a"}, {"text": [3]}), "line 2: `text` is a list"),
    "mixed shapes": ("a.jsonl", lines({"text": "a"}, {"prompt": "b"}), "line 2: .*none in common"),
    "hidden key": ("a.jsonl", lines({"__where__": "a"}), "line 1: the key `__where__`"),
    "huge number": ("a.jsonl", lines({"n": 1}, {"n": 1 << 70}), "line 2: `n` can't be stored"),
    "half a pair": ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: `text` can't be"),
    "fields": ("a.csv", "text,label\na,1\nb\n", r"line 3: 1 field\(s\) where 2 are needed"),
    "open quote": ("a.csv", 'text,label\na,1\n"b,1\nc,0\n', "line 3: not valid CSV: unexpected"),
    "twice": ("a.csv", "text,text\na,1\n", "line 1: the column name 'text' is there twice"),
    "nothing": ("a.jsonl", "", "holds no rows"),
    "header only": ("a.csv", "text,label\n", "holds no rows"),
    "empty array": ("a.json", "[]", "holds no rows"),
    "blank text": ("a.txt", " \n\n", "holds no rows"),
    "not packed": ("a.jsonl.gz", b"plain", "can't be read as a .gz file"),
    "torn": ("a.txt.xz", lzma.compress(b"abc" * 100)[:-20], "can't be read as a .xz file"),
    "format": ("a.tar", b"PK", "has the suffix '.tar': readable are .*unpacked first"),
    "no archive": ("a.zip", b"PK", "can't be read as a .zip file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_their_place(tmp_path, fault):
    name, content, message = FAULTS[fault]
    path = put(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_paths(tmp_path, monkeypatch):
    put(tmp_path / "train.jsonl", lines({"text": "a"}))
    with pytest.raises(ValueError, match="has no 'trian.jsonl'. Did you mean `train.jsonl`"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match="has no 'nowhere'"):
        read(str(tmp_path / "nowhere" / "deep" / "a.csv"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Did you mean `train.jsonl`"):
        read("tran.jsonl")


def test_hub_without_a_network(monkeypatch, tmp_path):
    import datasets

    def refuse(path, config, split, streaming):
        raise ConnectionError("offline mode is on")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="`some-org/some-set`.*hub.*offline mode is on.*network"):
        read("some-org/some-set")


def test_hub_id_with_configuration_and_splits(monkeypatch):
    import datasets

    asked = []

    def load(path, config, split, streaming):
        asked.append((path, config, split))
        train = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
        if split == "odd":
            return datasets.DatasetDict({"x": train, "y": train})
        return datasets.DatasetDict({"test": train.select([0]), "train": train})

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = read("org/glue:cola", columns={"text": "sentence"})
    assert asked == [("org/glue", "cola", None)]
    assert dataset["text"][:] == ["a", "b"]
    with pytest.raises(ValueError, match="has the splits `x`, `y` and none called `train`"):
        read("org/glue", split="odd")


def test_options_without_use_are_refused(tmp_path):
    path = put(tmp_path / "a.jsonl", lines({"text": "a"}))
    for how, message in [
        ({"header": ["text"]}, "`header` was given"),
        ({"txt_split": "line"}, "`txt_split='line'` was given"),
        ({"split": "train"}, "one file has no splits"),
        ({"max_samples": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(path, **how)
    with pytest.raises(ValueError, match="one place"):
        read_splits(path, eval_fraction=0.1, eval_source=path)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        read_splits(path, max_eval_samples=3)


def test_hold_out(tmp_path):
    path = put(tmp_path / "a.jsonl", lines(*({"text": str(i)} for i in range(100))))
    train, held = read_splits(path, eval_fraction=0.1, seed=3)
    assert (len(train), len(held)) == (90, 10)
    assert sorted([*train["text"], *held["text"]], key=int) == [str(i) for i in range(100)]
    assert read_splits(path, eval_fraction=0.1, seed=3)[1]["text"][:] == held["text"][:]
    assert read_splits(path, eval_fraction=0.1, seed=4)[1]["text"][:] != held["text"][:]
    # Frozen: another version or machine must hold out the same rows.
    assert [int(text) for text in hold_out(read(path), 0.03)[1]["text"]] == [15, 46, 87]
    few = read(path, max_samples=2)
    assert len(hold_out(few, 0.001)[1]) == 1
    with pytest.raises(ValueError, match="leaves none to train on"):
        hold_out(few.select([0]), 0.5)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        hold_out(few, 1.0)
    train, held = read_splits(path, eval_source=path, max_samples=5, max_eval_samples=2)
    assert (len(train), len(held)) == (5, 2)


def test_shared_files_are_read(shared):
    expected = {
        "tasks/gsm8k_train.jsonl.xz": (7473, {}),
        "tasks/mbpp.jsonl.xz": (974, {}),
        "tasks/llm-adapters/ARC-Easy/train.json.xz": (2251, {}),
        "glue/CoLA/train.tsv.xz": (8551, {"header": ["source", "label", "_", "text"]}),
        "glue/SST-2/dev.tsv.xz": (872, {"columns": {"text": "sentence"}}),
        "text/shift_childrens.txt.xz": (2277, {}),
    }
    for name, (count, how) in expected.items():
        assert len(read(shared / name, **how)) == count, name


def test_a_folder_of_everything_is_no_folder_of_data(tmp_path, monkeypatch):
    """`--data /` walked the whole machine, and ended at the first folder without permission."""
    module = sys.modules[read.__module__]
    monkeypatch.setattr(module, "MOST_FILES", 3)
    for place in ("a", ".cache", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.jsonl").write_text('{"text": "the cat"}\n')
        (tmp_path / place / "notes.md").touch()
    with pytest.raises(ValueError, match="holds more than 3 files: that is no folder of data"):
        read(tmp_path)
    monkeypatch.setattr(module, "MOST_FILES", 4)
    assert len(read(tmp_path)) == 2
    (tmp_path / "b" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds more than 4 files"):
        read(tmp_path)
    monkeypatch.setattr(module, "MOST_FILES", 9)
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_that_is_separated_by_something_else(mark, tmp_path):
    """As spreadsheets write it where the comma is the decimal mark."""
    file = tmp_path / "a.csv"
    file.write_text(f'text{mark}label\n"good, I think"{mark}a\n"so{mark}so"{mark}b\n')
    rows = read(file)
    assert rows["text"][:] == ["good, I think", f"so{mark}so"] and rows["label"][:] == ["a", "b"]
    file.write_text(f"one{mark} two\nthree\n")
    assert read(file, header=["text"])["text"][:] == [f"one{mark} two", "three"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "b.jsonl"])
def test_a_table_of_very_many_columns(tmp_path, name):
    """Its cost grows with the columns, and was quadratic in them."""
    names = [f"c{i}" for i in range(20_000)]
    mark = "\t" if name == "a.tsv" else ","
    text = {
        "a.jsonl": json.dumps(dict.fromkeys(names, 1)),
        "b.jsonl": "\n".join(json.dumps({each: 1}) for each in names[:1001]),
    }.get(name, mark.join(names) + "\n" + mark.join("1" for _ in names))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"columns, of 1,000 at most; .* Check the separator"):
        read(tmp_path / name)


def test_an_object_with_very_many_keys_costs_no_more_than_its_bytes(tmp_path):
    """Arrow's cost grows with the square of the fields: 20,000 took 5 s."""
    path = tmp_path / "a.jsonl"
    meta = {f"key{i}": i for i in range(50_000)}
    path.write_text(json.dumps({"text": "the cat", "meta": meta}) + "\n")
    began = time.process_time()
    rows = read(path)
    assert rows["text"][:] == ["the cat"] and time.process_time() - began < 3
