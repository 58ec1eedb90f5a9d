"""Files as people have them: names, indices, folders, labels and characters that get lost."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from datasets import Dataset, DatasetDict

from lorica.data import Labels, check_causal, detect, prepare, read
from lorica.data.words import WHERE


def of(**columns):
    return Dataset.from_dict(columns)


def lines(*rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def whole(made, tokenizer, index=0):
    return tokenizer.decode(made.dataset[index]["input_ids"])


def trained(made, tokenizer, index=0):
    return tokenizer.decode([label for label in made.dataset[index]["labels"] if label != -100])


# -- what the columns mean -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, shape, task",
    [
        (["text", "labels"], "text-label", "sequence-classification"),
        (["text", "score"], "text-label", "sequence-classification"),
        (["sentence", "target"], "text-label", "sequence-classification"),
        ([" text", "label "], "text-label", "sequence-classification"),
        (["Text", "Label"], "text-label", "sequence-classification"),
        (["premise", "hypothesis", "class"], "sentence-pair", "sequence-classification"),
        (["words", "ner_tags"], "tokens-tags", "token-classification"),
        (["input", "output"], "prompt-completion", "causal-lm"),
        (["prompt", "response"], "prompt-completion", "causal-lm"),
        (["prompt", "answer"], "prompt-completion", "causal-lm"),
        (["instruction", "response"], "alpaca", "causal-lm"),
        (["instruction", "context", "response", "category"], "alpaca", "causal-lm"),
        (["instruction", "input", "output", "text"], "alpaca", "causal-lm"),
        (["system", "query", "response", "history"], "question-answer", "causal-lm"),
        (["question", "context", "answer"], "question-answer", "causal-lm"),
        (["system", "messages"], "messages", "causal-lm"),
        (["system", "prompt", "completion"], "prompt-completion", "causal-lm"),
        (["content"], "text", "causal-lm"),
    ],
)
def test_usual_names_of_columns(columns, shape, task):
    found = detect(columns)
    assert (found.name, found.default_task) == (shape, task)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a", "response": "b"}, "no use for `response`.*type `shape='text'`"),
        ({"text": "a", "system": "b"}, "no use for `system`"),
        ({"text": "a", "completion": "b"}, r"no use for `completion`.*`columns=\{'prompt': 'text'"),
        ({"messages": [{"role": "user", "content": "a"}], "context": "b"}, "no use for `context`"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "no use for `context`"),
        ({"prompt": "a", "completion": "b", "label": False}, "are a preference set: `label`"),
        ({"prompt": "a", "completion": "b", "label": "True"}, "are a preference set"),
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, "are a preference set"),
        ({"instruction": "a", "output": "b", "label": "good"}, "no use for `label`"),
        ({"prompt": "a", "completion": "b", "label": 0}, "no use for `label`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference set.*'completion': 'chosen'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_column_left_over_that_changes_the_meaning_is_refused(row, message, tokenizer):
    data = Dataset.from_list([row])
    with pytest.raises(ValueError, match=message):
        prepare(data, tokenizer, max_length=64)


def test_columns_left_over_that_are_only_named(tokenizer):
    pair = {"prompt": ["a"], "completion": ["b"]}
    for more in ({"id": [3]}, {"score": [0.5]}, {"source": ["web"]}, {"context": [""]},
                 {"system": [None]}, {"uuid": ["x-1"]}):  # fmt: skip
        made = prepare(of(**pair, **more), tokenizer, max_length=64)
        known = {"system"} & more.keys()  # used, and absent in this row
        assert set(made.report.unused_columns) == more.keys() - known
    insisted = prepare(
        of(**pair, label=[False]), tokenizer, max_length=64, shape="prompt-completion"
    )
    assert insisted.report.unused_columns == ("label",)
    documents = of(text=["a"], label=[1])
    assert prepare(documents, tokenizer, max_length=64, task="causal-lm").report.shape == "text"


def test_system_and_context_are_read(tokenizer):
    made = prepare(
        of(system=["be brief"], prompt=["two?"], completion=[" four"]), tokenizer, max_length=64
    )
    assert whole(made, tokenizer) == "<s>be brief\n\ntwo? four</s>"
    assert trained(made, tokenizer) == " four</s>"
    made = prepare(
        of(context=["Ada is 3."], question=["how old?"], answer=["3"]), tokenizer, max_length=64
    )
    assert whole(made, tokenizer) == "<s>Context: Ada is 3.\nQuestion: how old?\nAnswer: 3</s>"
    chat = prepare(
        of(context=["Ada is 3."], question=["how old?"], answer=["3"], system=["be brief"]),
        tokenizer,
        max_length=256,
        chat_template="plain",
    )
    assert whole(chat, tokenizer).startswith(
        "<s>System: be brief\n\nUser: Ada is 3.\n\nhow old?\n\nAssistant: 3</s>"
    )
    swift = of(query=["c"], response=["d"], history=[[["a", "b"]]])
    made = prepare(swift, tokenizer, max_length=64)
    assert trained(made, tokenizer) == " b</s> d</s>"


@pytest.mark.parametrize(
    "columns, proposed",
    [
        ({"id": list(range(8)), "reviews_": ["good film, I like it"] * 8}, "'text': 'reviews_'"),
        ({"id": list("abcdefgh"), "body": ["a long text of many words"] * 8}, "'text': 'body'"),
        (
            {"body": ["a long text of many words"] * 8, "kind": ["pos", "neg"] * 4},
            "'text': 'body', 'label': 'kind'",
        ),
        ({"id": [1], "turns": [[{"role": "user", "content": "a"}]]}, "'messages': 'turns'"),
        ({"user_asks": ["what is it?"] * 3, "bot_says": ["it is", "no", "hm"]},
         "'prompt': 'user_asks', 'completion': 'bot_says'"),
        ({"promt": ["a"], "completions": ["b"]}, "'prompt': 'promt', 'completion': 'completions'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_proposal_goes_by_content_and_name(columns, proposed, tokenizer):
    with pytest.raises(ValueError, match="fit no shape of data") as caught:
        prepare(of(**columns), tokenizer, max_length=64)
    assert f"`columns={{{proposed}}}`" in str(caught.value)


def test_columns_can_be_dropped(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = put(tmp_path / "a.jsonl", lines({"text": "left by a map", "messages": chat}))
    with pytest.raises(ValueError, match="fit several shapes.*shape='messages'"):
        prepare(read(path), tokenizer, max_length=64, chat_template="plain")
    dropped = read(path, columns={"text": "_"})
    assert prepare(dropped, tokenizer, max_length=64, chat_template="plain").report.rows == 1
    with pytest.raises(ValueError, match="drops a column that .* lacks: .*mean `text`"):
        read(path, columns={"texts": "_"})


# -- the index of a data frame ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", ",text,label\n0,good,pos\n1,bad,neg\n"),
        ("a.csv", "Unnamed: 0,text,label\n0,good,pos\n1,bad,neg\n"),
        ("a.csv", '"","text","label"\n"1","good","pos"\n"2","bad","neg"\n'),
        ("a.tsv", "\ttext\tlabel\n0\tgood\tpos\n1\tbad\tneg\n"),
        ("a.csv", "text,Unnamed: 0,label\ngood,0,pos\nbad,1,neg\n"),
    ],
)
def test_an_index_is_dropped_and_named(name, content, tmp_path, word_tokenizer):
    data = read(put(tmp_path / name, content))
    assert [n for n in data.column_names if not n.startswith("__")] == ["text", "label"]
    made = prepare(data, word_tokenizer, max_length=8)
    assert made.labels == Labels(("neg", "pos")) and made.report.rows == 2
    assert "dropped: a column without a name" in str(made.report)
    assert made.report.unused_columns == ()


def test_the_index_of_parquet_is_dropped(tmp_path, word_tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["good", "bad"], "label": [1, 0], "__index_level_0__": [5, 7]})
    pq.write_table(table, tmp_path / "a.parquet")
    Dataset(table).to_parquet(tmp_path / "b.parquet")  # with the features of `datasets`
    for name in ("a.parquet", "b.parquet"):
        made = prepare(read(tmp_path / name), word_tokenizer, max_length=8)
        assert made.report.rows == 2 and "index" in str(made.report)
    both = tmp_path / "both"
    put(both / "a.csv", ",text,label\n0,good,pos\n")
    put(both / "b.csv", "text,label\nbad,neg\n")
    assert len(read(both)) == 2


def test_header_names_are_stripped(tmp_path):
    data = read(put(tmp_path / "a.csv", "text , label\ngood,pos\n"))
    assert data.column_names == ["text", "label", WHERE]


# -- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, names, numbers",
    [
        ([1, 2, 3, 4, 5], "12345", [0, 1, 2, 3, 4]),
        (["1", "2", "3", "4", "5"], "12345", [0, 1, 2, 3, 4]),
        ([1.0, 2.0, 5.0], "125", [0, 1, 2]),
        ([0.0, 1.0, 0.0], "01", [0, 1, 0]),
        (["0.0", "1.0"], "01", [0, 1]),
        ([10, 20, 10], ("10", "20"), [0, 1, 0]),
        ([0, 2], "012", [0, 2]),
        (["0", "2"], "012", [0, 2]),
        ([0, 9], "09", [0, 1]),
        (["0", "9"], "09", [0, 1]),
        (["pos", "pos ", " neg"], ("neg", "pos"), [1, 1, 0]),
        (["1", "2 "], "12", [0, 1]),
        ([0.5, 1.0], (), [0.5, 1.0]),
        (["0.5", "1"], (), [0.5, 1.0]),
        ([float(n) for n in range(30)], (), [float(n) for n in range(30)]),
        ([-1.0, 1.0], (), [-1.0, 1.0]),
    ],
)
def test_labels_mean_the_same_in_every_format(values, names, numbers):
    places = [f"row {i}" for i, _ in enumerate(values)]
    labels = Labels.of(values, places)
    assert labels.names == tuple(names)
    assert [labels.number(v, p) for v, p in zip(values, places, strict=True)] == numbers


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_stars_are_five_classes_from_any_file(name, tmp_path, word_tokenizer):
    rows = [{"text": "good film", "label": n} for n in (1, 2, 3, 4, 5)]
    table = "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows)
    path = put(tmp_path / name, lines(*rows) if name.endswith("l") else table)
    made = prepare(read(path), word_tokenizer, max_length=8)
    assert made.dataset["labels"][:] == [0, 1, 2, 3, 4]
    assert "labels: 5 classes (1, 2, 3, 4, 5)" in str(made.report)


def test_the_summary_says_what_labels_were_taken_for(word_tokenizer):
    figures = prepare(of(text=["good", "bad"], label=[0.5, 1.0]), word_tokenizer, max_length=8)
    assert "labels: figures (a regression)" in str(figures.report)
    classes = prepare(of(text=["good", "bad"], label=[0.0, 1.0]), word_tokenizer, max_length=8)
    assert "labels: 2 classes (0, 1)" in str(classes.report)
    assert classes.dataset["labels"][:] == [0, 1]
    for missing in ([0.0, None], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="row 1: the label is"):
            prepare(of(text=["good", "bad"], label=missing), word_tokenizer, max_length=8)


@pytest.mark.parametrize(
    "values, named",
    [
        (["Yes", "yes", "No"], "`Yes` and `yes`"),
        (["not_spam", "not spam", "spam"], "`not spam` and `not_spam`"),
        (["Good.", "Good", "bad"], "`Good` and `Good.`"),
    ],
)
def test_classes_that_may_be_one_are_named(values, named, word_tokenizer):
    made = prepare(of(text=["good"] * 3, label=values), word_tokenizer, max_length=8)
    assert f"nearly the same class: {named}" in str(made.report)
    tags = of(tokens=[["good", "bad"]], tags=[["PER", "per"]])
    assert "nearly the same class: `PER` and `per`" in str(
        prepare(tags, word_tokenizer, max_length=8).report
    )


# -- text that is lost -----------------------------------------------------------------------------


def test_characters_that_a_tokenizer_drops_are_counted(story_tokenizer):
    """That tokenizer knows no `/`, `=` and `+`."""
    sums = of(question=["What is 48/2 + 1?"] * 3, answer=["48/2 = 24, 24+1 = 25"] * 3)
    with pytest.raises(ValueError, match=r"loses .*% of the characters.*\(among them .*=.*\)"):
        prepare(sums, story_tokenizer, max_length=64)
    made = prepare(sums, story_tokenizer, max_length=64, max_lost_text=0.5)
    assert 0.1 < made.report.lost_text < 0.5
    assert "the tokenizer loses" in str(made.report)
    for row in (of(text=["une fa\u00e7on \u4f60\u597d"]), of(prompt=["[a]"], completion=["{b}"])):
        with pytest.raises(ValueError, match="max_lost_text="):
            prepare(row, story_tokenizer, max_length=64)
    plain = prepare(of(text=["Once upon a time"]), story_tokenizer, max_length=64)
    assert plain.report.lost_text == 0 and "loses" not in str(plain.report)


def test_what_a_tokenizer_removes_on_purpose_is_no_loss(shared, tokenizer):
    from transformers import AutoTokenizer

    lower = AutoTokenizer.from_pretrained(shared / "models" / "minilm-l6-v2-fp16")
    data = of(text=["A Caf\u00e9 in  Paris!", "No."], label=[0, 1])
    assert prepare(data, lower, max_length=16).report.lost_text == 0
    unseen = of(text=["\U0001f600 \U0001f680 fine", "no"], label=[0, 1])
    with pytest.raises(ValueError, match="loses"):
        prepare(unseen, lower, max_length=16)
    assert prepare(of(text=["\U0001f600"]), tokenizer, max_length=16).report.lost_text == 0


def test_ids_beyond_the_table_are_refused(tokenizer):
    rows = len(tokenizer)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    seen, unseen = of(text=["once"]), of(text=["once <b> upon"])
    assert prepare(seen, tokenizer, max_length=16, embeddings=rows).report.rows == 1
    with pytest.raises(ValueError, match=rf"token id {rows + 1} \(`<b>`\).*resize_token_embed"):
        prepare(unseen, tokenizer, max_length=16, embeddings=rows)
    prepare(unseen, tokenizer, max_length=16, embeddings=rows + 3)
    pair = of(prompt=["a"], completion=["<c>"])
    with pytest.raises(ValueError, match=f"token id {rows + 2}"):
        prepare(pair, tokenizer, max_length=16, task="seq2seq-lm", embeddings=rows)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    padded = prepare(seen, tokenizer, max_length=16, embeddings=rows)
    assert padded.collator()(padded.dataset.to_list())["input_ids"].max() < rows
    assert padded.pad_token_id < rows


# -- numbers and nothing as texts ------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, said",
    [
        ({"instruction": "add", "input": 12, "output": 3}, "3</s>"),
        ({"prompt": "1+1=", "completion": 2.5}, "2.5</s>"),
        ({"question": 7, "answer": 4}, " 4</s>"),
    ],
)
def test_numbers_are_read_as_their_text(row, said, tmp_path, tokenizer):
    made = prepare(read(put(tmp_path / "a.jsonl", lines(row))), tokenizer, max_length=256)
    assert trained(made, tokenizer) == said
    mixed = put(tmp_path / "b.jsonl", lines(row, {**row, list(row)[-1]: "three"}))
    made = prepare(read(mixed), tokenizer, max_length=256)
    assert trained(made, tokenizer) == said and "three" in trained(made, tokenizer, 1)


def test_whole_numbers_among_others_stay_whole(tmp_path, tokenizer):
    rows = [{"prompt": "1+", "completion": value} for value in (3, 2.5, 4.0)]
    made = prepare(read(put(tmp_path / "a.jsonl", lines(*rows))), tokenizer, max_length=32)
    assert [trained(made, tokenizer, i) for i in range(3)] == ["3</s>", "2.5</s>", "4.0</s>"]
    chats = [
        {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": value}]}
        for value in (3, 2.5)
    ]
    path = put(tmp_path / "b.jsonl", lines(*chats))
    made = prepare(read(path), tokenizer, max_length=64, chat_template="plain")
    assert [trained(made, tokenizer, i) for i in range(2)] == ["3</s>", "2.5</s>"]
    figures = put(tmp_path / "c.jsonl", lines(*({"text": "a", "label": v} for v in (3, 2.5, 1))))
    made = prepare(read(figures), tokenizer, max_length=16)
    assert made.labels.regression and made.dataset["labels"][:] == [3, 2.5, 1]


def test_numbers_in_messages(tmp_path, tokenizer):
    chat = [{"role": "user", "content": 4}, {"role": "assistant", "content": 2}]
    path = put(tmp_path / "a.jsonl", lines({"messages": chat}))
    made = prepare(read(path), tokenizer, max_length=64, chat_template="plain")
    assert trained(made, tokenizer) == "2</s>"


@pytest.mark.parametrize(
    "rows, column",
    [
        ([{"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}], "output"),
        ([{"prompt": "a", "completion": " "}, {"prompt": "a", "completion": "b"}], "completion"),
        ([{"query": "a", "response": ""}, {"query": "a", "response": "b"}], "response"),
    ],
)
def test_empty_answers_are_counted_and_named(rows, column, tokenizer):
    made = prepare(Dataset.from_list(rows), tokenizer, max_length=256)
    assert made.report.empty_answers == 1
    assert f"1 examples with an empty answer (`{column}`)" in str(made.report)
    pairs = prepare(Dataset.from_list(rows), tokenizer, max_length=256, task="seq2seq-lm")
    assert pairs.report.empty_answers == 1


# -- folders and endings ---------------------------------------------------------------------------


def test_a_downloaded_repository(tmp_path):
    put(tmp_path / "README.md", "words")
    put(tmp_path / ".gitattributes", "x")
    put(tmp_path / ".cache" / "old.jsonl", lines({"prompt": "no"}))
    data = tmp_path / "data"
    data.mkdir()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(data / "train-00000-of-00001.parquet")
    Dataset.from_dict({"text": ["c"]}).to_parquet(data / "test-00000-of-00001.parquet")
    assert read(tmp_path)["text"][:] == ["a", "b"]
    assert read(tmp_path, split="test")["text"][:] == ["c"]


def test_folders_named_after_splits_and_configurations(tmp_path):
    put(tmp_path / "a" / "train" / "0.jsonl", lines({"text": "a"}))
    put(tmp_path / "a" / "dev" / "0.jsonl", lines({"text": "b"}))
    assert read(tmp_path / "a")["text"][:] == ["a"]
    assert read(tmp_path / "a", split="validation")["text"][:] == ["b"]
    put(tmp_path / "b" / "en" / "train.jsonl", lines({"text": "a"}))
    put(tmp_path / "b" / "de" / "train.jsonl", lines({"text": "b"}))
    with pytest.raises(ValueError, match="several folders, `de`, `en`.*Name one"):
        read(tmp_path / "b")


def test_what_save_to_disk_leaves(tmp_path):
    from datasets import ClassLabel, Features, Value

    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=kinds)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    again = read(tmp_path / "one")
    assert again["text"][:] == ["a", "b"] and again.features["label"].names == ["no", "yes"]
    assert read(tmp_path / "two")["text"][:] == ["a", "b"]
    assert read(tmp_path / "two", split="test")["text"][:] == ["b"]
    put(tmp_path / "torn.arrow", b"not arrow at all")
    with pytest.raises(ValueError, match="not a whole arrow file"):
        read(tmp_path / "torn.arrow")


def test_a_zip_of_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "books.zip", "w") as archive:
        archive.writestr("books/b.txt", "two\n\nthree")
        archive.writestr("books/a.txt", "one")
        archive.writestr("__MACOSX/books/._a.txt", "junk")
        archive.writestr("books/README.md", "words")
    data = read(tmp_path / "books.zip")
    assert data["text"][:] == ["one", "two", "three"]
    assert data[WHERE][1].endswith("books.zip/books/b.txt, line 1")
    assert len(read(tmp_path / "books.zip", txt_split="file")) == 2
    with zipfile.ZipFile(tmp_path / "splits.zip", "w") as archive:
        archive.writestr("train.jsonl", lines({"text": "a"}))
        archive.writestr("test.jsonl", lines({"text": "b"}))
    assert read(tmp_path / "splits.zip", split="test")["text"][:] == ["b"]
    put(tmp_path / "torn.zip", (tmp_path / "books.zip").read_bytes()[:60])
    with pytest.raises(ValueError, match="torn.zip can't be read as a .zip file"):
        read(tmp_path / "torn.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "a" * (70 << 20))
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        read(tmp_path / "bomb.zip")


@pytest.mark.parametrize("name", ["a.txt", "a.dat", "a.tab", "a"])
@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
def test_a_table_under_any_ending(name, delimiter, tmp_path):
    rows = [["good", "1"], ["bad", "0"]]
    body = "".join(delimiter.join(row) + "\n" for row in rows)
    bare = put(tmp_path / name, body)
    assert read(bare, header=["text", "label"])["text"][:] == ["good", "bad"]
    headed = put(tmp_path / name, delimiter.join(["sentence", "stars"]) + "\n" + body)
    data = read(headed, columns={"text": "sentence", "label": "stars"})
    assert data["label"][:] == ["1", "0"]


# -- the task against the model --------------------------------------------------------------------


def test_an_encoder_is_no_causal_model(shared):
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    encoder = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(shared / "models" / "minilm-l6-v2-fp16")
    )
    encoder.train()
    with pytest.raises(ValueError, match="no causal language model.*logits before it by"):
        check_causal(encoder)
    with pytest.raises(ValueError, match="The column `labels` looks like a classification: type"):
        check_causal(encoder, ["text", "labels"])
    assert encoder.training
    small = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16)
    check_causal(AutoModelForCausalLM.from_config(small), ["text", "label"])
    story = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260k-hf")
    check_causal(story.to(torch.float32))


def test_every_position_of_a_bidirectional_model_is_seen():
    from transformers import AutoModelForCausalLM, BertConfig

    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    with pytest.raises(ValueError, match="BertLMHeadModel is no causal language model"):
        check_causal(AutoModelForCausalLM.from_config(config))
    config.is_decoder = True
    check_causal(AutoModelForCausalLM.from_config(config))
