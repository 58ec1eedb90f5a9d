"""Running text: the order of documents and of rows, the tokenizer, and places in a stream."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lorica.data import streamed
from lorica.data.stream import Rows, Text, collate
from lorica.data.streamed import Streamed
from lorica.run.train_tokenizer import END, train_tokenizer

TEXTS = [
    f"Document {i}.\n\nIt says: the cat and the dog, {'very ' * (i % 4)}often." for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return file


def test_rows_are_the_documents_end_to_end(tokenizer, jsonl):
    text = Text.read([str(jsonl)]).ids(tokenizer)
    assert text.documents == len(TEXTS)
    assert tokenizer.decode(text.ids) == END.join(TEXTS) + END
    rows = text.rows(32)
    assert rows.shape == (len(text.ids) // 32, 32)
    assert (rows.reshape(-1) == text.ids[: rows.size]).all()  # each row goes on where one ended


def test_what_a_document_of_a_txt_file_is(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One.\n\nTwo,\nstill two.\n\nThree.\n")
    ends = {}
    for documents in (None, "file", "paragraph", "line"):
        text = Text.read([str(file)], documents=documents).ids(tokenizer)
        ends[documents] = int((text.ids == tokenizer.eos_token_id).sum())
        assert text.documents == ends[documents]
    assert ends == {None: 1, "file": 1, "paragraph": 3, "line": 4}
    whole = Text.read([str(file)]).ids(tokenizer).ids
    assert tokenizer.decode(whole) == file.read_text() + END  # nothing is lost or moved


def test_a_long_document_is_tokenised_in_parts_without_a_seam(tmp_path, monkeypatch):
    from lorica.data import stream

    file = tmp_path / "long.txt"
    file.write_text(" ".join(TEXTS * 60))
    assert len(file.read_text()) > 2 * 65_536
    made = train_tokenizer(TEXTS, 400)
    whole = made(file.read_text(), verbose=False)["input_ids"]
    monkeypatch.setattr(stream, "BATCH", 10_000)  # several batches of several parts
    assert Text.read([str(file)]).ids(made).ids.tolist() == [*whole, made.eos_token_id]


def test_other_shapes_are_texts_too(tokenizer, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"prompt": "2 + 2 =", "completion": " 4"}\n{"prompt": "a", "completion": "b"}\n'
    )
    text = Text.read([str(file)])
    assert tokenizer.decode(text.ids(tokenizer).ids) == f"2 + 2 = 4{END}ab{END}"
    assert list(text.texts()) == ["2 + 2 =", " 4", "a", "b"]


def test_a_batch_is_taken_at_once():
    rows = Rows(np.arange(24, dtype=np.int32).reshape(6, 4))
    assert len(rows) == 6 and rows[2].tolist() == [8, 9, 10, 11]
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collate))
    assert [b["input_ids"].shape for b in batches] == [(4, 4), (2, 4)]
    assert batches[0]["input_ids"].dtype is torch.int64
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])
    assert set(batches[0]) == {"input_ids", "labels"}  # no mask: causal over the whole row


# -- the tokenizer ---------------------------------------------------------------------------------


def test_the_tokenizer_is_the_same_every_time_and_loses_nothing(monkeypatch):
    made = []
    for parallel in ("false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        made.append(train_tokenizer(iter(TEXTS), 320))
    assert made[0].backend_tokenizer.to_str() == made[1].backend_tokenizer.to_str()
    assert len(made[0]) == 320
    strange = "naïve 漢字\t\n\n  \u2028 'tis 12345 ok"
    assert made[0].decode(made[0](strange)["input_ids"]) == strange
    assert made[0].eos_token == END and made[0].eos_token_id == 0
    assert made[0](END)["input_ids"] == [0]


def test_a_small_text_has_few_pairs():
    assert 257 < len(train_tokenizer(["ab ab ab"], 5000)) < 300
    with pytest.raises(ValueError, match="257 tokens at least"):
        train_tokenizer(TEXTS, 256)


# -- streams ---------------------------------------------------------------------------------------


@pytest.fixture
def stream(tokenizer, jsonl):
    def make(seed: int = 0, length: int = 16) -> Streamed:
        found = Streamed(str(jsonl.parent))
        found.lay(tokenizer, length, seed)
        return found

    return make


def take(found: Streamed, count: int) -> list[list[int]]:
    return [row.tolist() for row in islice(found, count)]


@pytest.mark.parametrize("characters", [1_000_000, 300, 1])
def test_a_stream_holds_every_row_once_a_pass(stream, tokenizer, jsonl, monkeypatch, characters):
    monkeypatch.setattr(streamed, "BATCH", characters)
    ids = Text.read([str(jsonl)]).ids(tokenizer).ids
    every = [row.tolist() for row in ids[: len(ids) // 16 * 16].reshape(-1, 16)]
    found = take(stream(), len(every))
    assert sorted(found) == sorted(every)
    assert take(stream(), len(every)) == found
    if characters > 1:  # with a document a block there is little to shuffle
        assert found != every and take(stream(seed=1), len(every)) != found
    twice = np.concatenate([ids, ids])
    twice = [row.tolist() for row in twice[: len(twice) // 16 * 16].reshape(-1, 16)]
    assert sorted(take(stream(), len(twice))) == sorted(twice)  # what is left goes before the next


@pytest.mark.parametrize("characters", [1_000_000, 300, 1])
def test_a_stream_is_gone_on_with_from_every_row(stream, monkeypatch, characters):
    monkeypatch.setattr(streamed, "BATCH", characters)
    straight = take(stream(), 150)  # the data have about 80
    first = stream()
    for consumed, _ in enumerate(islice(first, 120)):
        place = json.loads(json.dumps(first.place(consumed)))  # as a checkpoint keeps it
        if consumed % 7 == 0:
            again = stream()
            again.resume(place, consumed)
            assert take(again, 20) == straight[consumed : consumed + 20]
    assert (
        first.places[0]["rows"] <= 119 < min(p["rows"] for p in [*first.places[1:], {"rows": 999}])
    )


READ: list[str] = []


def counted():
    for text in TEXTS:
        READ.append(text)
        yield {"text": text}


@pytest.fixture
def counting(tokenizer, monkeypatch):
    """A stream of the same documents that tells in `READ` which rows are read; small blocks."""
    monkeypatch.setattr(streamed, "BATCH", 100)
    monkeypatch.setattr(
        streamed, "load", lambda *_, **__: datasets.IterableDataset.from_generator(counted)
    )

    def make() -> Streamed:
        found = Streamed("counted")
        found.lay(tokenizer, 16, 0)
        READ.clear()  # of the first row, which tells the columns
        return found

    return make


def test_each_row_of_a_source_is_read_once_a_pass(counting, stream):
    """`datasets` goes back to a place by reading the shard from its beginning, which is done once:
    after the first block, of two rows here."""
    found = counting()
    straight = take(found, 110)
    assert [place["epoch"] for place in found.places].count(0) > 15
    a_pass = TEXTS[:2] + TEXTS
    assert len(READ) > 2 * len(a_pass) and READ == (3 * a_pass)[: len(READ)]
    assert straight == take(stream(), len(straight))  # as from a file

    for consumed in (20, 60):  # in the first pass, and in the second
        first, again = counting(), counting()
        take(first, consumed + 1)
        READ.clear()
        again.resume(json.loads(json.dumps(first.place(consumed))), consumed)
        assert take(again, 30) == straight[consumed : consumed + 30]
        assert len(again.places) > 5
        assert READ == (TEXTS + 2 * a_pass)[: len(READ)]


def test_a_stream_s_places_are_those_of_a_resumed_one(stream, jsonl, monkeypatch):
    """What a checkpoint holds does not depend on how often the run was cut, over several files."""
    for i in (1, 2):
        jsonl.with_name(f"train-{i}.jsonl").write_text(jsonl.read_text())
    monkeypatch.setattr(streamed, "BATCH", 300)
    straight = stream()
    rows = take(straight, 300)
    assert straight.places[-1]["epoch"] >= 1
    for i, place in enumerate(straight.places[:-1]):
        cut = stream()
        cut.resume(json.loads(json.dumps(place)), place["rows"])
        expected = rows[place["rows"] : place["rows"] + 100]
        assert take(cut, len(expected)) == expected
        several = straight.places[i : i + len(cut.places)]
        assert cut.places[: len(several)] == several


def test_a_stream_can_be_read_anew_and_in_turns(stream, monkeypatch):
    monkeypatch.setattr(streamed, "BATCH", 300)
    found, straight = stream(), take(stream(), 120)
    assert take(found, 30) == straight[:30] == take(found, 30)
    assert next(iter(found.texts(1))) == TEXTS[0]
    one, other = iter(found), iter(found)
    turns = [(next(one).tolist(), next(other).tolist()) for _ in range(100)]
    assert turns == [(row, row) for row in straight[:100]]


def test_a_stream_that_breaks_off_in_a_block_reads_it_again(tokenizer, monkeypatch):
    """An iterator that has raised says that it is at its end."""
    broken = []

    def rows():
        for i, text in enumerate(TEXTS):
            if i == 20 and not broken:
                broken.append(i)
                raise OSError("the network is gone")
            yield {"text": text}

    monkeypatch.setattr(streamed, "BATCH", 100)
    monkeypatch.setattr(
        streamed, "load", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    found = Streamed("rows")
    found.lay(tokenizer, 16, 0)
    place, ids = streamed.START, []
    while not place["epoch"]:
        try:
            block, place = found._block(place)
        except ValueError as error:  # which names the data set
            assert "the network is gone" in str(error)
            continue
        ids.append(block)
    whole = np.concatenate([*map(np.ravel, ids), place["carry"]])
    assert broken and tokenizer.decode(whole) == END.join(TEXTS) + END


def test_a_stream_that_is_too_short_says_so(stream):
    with pytest.raises(ValueError, match="too short: [0-9,]+ tokens, and one row has 100000"):
        take(stream(length=100_000), 1)


def test_a_stream_s_columns(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text('{"body": "red", "text": 3}\n' * 30)
    found = Streamed(str(tmp_path), columns={"text": "body"})
    found.lay(tokenizer, 4, 0)
    assert list(found.texts(6)) == ["red", "red"]
    assert len(take(found, 3)) == 3
    with pytest.raises(ValueError, match="`columns` names `boody`.*Did you mean `body`"):
        Streamed(str(tmp_path), columns={"text": "boody"})


def test_a_stream_that_is_left_open_ends_quietly(tokenizer, tmp_path):
    """Its iterator is closed before the modules that it needs for that are gone."""
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "train.parquet"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = f"""
        from transformers import AutoTokenizer
        from lorica.data import streamed
        streamed.BATCH = 100
        found = streamed.Streamed({str(tmp_path)!r})
        found.lay(AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r}), 16, 0)
        rows = iter(found)
        print([len(next(rows)) for _ in range(20)], len(found.live))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.endswith("16] 3\n") and "Exception ignored" not in ran.stderr
