"""Tokenising: what is trained, what is masked, what is cut, and that the counts say so."""

from __future__ import annotations

import json
import time

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from lorica.data import Labels, prepare, read, show_example
from lorica.data.encode import Encoder
from lorica.data.samples import cut

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello to you"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "hello"},
]


def trained(made, tokenizer, index=0):
    """The text of the tokens that have a label."""
    return tokenizer.decode([label for label in made.dataset[index]["labels"] if label != -100])


def whole(made, tokenizer, index=0):
    return tokenizer.decode(made.dataset[index]["input_ids"])


def of(**columns):
    return Dataset.from_dict({name: [value] for name, value in columns.items()})


def test_text_trains_on_everything_but_the_first_token(tokenizer):
    made = prepare(of(text="once upon a time"), tokenizer, max_length=64)
    row = made.dataset[0]
    assert row["input_ids"] == [*tokenizer("once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert made.report.tokens == len(row["input_ids"])
    assert made.report.label_tokens == len(row["input_ids"]) - 1
    assert whole(made, tokenizer).startswith("<s>") and whole(made, tokenizer).endswith("</s>")


def test_long_documents_become_rows_and_nothing_is_lost(tokenizer):
    text = "the little red fox " * 20
    ids = prepare(of(text=text), tokenizer, max_length=4096).dataset["input_ids"][0]
    made = prepare(of(text=text), tokenizer, max_length=10)
    assert [token for row in made.dataset["input_ids"] for token in row] == ids
    assert {len(row) for row in made.dataset["input_ids"][:-1]} == {10}
    assert all(row[0] == -100 for row in made.dataset["labels"])
    assert made.report.truncated == made.report.dropped_tokens == 0


def test_a_text_that_ends_with_eos_gets_no_second(tokenizer):
    made = prepare(of(text="once upon a time</s>"), tokenizer, max_length=64)
    assert made.dataset["input_ids"][0].count(tokenizer.eos_token_id) == 1


def test_completions_alone_are_trained(tokenizer):
    made = prepare(of(prompt="two plus two is", completion=" four"), tokenizer, max_length=64)
    assert trained(made, tokenizer) == " four</s>"
    assert whole(made, tokenizer) == "<s>two plus two is four</s>"
    every = prepare(
        of(prompt="two plus two is", completion=" four"), tokenizer, max_length=64, train_on="all"
    )
    assert trained(every, tokenizer) == "two plus two is four</s>"


@pytest.mark.parametrize("name", ["tokenizer", "marking_tokenizer", "story_tokenizer"])
@pytest.mark.parametrize("prompt, answer", [("two plus ", "two"), ("two pl", "us"), ("a\n", "\nb")])
def test_no_token_straddles_prompt_and_completion(request, name, prompt, answer):
    """The prompt's ids are those of the prompt alone, as when generating; nothing is added."""
    each = request.getfixturevalue(name)
    made = prepare(of(prompt=prompt, completion=answer), each, max_length=64).dataset[0]
    alone = each(prompt)["input_ids"]
    assert made["input_ids"][: len(alone)] == alone
    assert each.decode(made["input_ids"][:-1]) == each.decode(each(prompt + answer)["input_ids"])
    assert made["labels"] == [-100] * len(alone) + made["input_ids"][len(alone) :]


def test_plain_formats_without_a_template(tokenizer):
    asked = prepare(of(question="what?", answer="four"), tokenizer, max_length=64)
    assert whole(asked, tokenizer) == "<s>Question: what?\nAnswer: four</s>"
    assert trained(asked, tokenizer) == " four</s>"
    told = prepare(of(instruction="add", input="1 2", output="3"), tokenizer, max_length=256)
    assert whole(told, tokenizer) == (
        "<s>Here is a task. Write a response that carries it out.\n\n### Instruction:\nadd\n\n"
        "### Input:\n1 2\n\n### Response:\n3</s>"
    )
    assert trained(told, tokenizer) == "3</s>"
    assert told.report.template == "" and told.chat_template is None


def test_assistants_turns_are_trained(tokenizer):
    data = Dataset.from_dict({"messages": [CHAT]})
    made = prepare(data, tokenizer, max_length=512, chat_template="chatml")
    assert trained(made, tokenizer) == (
        "hello to you<|im_end|>\nhello<|im_end|>\n" + "</s>"  # <|im_end|> isn't special here
    )
    assert whole(made, tokenizer).startswith("<s><|im_start|>system\nbe brief<|im_end|>\n")
    assert made.report.template == "chatml"
    tokenizer.chat_template = made.chat_template
    again = tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert made.dataset["input_ids"][0][:-1] == again  # what generating will see
    by_own = prepare(data, tokenizer, max_length=512)
    assert by_own.dataset[0] == made.dataset[0]
    assert by_own.chat_template is None and by_own.report.template == "the tokenizer's"
    with_user = prepare(data, tokenizer, max_length=512, train_on={"assistant", "user"})
    assert "hello<|im_end|>\n" in trained(with_user, tokenizer)
    assert "be brief" not in trained(with_user, tokenizer)
    assert "again" in trained(with_user, tokenizer)
    every = prepare(data, tokenizer, max_length=512, train_on="all")
    assert every.report.label_tokens == every.report.tokens - 1


def test_plain_template_ends_turns_with_eos(tokenizer):
    data = Dataset.from_dict({"messages": [CHAT]})
    made = prepare(data, tokenizer, max_length=512, chat_template="plain")
    assert trained(made, tokenizer) == "hello to you</s>hello</s>"


def test_only_the_completions_messages_are_trained(tokenizer):
    data = Dataset.from_dict({"prompt": [CHAT[1:4]], "completion": [CHAT[4:]]})
    made = prepare(data, tokenizer, max_length=512, chat_template="plain")
    assert trained(made, tokenizer) == "hello</s>"


def test_generation_marks_are_heeded(tokenizer):
    marked = (
        "{% for m in messages %}{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
    )
    data = Dataset.from_dict({"messages": [CHAT]})
    made = prepare(data, tokenizer, max_length=512, chat_template=marked)
    assert trained(made, tokenizer).replace(" ", "") == "hellotoyouhello"


def test_a_template_that_rewrites_history_gives_an_example_a_turn(tokenizer, tmp_path):
    last_only = tmp_path / "last.jinja"
    last_only.write_text(
        "{% for m in messages %}{{ m['role'] }}: "
        "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
        "{% else %}(said){% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    data = Dataset.from_dict({"messages": [CHAT]})
    made = prepare(data, tokenizer, max_length=512, chat_template=str(last_only))
    assert (made.report.examples, made.report.rows) == (1, 2)
    assert [trained(made, tokenizer, i) for i in (0, 1)] == ["hello to you\n</s>", "hello\n</s>"]
    assert "assistant: (said)\nuser: again\nassistant: hello" in whole(made, tokenizer, 1)
    unlike = last_only.read_text().replace("%}assistant: {%", "%}assistant: <think>{%")
    with pytest.raises(ValueError, match="row 0: the chat template .given. renders message 2"):
        prepare(data, tokenizer, max_length=512, chat_template=unlike)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row 0: .*refuses.*roles must alternate"):
        prepare(data, tokenizer, max_length=512, chat_template=refusing)


def test_templates_that_are_none(tokenizer):
    data = Dataset.from_dict({"messages": [CHAT]})
    with pytest.raises(ValueError, match="row 0: messages need a chat template.*`plain`, `chatml`"):
        prepare(data, tokenizer, max_length=64)
    with pytest.raises(ValueError, match="Did you mean `chatml`"):
        prepare(data, tokenizer, max_length=64, chat_template="chatlm")
    with pytest.raises(ValueError, match="line 1, is not valid Jinja"):
        prepare(data, tokenizer, max_length=64, chat_template="{% for m in messages %}")
    with pytest.raises(ValueError, match="has no messages to put into one"):
        prepare(of(text="once"), tokenizer, max_length=64, chat_template="chatml")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    made = prepare(of(question="a", answer="b"), tokenizer, max_length=64, chat_template="none")
    assert whole(made, tokenizer) == "<s>Question: a\nAnswer: b</s>"


def test_roles_that_are_none(tokenizer):
    data = Dataset.from_dict({"messages": [CHAT]})
    how = {"max_length": 64, "chat_template": "plain"}
    with pytest.raises(ValueError, match="`train_on` names `tol`.*there are `assistant`, `system`"):
        prepare(data, tokenizer, train_on={"assistant", "tol"}, **how)
    with pytest.raises(ValueError, match="`train_on='al'`.*Did you mean `all`"):
        prepare(data, tokenizer, train_on="al", **how)


def test_tools_reach_the_template(tokenizer, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [*CHAT[:2], call], "tools": [tool]}))
    made = prepare(read(path), tokenizer, max_length=512, chat_template="chatml")
    assert json.dumps(tool, sort_keys=True)[:20] in whole(made, tokenizer).replace("\n", "")
    assert '"name": "f"' in trained(made, tokenizer)


def test_cut_examples_are_counted_and_left_out(tokenizer):
    rows = {"prompt": ["a", "the little red fox " * 10, "b"], "completion": ["c " * 50, "d", "e"]}
    made = prepare(Dataset.from_dict(rows), tokenizer, max_length=20)
    assert made.report.examples == 3 and made.report.rows == 2
    assert made.report.truncated == 2
    assert made.report.skipped == {"no token with a label is left within `max_length`": 1}
    lengths = [len(tokenizer(p + c)["input_ids"]) + 1 for p, c in zip(*rows.values(), strict=True)]
    assert made.report.dropped_tokens == sum(max(0, n - 20) for n in lengths)
    assert len(made.dataset["input_ids"][0]) == 20
    with pytest.raises(
        ValueError, match="None of the 1 examples .* has a label left at `max_length"
    ):
        prepare(Dataset.from_dict(rows).select([1]), tokenizer, max_length=20)
    blank = prepare(Dataset.from_dict({"text": ["one two", " \n"]}), tokenizer, max_length=20)
    assert blank.report.skipped == {"they are empty": 1}


def test_tokenised_data(tokenizer):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, -100, 7]]})
    assert prepare(data, tokenizer, max_length=8).dataset[0] == {
        "input_ids": [5, 6, 7],
        "labels": [-100, -100, 7],
    }
    bare = prepare(data.remove_columns("labels"), tokenizer, max_length=8)
    assert bare.dataset["labels"][0] == [-100, 6, 7]
    with pytest.raises(ValueError, match='`train_on="all"` was given for data that has its own'):
        prepare(data, tokenizer, max_length=8, train_on="all")
    shifted = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[6, 7, 2]]})
    with pytest.raises(ValueError, match="row 0: `labels`.*at 0 the id is 5 and the label 6"):
        prepare(shifted, tokenizer, max_length=8)


def test_sequence_classification(word_tokenizer):
    data = Dataset.from_dict({"text": ["the film good", "bad"], "label": ["pos", "neg"]})
    made = prepare(data, word_tokenizer, max_length=4)
    assert made.labels == Labels(("neg", "pos"))
    assert made.dataset[0] == {"input_ids": [1, 7, 6, 2], "token_type_ids": [0] * 4, "labels": 1}
    assert (made.report.truncated, made.report.dropped_tokens) == (1, 1)
    batch = made.collator(pad_to_multiple_of=8)(made.dataset.to_list())
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (2, 8), "attention_mask": (2, 8), "token_type_ids": (2, 8), "labels": (2,)
    }  # fmt: skip
    assert batch["labels"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [4, 3]
    other = Dataset.from_dict({"text": ["good"], "label": ["fine"]})
    with pytest.raises(ValueError, match='row 0: the label "fine" is outside of the 2 classes'):
        prepare(other, word_tokenizer, max_length=8, labels=made.labels)


def test_regression_of_pairs(word_tokenizer):
    data = Dataset.from_dict({"sentence1": ["good"], "sentence2": ["bad film"], "label": [2.5]})
    made = prepare(data, word_tokenizer, max_length=8)
    assert made.labels.problem_type == "regression" and made.labels.num_labels == 1
    assert made.dataset[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert made.collator()(made.dataset.to_list())["labels"].dtype == torch.float32
    whole_stars = Dataset.from_dict({"text": ["good", "bad"], "label": [5, 1]})
    asked = prepare(whole_stars, word_tokenizer, max_length=8, labels=Labels())
    assert asked.dataset["labels"][:] == [5.0, 1.0]


def test_token_classification(word_tokenizer):
    data = Dataset.from_dict(
        {"tokens": [["the", "unbelievable", "film"]], "tags": [["O", "ADJ", "N"]]}
    )
    made = prepare(data, word_tokenizer, max_length=16)
    assert made.labels.names == ("ADJ", "N", "O")
    assert made.dataset[0]["input_ids"] == [1, 7, 8, 9, 10, 6, 2]
    assert made.dataset[0]["labels"] == [-100, 2, 0, -100, -100, 1, -100]
    assert made.report.label_tokens == 3
    short = prepare(data, word_tokenizer, max_length=5)
    assert (short.report.truncated, short.report.dropped_tokens) == (1, 1)
    batch = made.collator(pad_to_multiple_of=8)(made.dataset.to_list())
    assert batch["labels"].shape == (1, 8) and batch["labels"][0, -1] == -100
    uneven = Dataset.from_dict({"tokens": [["the"]], "tags": [["O", "N"]]})
    with pytest.raises(ValueError, match="row 0: `tags` .*1 tokens need 1 tags"):
        prepare(uneven, word_tokenizer, max_length=16)


def test_tagged_words_have_their_spaces(tokenizer, marking_tokenizer):
    words = ["the", "red", "", "unseen", "fox"]
    data = Dataset.from_dict({"tokens": [words], "tags": [["D", "J", "X", "J", "N"]]})
    made = prepare(data, tokenizer, max_length=32)
    row, numbers = made.dataset[0], {name: i for i, name in enumerate(made.labels.names)}
    assert row["input_ids"] == tokenizer("the red unseen fox")["input_ids"], "as in a text"
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    starts = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert [tokens[i][0] for i in starts] == ["t", "Ġ", "Ġ", "Ġ"]
    assert [row["labels"][i] for i in starts] == [numbers[tag] for tag in "DJJN"]
    assert made.report.dropped_tokens == 1, "the word without letters"
    other = prepare(data, marking_tokenizer, max_length=32).dataset[0]["input_ids"]
    assert other == marking_tokenizer(words, is_split_into_words=True)["input_ids"]


def declared(names, values):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["good"] * len(values), "label": values}, features)


def test_declared_names_lead_to_the_models_classes(word_tokenizer):
    """MNLI's order in GLUE, and in a model of another order."""
    glue = declared(["entailment", "neutral", "contradiction"], [0, 1, 2, 0])
    model = Labels(("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))

    def numbers(data, labels):
        return prepare(data, word_tokenizer, max_length=8, labels=labels).dataset["labels"][:]

    assert numbers(glue, model) == [2, 1, 0, 2]
    assert numbers(glue, None) == [0, 1, 2, 0]
    held = declared(["contradiction", "entailment", "neutral"], [0, 1, 2])
    assert numbers(held, prepare(glue, word_tokenizer, max_length=8).labels) == [2, 0, 1]
    assert numbers(glue, Labels.from_num_labels(3)) == [0, 1, 2, 0], "numbers have no order"
    assert numbers(glue, Labels(("LABEL_0", "LABEL_1", "LABEL_2"))) == [0, 1, 2, 0]
    assert numbers(declared(["0", "1", "2"], [2, 0]), model) == [2, 0]
    assert numbers(glue, Labels()) == [0.0, 1.0, 2.0, 0.0]
    assert numbers(declared(["1", "0"], [0, 1]), Labels(("0", "1"))) == [1, 0]
    assert numbers(declared(["a", "A"], [0, 1]), Labels(("A", "a"))) == [1, 0]
    with pytest.raises(ValueError, match='row 0: the label 1 is "not_entailment" by the data\'s'):
        numbers(declared(["entailment", "not_entailment"], [1, 0]), model)
    with pytest.raises(ValueError, match="outside of the 2 classes"):
        numbers(glue, Labels.from_num_labels(2))


def test_declared_tags_lead_to_the_models_classes(word_tokenizer):
    tags = ClassLabel(names=["N", "D"])
    features = Features({"tokens": List(Value("string")), "tags": List(tags)})
    data = Dataset.from_dict({"tokens": [["the", "film"]], "tags": [[1, 0]]}, features)
    made = prepare(data, word_tokenizer, max_length=8, labels=Labels(("D", "N", "O")))
    assert made.dataset[0]["labels"] == [-100, 0, 1, -100]


def test_numbers_as_texts_mean_classes_with_names(word_tokenizer):
    data = Dataset.from_dict({"text": ["good", "bad"], "label": ["1", "0"]})
    made = prepare(data, word_tokenizer, max_length=8, labels=Labels(("neg", "pos")))
    assert made.dataset["labels"][:] == [1, 0]
    stars = Dataset.from_dict({"text": ["good", "bad"], "label": ["1", "2"]})
    labels = prepare(stars, word_tokenizer, max_length=8).labels
    assert labels.number("1", "row 0") == 0, "there a number is a name"
    for value in ("0", "3"):
        with pytest.raises(ValueError, match=f'the label "{value}" is outside of the 2 classes'):
            labels.number(value, "row 0")
    with pytest.raises(ValueError, match='the label "2" is outside of the 2 classes'):
        Labels(("neg", "pos")).number("2", "row 0")


def test_seq2seq(tokenizer):
    data = Dataset.from_dict({"question": ["once upon a time", "two"], "answer": ["a", "the fox"]})
    made = prepare(data, tokenizer, task="seq2seq-lm", max_length=64)
    assert made.dataset["input_ids"][1] == tokenizer("two")["input_ids"]
    assert made.dataset["labels"][1] == tokenizer("the fox")["input_ids"]
    batch = made.collator()(made.dataset.to_list())
    assert batch["labels"].shape[1] == max(map(len, made.dataset["labels"]))
    assert (batch["labels"] == -100).any()
    cut_short = prepare(data, tokenizer, task="seq2seq-lm", max_length=64, max_target_length=2)
    assert max(map(len, cut_short.dataset["labels"])) == 2
    assert cut_short.report.dropped_tokens > 0
    assert " the" not in show_example(made, tokenizer, index=1, color=False).split("->")[0]


def test_options_a_task_has_no_use_for(word_tokenizer, tokenizer):
    labelled = Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]})
    with pytest.raises(ValueError, match="`packing` was given for the task `sequence-class"):
        prepare(labelled, word_tokenizer, max_length=8, packing="best_fit")
    with pytest.raises(ValueError, match="`labels`, `max_target_length` was given for"):
        prepare(of(text="a b"), tokenizer, max_length=8, labels=Labels(), max_target_length=3)
    with pytest.raises(ValueError, match="`max_length` is 1"):
        prepare(of(text="a b"), tokenizer, max_length=1)
    with pytest.raises(ValueError, match="Did you mean `best_fit`"):
        prepare(of(text="a b"), tokenizer, max_length=8, packing="best-fit")
    with pytest.raises(ValueError, match="`block_mask` was given, and the data isn't packed"):
        prepare(of(text="a b"), tokenizer, max_length=8).collator(block_mask=torch.float32)


def test_same_input_same_output_and_columns_left_aside(tokenizer):
    data = Dataset.from_dict({"text": ["one two", "three four"], "id": [1, 2]})
    one, two = (prepare(data, tokenizer, max_length=32, packing="best_fit") for _ in range(2))
    assert one.dataset.to_list() == two.dataset.to_list() and one.report == two.report
    assert one.report.unused_columns == ("id",)
    assert "columns not used: id" in str(one.report)
    assert json.loads(json.dumps(one.report.as_dict()))["rows"] == 1
    assert one.dataset.cache_files == []


def test_show_example(tokenizer, word_tokenizer):
    data = of(prompt="two plus two is", completion=" four")
    made = prepare(data, tokenizer, max_length=64)
    assert show_example(made, tokenizer, color=False) == "<s>two plus two is[[ four</s>]]"
    coloured = show_example(made, tokenizer, color=True)
    assert "\x1b[1;32m four</s>\x1b[0m" in coloured and "\x1b[2m<s>two plus two is" in coloured
    assert show_example(made, tokenizer, color=False, max_tokens=2).endswith("more tokens)")
    texts = Dataset.from_dict({"text": ["one", "two"]})
    packed = prepare(texts, tokenizer, max_length=64, packing="best_fit")
    shown = show_example(packed, tokenizer, color=False)
    assert shown == "<s>[[one</s>]]\n--- next example of the row ---\n<s>[[two</s>]]"
    labelled = Dataset.from_dict({"text": ["good", "bad"], "label": ["pos", "neg"]})
    assert show_example(
        prepare(labelled, word_tokenizer, max_length=8), word_tokenizer, color=False
    ).endswith("-> pos")
    with pytest.raises(ValueError, match="`index` is 1"):
        show_example(made, tokenizer, index=1)


def test_long_texts_are_tokenised_in_parts_without_a_trace(tokenizer, story_tokenizer, shared):
    text = read(shared / "text" / "shift_childrens.txt.xz", txt_split="file")["text"][0][:60_000]
    parts = list(cut(text, size=5_000))
    assert len(parts) > 8 and "".join(parts) == text
    for each, extra in [(tokenizer, 0), (story_tokenizer, 2)]:  # the latter has "of▁a▁" as a token
        made = Encoder(each).encode(parts, [True] + [False] * (len(parts) - 1))
        ids = [token for part in made for token in part]
        at_once = each(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert (ids == at_once) == (not extra)
        assert len(ids) - len(at_once) <= extra * len(parts)
        assert each.decode(ids) == each.decode(at_once)


def test_cut_without_spaces():
    assert list(cut("x" * 20, size=6)) == ["x" * 6, "x" * 6, "x" * 8]


def test_real_data_is_quick(shared, story_tokenizer):
    start = time.perf_counter()
    asked = prepare(
        read(shared / "tasks" / "gsm8k_test.jsonl.xz"),
        story_tokenizer,
        max_length=512,
        packing="best_fit",
        max_lost_text=0.05,
    )
    assert asked.report.lost_text > 0.03  # that tokenizer has no "=", "/", "+" and "*"
    assert asked.report.examples == 1319 and asked.report.fill > 0.95
    told = prepare(
        read(shared / "tasks" / "llm-adapters" / "ARC-Easy" / "test.json.xz"),
        story_tokenizer,
        max_length=512,
    )
    assert told.report.unused_columns == ("answer",)
    assert trained(told, story_tokenizer).startswith("the correct answer is answer")
    book = prepare(
        read(shared / "text" / "shift_childrens.txt.xz"), story_tokenizer, max_length=256
    )
    assert book.report.tokens == book.report.label_tokens + book.report.rows
    code = prepare(
        read(shared / "tasks" / "mbpp.jsonl.xz", columns={"prompt": "text", "completion": "code"}),
        story_tokenizer,
        max_length=512,
        max_lost_text=0.2,
    )
    assert code.report.shape == "prompt-completion"
    assert time.perf_counter() - start < 20  # about 2 s on one core


def test_glue(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "minilm-l6-v2-fp16")
    header = ["source", "label", "_", "text"]
    train, dev = (read(shared / "glue" / "CoLA" / f"{name}.tsv.xz", header=header, max_samples=500)
                  for name in ("train", "dev"))  # fmt: skip
    made = prepare(train, tokenizer, max_length=64)
    held = prepare(dev, tokenizer, max_length=64, labels=made.labels)
    assert made.labels.names == ("0", "1") and held.report.rows == 500


def test_an_example_of_the_data_cannot_speak_to_the_terminal(tokenizer):
    from lorica.text import CONTROL

    text = "one \x1b[8m two \x9b2J three \u202e four"
    for rows in ({"text": [text]}, {"text": ["one"] * 4, "label": ["a\x1b[2J\nb", "c"] * 2}):
        ready = prepare(Dataset.from_dict(rows), tokenizer, max_length=64)
        for color in (True, False):
            shown = show_example(ready, tokenizer, color=color)
            for own in ("\x1b[1;32m", "\x1b[2m", "\x1b[0m"):
                shown = shown.replace(own, "")
            assert CONTROL.search(shown) is None and "\nb" not in shown
