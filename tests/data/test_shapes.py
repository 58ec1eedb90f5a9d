"""Shapes: the columns decide, by discovery; wrong types are named; labels understood."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lorica.data import Labels, Shape, detect, prepare, read
from lorica.data.samples import Chat, Document, Exchange, Row
from lorica.data.shapes import shapes
from lorica.data.tokenise import TASKS

COLUMNS = {
    "text": ["text"],
    "prompt-completion": ["prompt", "completion"],
    "alpaca": ["instruction", "input", "output"],
    "messages": ["messages", "tools"],
    "conversations": ["conversations", "system"],
    "question-answer": ["question", "answer"],
    "text-label": ["text", "label"],
    "sentence-pair": ["sentence1", "sentence2", "label"],
    "tokens-tags": ["tokens", "tags"],
    "tokenised": ["input_ids", "labels"],
}
VALUES = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}],
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}],
    "tokens": ["a", "b"],
    "tags": ["O", "B"],
    "label": "good",
    "input_ids": [1, 2],
    "labels": [-100, 2],
    "tools": None,
}


# Columns in which a number is read as its text.
AS_TEXT = {"prompt", "completion", "instruction", "output", "question", "answer"}


def row_of(shape: Shape, **values) -> Row:
    """A row with an ordinary value in every column."""
    cells = {name: VALUES.get(name, name) for name in [*shape.columns, *shape.optional]}
    cells |= {"history": [], "system": "be brief"}
    return Row({**cells, **values}, "a.jsonl, line 7")


def by_name(name: str) -> Shape:
    return next(shape for shape in shapes() if shape.name == name)


def test_every_shape_is_found_by_walking():
    assert {shape.name for shape in shapes()} == set(COLUMNS)


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.name)
def test_contract_of_a_shape(shape):
    assert detect(COLUMNS[shape.name]) is shape
    assert detect([*COLUMNS[shape.name], "id", "__where__"]) is shape
    assert shape.unused([*COLUMNS[shape.name], "id", "__where__"]) == ("id",)
    assert shape.find(["id"]) is None
    assert set(shape.readers) <= set(TASKS) and shape.default_task in TASKS
    assert shape.label is None or shape.label in shape.columns
    for read_row in shape.readers.values():
        row = row_of(shape)
        assert read_row(row) == read_row(row)
        for column in shape.columns:
            if column == shape.label == "label":
                continue  # judged with all the others: see Labels
            numbers = () if column in AS_TEXT else (3, 2.5)
            for wrong in (None, True, {"a": 1}, *numbers):
                with pytest.raises(ValueError, match="a.jsonl, line 7: `.*` is "):
                    read_row(row_of(shape, **{column: wrong}))


def test_the_shape_with_most_columns_wins():
    assert detect(["instruction", "input", "output", "text"]).name == "alpaca"
    assert detect(["instruction", "input", "output", "answer"]).name == "alpaca"
    assert detect(["prompt", "prompt_id", "messages"]).name == "messages"
    assert detect(["question", "sentence", "label", "idx"]).name == "sentence-pair"
    assert detect(["sentence", "label"]).name == "text-label"
    assert detect(["premise", "hypothesis", "label"]).name == "sentence-pair"
    assert detect(["query", "response"]).name == "question-answer"
    assert detect(["tokens", "pos_tags", "ner_tags"]).name == "tokens-tags"
    assert detect(["text", "label"], task="causal-lm").name == "text"
    assert detect(["text", "messages"], shape="text").name == "text"


def test_columns_of_no_shape():
    with pytest.raises(
        ValueError, match="`sentance`, `id` fit no shape.*Did you mean `sentence`"
    ) as e:
        detect(["sentance", "id"])
    for shape in shapes():
        assert f"\n  {shape.name}: " in str(e.value)
    with pytest.raises(ValueError, match=r"fit several shapes of data: `messages`, `text`.*shape="):
        detect(["text", "messages"])
    with pytest.raises(
        ValueError, match="shape `text`, which serves `causal-lm`, not `seq2seq-lm`"
    ):
        detect(["text"], task="seq2seq-lm")
    with pytest.raises(ValueError, match="none of the shapes.*Did you mean `alpaca`"):
        detect(["text"], shape="alpacka")
    with pytest.raises(ValueError, match="`task='casual-lm'`.*Did you mean `causal-lm`"):
        detect(["text"], task="casual-lm")


def test_alpaca():
    shape = by_name("alpaca")
    made = shape.readers["causal-lm"](
        row_of(shape, instruction="add", input="1 2", output="3", system="be brief",
               history=[["say a", "a"]])
    )  # fmt: skip
    assert made.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say a"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "add\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert made.plain.turns == (
        ("user", "be brief\n\n### Instruction:\nsay a\n\n### Response:\n"),
        ("assistant", "a"),
        ("user", "\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"),
        ("assistant", "3"),
    )
    short = row_of(shape, instruction="add", input=None, output="3", system=None, history=None)
    assert shape.readers["causal-lm"](short).messages[0]["content"] == "add"
    assert shape.readers["seq2seq-lm"](short).source == "add"
    with pytest.raises(ValueError, match="`history` is a list.*pairs of texts"):
        shape.readers["causal-lm"](row_of(shape, history=[["a"]]))


def test_messages():
    shape = by_name("messages")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": None},
    ]
    made = shape.readers["causal-lm"](
        row_of(shape, messages=messages, tools='[{"name": "f"}]', system=None)
    )
    assert made.tools == [{"name": "f"}]
    assert made.messages[0]["content"] == "ab"
    assert made.messages[1]["content"] == ""
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert made.messages[2] == {"role": "tool", "content": "1"}
    assert shape.readers["causal-lm"](row_of(shape, messages=json.dumps(VALUES["messages"])))
    for wrong, message in [
        ([], "at least one"),
        (["hi"], "entry 0 is a text"),
        ([{"content": "a"}], "message 0.*must have a `role`"),
        ([{"role": "user"}], "message 0.*a text as `content`"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0.*a text as `content`"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         "message 0 has the tool call"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            shape.readers["causal-lm"](row_of(shape, messages=wrong))


def test_conversations():
    shape = by_name("conversations")
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    made = shape.readers["causal-lm"](row_of(shape, conversations=turns, system="s"))
    assert [m["role"] for m in made.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert made.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    pairs = [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]
    made = shape.readers["causal-lm"](row_of(shape, conversations=pairs, system=None))
    assert [m["content"] for m in made.messages] == ["a", "b", "c", "d"]
    for wrong, message in [
        ([{"from": "humann", "value": "a"}], "Did you mean `human`"),
        ([{"from": "human"}], "turn 0.*a text as `value`"),
        ([{"human": "a"}], "turn 0 must have texts"),
        ([{"from": "function_call", "value": "f()"}], "turn 0 is a function_call"),
    ]:
        with pytest.raises(ValueError, match=message):
            shape.readers["causal-lm"](row_of(shape, conversations=wrong))


def test_prompt_completion_as_texts_and_as_messages():
    shape = by_name("prompt-completion")
    texts = shape.readers["causal-lm"](row_of(shape, prompt="a", completion="b", system=None))
    assert texts == Exchange((("user", "a"), ("assistant", "b")))
    user, answer = VALUES["messages"]
    made = shape.readers["causal-lm"](
        row_of(shape, prompt=[user], completion=[answer], system=None)
    )
    assert made == Chat([user, answer], trained_from=1)
    assert by_name("text").readers["causal-lm"](row_of(by_name("text"), text="a")) == Document("a")


def test_wrong_types_name_file_line_and_the_users_column(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a", "response": "b"}\n{"q": "a", "response": null}\n')
    data = read(path, columns={"question": "q"})
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: `response` is nothing \(null\)"):
        prepare(data, tokenizer, max_length=8)
    path.write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 1: `text` is a number \(1\): it must be a"
    ):
        prepare(read(path), tokenizer, max_length=8)


@pytest.mark.parametrize(
    "values, names, numbers",
    [
        (["neg", "pos", "neg"], ("neg", "pos"), [0, 1, 0]),
        (["0", "10", "2"], ("0", "2", "10"), [0, 2, 1]),
        ([0, 3], ("0", "1", "2", "3"), [0, 3]),
        ([True, False], ("false", "true"), [1, 0]),
        ([1.5, 2.0], (), [1.5, 2.0]),
        (["1.5", "-1"], (), [1.5, -1.0]),
    ],
)
def test_labels_are_understood(values, names, numbers):
    places = [f"a.csv, line {i}" for i, _ in enumerate(values)]
    labels = Labels.of(values, places)
    assert labels.names == names
    assert [labels.number(v, p) for v, p in zip(values, places, strict=True)] == numbers
    assert labels.num_labels == max(1, len(names))
    assert labels.problem_type == ("single_label_classification" if names else "regression")
    assert all(labels.label2id[name] == number for number, name in labels.id2label.items())


@pytest.mark.parametrize(
    "values, message",
    [
        (["a", None], "line 1: the label is null"),
        ([0, -1], "line 1: the label is -1"),
        ([0, -2], "line 1: the label is -2"),
        (["0", "-1", "1"], 'line 1: the label is "-1", which is no class'),
        (["a", ""], 'line 1: the label is ""'),
        ([[1], [0]], "line 0: the label is .1."),
        (["a", "a"], 'line 0 and every other row has the label "a"'),
    ],
)
def test_labels_that_are_none(values, message):
    with pytest.raises(ValueError, match=message):
        Labels.of(values, [f"a.csv, line {i}" for i, _ in enumerate(values)])


def test_labels_outside_the_classes():
    labels = Labels.from_label2id({"pos": 1, "neg": 0})
    assert labels.names == ("neg", "pos")
    assert labels.number("pos", "x") == labels.number(1, "x") == labels.number(True, "x") == 1
    for value in ("poss", 2, 2.0):
        with pytest.raises(ValueError, match="b.tsv, line 9: the label "):
            labels.number(value, "b.tsv, line 9")
    with pytest.raises(ValueError, match="outside of the 2 classes .neg, pos.*mean `pos`"):
        labels.number("poss", "b.tsv, line 9")
    with pytest.raises(ValueError, match="is no number, and this is a regression"):
        Labels().number("high", "b.tsv, line 9")
    with pytest.raises(ValueError, match="numbered 0 to 1"):
        Labels.from_label2id({"a": 1, "b": 2})
    with pytest.raises(ValueError, match="at least 2"):
        Labels.from_num_labels(1)


def test_class_names_of_a_data_set_are_kept(word_tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 1]}, features=features)
    made = prepare(data, word_tokenizer, max_length=8)
    assert made.labels == Labels(("no", "yes"))
    assert made.dataset["labels"][:] == [1, 1]


@pytest.mark.parametrize("rows, proposed", [
    ([{"utterance": "turn it on", "intent": "on"}, {"utterance": "please stop", "intent": "off"}],
     "'utterance'"),
    ([{"src": "the cat", "tgt": "le chat"}] * 2, "{'prompt': 'src', 'completion': 'tgt'}"),
    ([{"context": "sky", "question": "q", "answers": {"text": ["blue"]}}] * 2, None),
    ([{"translation": {"en": "cat", "de": "Katze"}}] * 2, None),
])  # fmt: skip
def test_a_proposal_is_no_other_word_and_no_object(rows, proposed, tmp_path):
    """`intent` was taken for a slip of `content`, and objects were proposed as texts."""
    dataset = Dataset.from_list(rows)
    sample = {name: dataset[name][:] for name in dataset.column_names}
    with pytest.raises(ValueError, match="fit no shape") as error:
        detect(dataset.column_names, sample=sample)
    said = str(error.value).partition("\n")[0]
    if proposed is None:
        assert "answers'" not in said and "'translation'" not in said
    else:
        assert proposed in said and "'intent'" not in said.partition("'text': ")[2]
