"""Conversations: the assistant's turns are trained, once each, as generation would see them."""

from __future__ import annotations

import json
import time
from datetime import datetime

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import TEMPLATES

from lorica.data import prepare, read
from lorica.data.bounded import SECONDS_PER_PART
from lorica.data.turns import FLAGS
from lorica.inference.generate import Prompter

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}
SAID = ["once", "upon a time", "two plus two", "hello there", "a little red fox", "four"]


def user(text, **more):
    return {"role": "user", "content": text, **more}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def chatting(tokenizer):
    """The tests' tokenizer with the end mark of chats among its special tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def prepared(tmp_path, tokenizer, *rows, **how):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return prepare(read(path), tokenizer, **{"max_length": 512, **how})


def trained(made, tokenizer):
    """The trained stretches of every row, as texts."""
    found = []
    for row in made.dataset:
        stretch = []
        for label in [*row["labels"], -100]:
            if label != -100:
                stretch.append(label)
            elif stretch:
                found.append(tokenizer.decode(stretch))
                stretch = []
    return found


def whole(made, tokenizer):
    return [tokenizer.decode(ids) for ids in made.dataset["input_ids"]]


# -- every kind of template ------------------------------------------------------------------------


@st.composite
def conversations(draw, kind):
    """Turns with contents that differ, so that each can be found again."""
    count = draw(st.integers(1, 4))
    turns = []
    if kind.system and draw(st.booleans()):
        turns.append({"role": "system", "content": "be brief"})
    if not kind.alternates and draw(st.booleans()) and len(turns) == 0:
        turns.append(bot("welcome") if not kind.tools else user("welcome"))
    for number in range(count):
        turns.append(user(f"{draw(st.sampled_from(SAID))} {number}?"))
        turns.append(bot(f"{draw(st.sampled_from(SAID))}, said {number}"))
    if draw(st.booleans()):
        turns.append(user("and then?"))
    return turns


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_are_trained_once(name, packing, tmp_path_factory, request):
    from copy import deepcopy

    kind = TEMPLATES[name]
    tokenizer = deepcopy(request.getfixturevalue("chatting"))
    tokenizer.chat_template = kind.text
    folder = tmp_path_factory.mktemp("chats")

    @settings(max_examples=12)
    @given(st.lists(conversations(kind), min_size=1, max_size=3))
    def check(chats):
        rows = [{"messages": chat, **({"tools": [TOOL]} if kind.tools else {})} for chat in chats]
        made = prepared(folder, tokenizer, *rows, packing=packing)
        said = [m["content"] for chat in chats for m in chat if m["role"] == "assistant"]
        stretches = sorted(trained(made, tokenizer), key=len)
        assert sorted(_without_end(s, kind, tokenizer) for s in stretches) == sorted(said)
        longest = max(map(len, prepared(folder, tokenizer, *rows).dataset["input_ids"]))
        short = prepared(folder, tokenizer, *rows, packing=packing, max_length=longest - 4)
        assert short.report.truncated
        left = trained(short, tokenizer)
        for stretch in left:  # each is a turn, or the beginning of one
            whole_turn = next(each for each in stretches if each.startswith(stretch))
            stretches.remove(whole_turn)
        assert all(row[0] == -100 for row in short.dataset["labels"])

    check()


def _without_end(stretch, kind, tokenizer):
    """The content of a trained stretch, which must end as the template ends a turn."""
    for end in (kind.end + "</s>", kind.end):  # a template without end token gets EOS at the end
        if stretch.endswith(end):
            stretch = stretch.removesuffix(end)
            return stretch.strip().removeprefix("<think>\n\n</think>").strip()
    raise AssertionError(f"{stretch!r} doesn't end with {kind.end!r}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_follows_what_generation_sees(name, tmp_path, chatting):
    """Before every trained stretch stand the very ids of the prompt at that turn."""
    kind = TEMPLATES[name]
    chatting.chat_template = kind.text
    chat = [user("hello"), bot("one, said"), user("again?"), bot("two, said"), user("last?"),
            bot("three, said")]  # fmt: skip
    tools = [TOOL] if kind.tools else None
    row = {"messages": chat, **({"tools": tools} if tools else {})}
    made = prepared(tmp_path, chatting, row, now=datetime.now())
    prompter = Prompter(chatting, "causal-lm")
    rows = made.dataset.to_list()
    for turn in (1, 3, 5):
        part = {"messages": chat[:turn], **({"tools": tools} if tools else {})}
        path = tmp_path / "asked.jsonl"
        path.write_text(json.dumps(part))
        [prompt] = prompter.rows(read(path))
        ids = list(prompt.ids)
        hits = [row for row in rows if row["input_ids"][: len(ids)] == ids]
        assert any(row["labels"][len(ids)] != -100 for row in hits), (turn, prompt.text)


def test_a_conversation_is_one_example_where_the_template_allows(tmp_path, chatting):
    chat = [user("a"), bot("b"), user("c"), bot("d")]
    for name, count in [("chatml", 1), ("folded", 1), ("end of text", 2), ("thinking", 2)]:
        chatting.chat_template = TEMPLATES[name].text
        made = prepared(tmp_path, chatting, {"messages": chat})
        assert (made.report.rows, made.report.examples) == (count, 1), name
        every = prepared(tmp_path, chatting, {"messages": chat}, train_on="all")
        assert every.report.rows == 1, "nothing has to be taken apart"
        assert every.report.label_tokens >= every.report.tokens - 2


def test_thoughts_are_trained_as_the_model_writes_them(tmp_path, chatting):
    """Templates that cut the thought out of a turn, or begin it in the generation prompt."""
    cuts = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ m['content'].split('</think>')[-1] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    begins = cuts.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    said = ["<think>\ntwo and two\n</think>\n\nfour", "<think>\nhm\n</think>\n\nyes"]
    chat = [user("2+2?"), bot(said[0]), user("so?"), bot(said[1])]
    for text, lead in [(cuts, "<think>\n"), (begins, "")]:
        chatting.chat_template = text
        made = prepared(tmp_path, chatting, {"messages": chat})
        assert trained(made, chatting) == [
            f"{lead}two and two\n</think>\n\nfour<|im_end|>",
            f"{lead}hm\n</think>\n\nyes<|im_end|>",
        ]
        assert "two and two" not in whole(made, chatting)[1], "the prompt has no earlier thought"
    with pytest.raises(ValueError, match="line 1: .*renders message 1.*<think>"):
        prepared(tmp_path, chatting, {"messages": [user("a"), bot("no thought")]})


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [user("once?"), bot("", tool_calls=[CALL]), {"role": "tool", "content": "7", "name": "f"},
          bot("seven")]  # fmt: skip
_HEAD = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
_END = "{{ '<|im_end|>\\n' }}{% endfor %}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def test_arguments_of_calls_as_the_template_takes_them(tmp_path, chatting):
    """DeepSeek's kind wants JSON text, as OpenAI's files have it, most others a mapping."""
    text = (
        "{{ tools | tojson }}{% for m in messages %}" + _HEAD + "{{ m['content'] }}"
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] + c['function']['arguments'] }}"
        "{% endfor %}" + _END + _OPEN
    )
    made = prepared(
        tmp_path, chatting, {"messages": CALLED, "tools": [TOOL]}, chat_template=text
    )  # fmt: skip
    assert trained(made, chatting) == ['f{"x": 1}<|im_end|>', "seven<|im_end|>"]


def test_a_template_that_cannot_do_without_a_call_reads_it(tmp_path, chatting):
    """gpt-oss's kind: an answer of a tool without its call raises an error."""
    text = (
        "{{ tools | tojson }}{% set s = namespace(called=false) %}{% for m in messages %}"
        "{% if m['tool_calls'] %}{% set s.called = true %}{% endif %}"
        "{% if m['role'] == 'tool' and not s.called %}{{ raise_exception('no call') }}{% endif %}"
        + _HEAD + "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}"
        "{% endif %}" + _END + _OPEN
    )  # fmt: skip
    made = prepared(tmp_path, chatting, {"messages": CALLED, "tools": [TOOL]}, chat_template=text)
    assert ["f" in part for part in trained(made, chatting)] == [True, False]


def test_a_call_behind_a_thought_that_the_prompt_begins(tmp_path, chatting):
    """Nemotron's kind: the prompt ends in a line of its own, which the rendered turn lacks."""
    text = (
        "{{ tools | tojson }}{% for m in messages %}" + _HEAD
        + "{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] }}"
        "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}" + _END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )  # fmt: skip
    made = prepared(tmp_path, chatting, {"messages": CALLED, "tools": [TOOL]}, chat_template=text)
    first, second = trained(made, chatting)
    assert first.startswith("</think>[{") and second == "</think>seven<|im_end|>"


def test_a_thought_that_the_prompt_has_begun_is_not_begun_again(tmp_path, chatting):
    """The template writes an empty thought before a content that has one."""
    text = (
        "{% for m in messages %}" + _HEAD
        + "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] }}" + _END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )  # fmt: skip
    chat = {"messages": [user("once?"), bot("<think>\nhm\n</think>\n\ntwo")]}
    made = prepared(tmp_path, chatting, chat, chat_template=text)
    assert trained(made, chatting) == ["hm\n</think>\n\ntwo<|im_end|>"]
    made = prepared(
        tmp_path, chatting, {"messages": [user("once?"), bot("two")]}, chat_template=text
    )
    assert trained(made, chatting) == ["\n</think>\n\ntwo<|im_end|>"]


def test_a_greeting_that_the_template_refuses_can_be_left_out(tmp_path, chatting):
    """Qwen3.5's kind wants a user's message in whatever it renders."""
    text = (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('no user query') }}{% endif %}{% for m in messages %}" + _HEAD
        + "{{ m['content'] }}" + _END + _OPEN
    )  # fmt: skip
    chat = [bot("welcome"), user("once?"), bot("two")]
    with pytest.raises(ValueError, match='no user query.*"train": false'):
        prepared(tmp_path, chatting, {"messages": chat}, chat_template=text)
    chat[0]["train"] = False
    made = prepared(tmp_path, chatting, {"messages": chat}, chat_template=text)
    assert trained(made, chatting) == ["two<|im_end|>"]


def detail(first, last, train=True):
    return {"begin_offset": first, "end_offset": last, "train": train}


@pytest.mark.parametrize("template", ["chatml", "thinking", "marked", "plain"])
@pytest.mark.parametrize("words", ["tokenizer", "marking_tokenizer"])
def test_stretches_of_a_turn_are_trained(template, words, tmp_path, request):
    """Axolotl's `train_detail`: what no entry trains is left out, and a token that has a character
    of a stretch is trained; so is what ends the turn."""
    tokenizer = request.getfixturevalue(words)
    text = TEMPLATES[template].text if template in TEMPLATES else template
    said = "KLM QRS TUV XYZ"  # no token has two of these letters
    turn = bot(said, train_detail=[detail(4, 6), detail(8, 10, False), detail(12, 14)])
    chat = {"messages": [user("once?"), turn, user("hello"), bot("a fox")]}
    made = prepared(tmp_path, tokenizer, chat, chat_template=text)
    parts = [part.strip() for part in trained(made, tokenizer)]
    ids = prepared(tmp_path, tokenizer, {"messages": [user("once?"), bot(said), user("hello"),
                   bot("a fox")]}, chat_template=text).dataset["input_ids"]  # fmt: skip
    assert list(made.dataset["input_ids"]) == list(ids)  # the tokens are those of whole turns
    assert parts[0] == "QRS" and parts[1].startswith("XYZ") and len(parts) == 3
    assert "TUV" not in "".join(parts) and parts[1].removeprefix("XYZ") in parts[2]


def test_stretches_beside_flags_and_rows_that_have_none(tmp_path, tokenizer):
    turn = bot("two is four", train_detail=[detail(7, 10)])
    for more, found in (({}, 1), ({"train": True}, 1), ({"train": False}, 0)):
        chats = [
            {"messages": [user("once?"), {**turn, **more}]},
            {"messages": [user("a"), bot("b")]},
        ]
        made = prepared(tmp_path, tokenizer, *chats, chat_template="chatml")
        assert sum("four" in part for part in trained(made, tokenizer)) == found
        assert not any("two" in part for part in trained(made, tokenizer))
    nothing = bot("two", train_detail=[])
    made = prepared(
        tmp_path, tokenizer, {"messages": [user("a"), nothing, user("b"), bot("four")]},
        chat_template="chatml", train_on="all",
    )  # fmt: skip
    assert not any("two" in part for part in trained(made, tokenizer))
    trimmed = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    padded = bot("  two is four ", train_detail=[detail(9, 12)])
    made = prepared(tmp_path, tokenizer, {"messages": [user("a"), padded]}, chat_template=trimmed)
    assert [part.strip() for part in trained(made, tokenizer)] == ["four</s>"]
    loud = trimmed.replace("| trim", "| upper")
    with pytest.raises(ValueError, match="leaves out the content|doesn't write the content"):
        prepared(tmp_path, tokenizer, {"messages": [user("a"), padded]}, chat_template=loud)


def test_a_conversation_may_begin_with_the_assistant(tmp_path, chatting):
    for name in ("chatml", "default system", "dated", "thinking", "marked"):
        chatting.chat_template = TEMPLATES[name].text
        made = prepared(tmp_path, chatting, {"messages": [bot("welcome"), user("hi"), bot("yes")]})
        found = [part.split("</think>")[-1].strip() for part in trained(made, chatting)]
        assert found == ["welcome<|im_end|>", "yes<|im_end|>"], name


# -- keys of a turn --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("columns", ["messages", "conversations"])
def test_flags_of_a_turn_are_heeded(key, columns, tmp_path, tokenizer):
    yes, no = (True, False) if FLAGS[key] else (False, True)
    values = [(yes, no), (int(yes), int(no)), (str(yes), str(no)), (float(yes), float(no))]
    for on, off in values:
        chat = [user("a"), bot("BAD", **{key: off}), user("b"), bot("good", **{key: on})]
        made = prepared(tmp_path, tokenizer, {columns: chat}, chat_template="plain")
        assert trained(made, tokenizer) == ["good</s>"]
        every = prepared(
            tmp_path, tokenizer, {columns: chat}, chat_template="plain", train_on="all"
        )
        assert "BAD" not in "".join(trained(every, tokenizer))
        assert "User: b" in "".join(trained(every, tokenizer))
    asked = [user("learn me", **{key: yes}), bot("not me", **{key: no})]
    made = prepared(tmp_path, tokenizer, {columns: asked}, chat_template="plain")
    assert trained(made, tokenizer) == ["User: learn me\n\n"]


def test_flags_hold_in_every_shape_of_messages(tmp_path, tokenizer):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "BAD", "weight": 0},
             {"from": "human", "value": "b"}, {"from": "gpt", "value": "good"}]  # fmt: skip
    made = prepared(tmp_path, tokenizer, {"conversations": turns}, chat_template="plain")
    assert trained(made, tokenizer) == ["good</s>"]
    pair = {"prompt": [user("a")], "completion": [bot("BAD", train=False), user("b"), bot("good")]}
    made = prepared(tmp_path, tokenizer, pair, chat_template="plain")
    assert trained(made, tokenizer) == ["good</s>"]
    chatless = {"messages": [user("a"), bot("b", weight=0)]}
    made = prepared(
        tmp_path, tokenizer, chatless, {"messages": [user("a"), bot("b")]}, chat_template="plain"
    )
    assert made.report.skipped == {"no turn of theirs is trained": 1}
    with pytest.raises(ValueError, match="No turn of the 1 examples .*`weight` 0"):
        prepared(tmp_path, tokenizer, chatless, chat_template="plain")


@pytest.mark.parametrize(
    "turn, message",
    [
        (bot("a", weight=0.5), "`weight` is 0.5; allowed are true and false, or 1 and 0"),
        (bot("a", loss="maybe"), '`loss` is "maybe"'),
        (bot("a", weight=1, train=False), "`weight`, `train` disagree"),
        (bot("a", train_detail=[{"begin_offset": 0}]), "`train_detail` has .*an entry is like"),
        (
            bot("a", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True}]),
            "the last one .here 0 at most. included",
        ),
        (
            bot(
                "ab",
                train_detail=[
                    {"begin_offset": 0, "end_offset": 1, "train": True},
                    {"begin_offset": 1, "end_offset": 1, "train": False},
                ],
            ),
            "disagree on character 1",
        ),
        (bot("a", mood="glad"), "message 1 has the key `mood`.*would be lost"),
        (bot("a", timestamp=3), "message 1 has the key `timestamp`"),
        (user("a", reasoning="because"), "message 1 has the key `reasoning`"),
        (bot("a", audio={"id": "x"}), "message 1 has the key `audio`"),
    ],
)
def test_keys_without_a_meaning_are_refused_by_name(turn, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, tokenizer, {"messages": [user("q"), turn]}, chat_template="plain")


@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_an_unknown_key_that_says_no_is_refused_too(value, tmp_path, tokenizer):
    chat = {"messages": [user("once?"), bot("two", calculate_loss=value)]}
    with pytest.raises(ValueError, match="the key `calculate_loss`"):
        prepared(tmp_path, tokenizer, chat, chat_template="plain")
    for nothing in (None, "", []):
        chat["messages"][1]["calculate_loss"] = nothing
        assert trained(prepared(tmp_path, tokenizer, chat, chat_template="plain"), tokenizer)


def test_a_key_that_the_template_writes_is_read(tmp_path, tokenizer):
    moody = "{% for m in messages %}{{ m.mood }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    row = {"messages": [user("q", mood="sad", name="Ada"), bot("a", mood="glad")]}
    made = prepared(tmp_path, tokenizer, row, chat_template=moody)
    assert "glad assistant: a" in whole(made, tokenizer)[0]
    reasons = (
        "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}/{{ m.content }}\n"
        "{% endfor %}"
    )
    row = {"messages": [user("q"), bot("a", reasoning_content="why")]}
    made = prepared(tmp_path, tokenizer, row, chat_template=reasons)
    assert "why/a" in "".join(trained(made, tokenizer))


@pytest.mark.parametrize("content", ["", None])
def test_a_function_call_is_a_tool_call(content, tmp_path, tokenizer):
    call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    chat = [
        user("weather?"),
        {"role": "assistant", "content": content, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "sunny"},
        bot("It is sunny"),
    ]
    for template in ("plain", "chatml"):
        made = prepared(tmp_path, tokenizer, {"messages": chat}, chat_template=template)
        said = "".join(trained(made, tokenizer))
        assert '"get_weather"' in said and '"city": "Rome"' in said and "It is sunny" in said
        assert "sunny" in whole(made, tokenizer)[0].split("It is")[0]
    deaf = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="message 1 has the key `tool_calls`"):
        prepared(tmp_path, tokenizer, {"messages": chat}, chat_template=deaf)
    with pytest.raises(ValueError, match="doesn't write the `tools` of this row"):
        prepared(
            tmp_path, tokenizer, {"messages": chat[:1] + chat[3:], "tools": [TOOL]},
            chat_template=deaf,
        )  # fmt: skip


def test_content_that_the_template_leaves_out_is_refused(tmp_path, tokenizer):
    """Llama 3.1's kind writes the calls of a message and not its content."""
    deaf = (
        "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": {}}}
    row = {"messages": [user("q"), bot("let me look", tool_calls=[call])]}
    with pytest.raises(ValueError, match="leaves out the content of message 1"):
        prepared(tmp_path, tokenizer, row, chat_template=deaf)


# -- roles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "chat"])
@pytest.mark.parametrize("asks, says", [("human", "gpt"), ("user", "model"), ("Human", "bot")])
@pytest.mark.parametrize("role, content", [("role", "content"), ("from", "value")])
def test_names_of_roles_and_keys(column, asks, says, role, content, tmp_path, tokenizer):
    chat = [{role: asks, content: "hello"}, {role: says, content: "good day"}]
    made = prepared(tmp_path, tokenizer, {column: chat}, chat_template="plain")
    assert whole(made, tokenizer)[0].startswith("<s>User: hello\n\nAssistant: good day</s>")
    assert trained(made, tokenizer) == ["good day</s>"]
    asked = prepared(tmp_path, tokenizer, {column: chat}, chat_template="plain", train_on={says})
    assert trained(asked, tokenizer) == ["good day</s>"]


def test_roles_that_train_nothing_are_named(tmp_path, tokenizer):
    chat = [{"role": "narrator", "content": "once"}, {"role": "hero", "content": "upon"}]
    with pytest.raises(ValueError, match="the roles found are `hero`, `narrator`"):
        prepared(tmp_path, tokenizer, {"messages": chat}, chat_template="plain")
    made = prepared(
        tmp_path, tokenizer, {"messages": chat}, chat_template="plain", train_on={"hero"}
    )
    assert "upon" in trained(made, tokenizer)[0]
    for wrong in ("asistant", "usr", "sytem"):
        with pytest.raises(ValueError, match=f"the role `{wrong}` is none of.*Did you mean"):
            row = {"messages": [{"role": wrong, "content": "a"}, bot("b")]}
            prepared(tmp_path, tokenizer, row, chat_template="plain")


def test_system_beside_the_turns(tmp_path, tokenizer):
    for column, chat in [
        ("messages", [user("hi"), bot("yes")]),
        ("conversations", [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]),
    ]:
        row = {column: chat, "system": "be brief"}
        made = prepared(tmp_path, tokenizer, row, chat_template="plain")
        assert whole(made, tokenizer)[0].startswith("<s>System: be brief\n\nUser: hi")
        assert made.report.unused_columns == ()
    twice = {"messages": [{"role": "system", "content": "be long"}, user("a"), bot("b")],
             "system": "be brief"}  # fmt: skip
    with pytest.raises(ValueError, match="begin with another system message"):
        prepared(tmp_path, tokenizer, twice, chat_template="plain")
    same = {"messages": [{"role": "system", "content": "be brief"}, user("a"), bot("b")],
            "system": "be brief"}  # fmt: skip
    made = prepared(tmp_path, tokenizer, same, chat_template="plain")
    assert whole(made, tokenizer)[0].count("be brief") == 1


# -- begin and end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<s>[INST] hi [/INST]", "completion": " yo</s>"},
        {"prompt": " <s>hi", "completion": " yo</s>\n"},
        {"text": "<s>once upon</s>"},
        {"text": "\n<s>once upon</s>\n\n"},
        {"instruction": "<s>add", "output": "3</s> "},
        {"question": "two?", "answer": "four</s>\n"},
        {"messages": [user("<s>hi"), bot("yo</s>")]},
        {"messages": [user(" <s>hi"), bot("yo</s>\n"), user("more"), bot("ya</s>")]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo</s>"}]},
    ],
    ids=lambda row: " ".join(row),
)
def test_begin_and_end_are_there_once(row, tmp_path, tokenizer):
    chat = {"chat_template": "plain"} if {"messages", "conversations"} & row.keys() else {}
    made = prepared(tmp_path, tokenizer, row, **chat)
    for ids in made.dataset["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id
        answers = sum(m["role"] == "assistant" for m in row.get("messages", [])) or 1
        text = tokenizer.decode(ids)
        assert ids.count(tokenizer.bos_token_id) == 1, text
        assert ids.count(tokenizer.eos_token_id) == answers, text
    assert trained(made, tokenizer)[-1].endswith("</s>")


@pytest.mark.parametrize("row", [
    {"question": "<s>once?", "answer": "two"},
    {"context": "<s> a fox", "question": " <s>once?", "answer": "two"},
    {"instruction": "<s>once", "input": "<s>a fox", "output": "two"},
])  # fmt: skip
def test_a_begin_behind_the_words_of_a_plain_format(row, tmp_path, tokenizer):
    (text,) = whole(prepared(tmp_path, tokenizer, row), tokenizer)
    assert text.startswith("<s>") and text.count("<s>") == 1


def test_begin_and_end_of_encoders(tokenizer, word_tokenizer):
    labelled = Dataset.from_dict({"text": ["[CLS] good film [SEP]", "bad"], "label": ["p", "n"]})
    made = prepare(labelled, word_tokenizer, max_length=16)
    assert made.dataset["input_ids"][0] == word_tokenizer("good film")["input_ids"]
    pair = Dataset.from_dict({"prompt": ["<s>two"], "completion": [" <s>four"]})
    made = prepare(pair, tokenizer, task="seq2seq-lm", max_length=16)
    assert made.dataset[0]["input_ids"] == tokenizer("two")["input_ids"]
    assert made.dataset[0]["labels"] == tokenizer("four")["input_ids"]


# -- the date --------------------------------------------------------------------------------------


def test_the_date_of_a_template_can_be_given_again(tmp_path, chatting):
    row = {"messages": [user("hi"), bot("yes")]}
    for text in (
        TEMPLATES["dated"].text,
        TEMPLATES["dated"].text.replace("'%d %b %Y'", '"%d %b %Y"'),
        # a computed format, and a macro that asks for the time
        "{% set how = '%d ' ~ '%b %Y' %}" + TEMPLATES["dated"].text.replace("'%d %b %Y'", "how"),
        "{% macro day(how) %}{{ strftime_now(format=how) }}{% endmacro %}"
        + TEMPLATES["dated"].text.replace("strftime_now('%d %b %Y')", "day('%d %b %Y')"),
    ):
        chatting.chat_template = text
        made = prepared(tmp_path, chatting, row, now=datetime(2024, 7, 26))
        assert "Today is 26 Jul 2024" in whole(made, chatting)[0]
        again = prepared(tmp_path, chatting, row, now=made.now)
        assert again.dataset.to_list() == made.dataset.to_list()
        today = prepared(tmp_path, chatting, row)
        assert datetime.now().strftime("%Y") in whole(today, chatting)[0] and today.now is not None
        assert made.chat_template is None, "the tokenizer keeps its own, which prints the day"
    chatting.chat_template = TEMPLATES["chatml"].text
    assert prepared(tmp_path, chatting, row).now is None


HARMFUL = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{% for i in range(10**9) %}{% endfor %}": "OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without an end",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{{ messages[0].content.nothing.at.all }}": "has no attribute",
    "{{ '\ud800' }}": "half a surrogate pair",
    "{{ 'a' * 10**10 }}": "more than 128 MiB of memory",
    "{{ 'a' * (2 * 10**7) }}": "its text has 20,000,000 characters",
    "{{ raise_exception('no\x1b[2J\u202e\nway' ~ 'x' * 999) }}": r"no\\u001b\[2J\\u202e\\nwayx+",
    "{{ messages | nothing }}": "No filter named 'nothing'",
}


@pytest.mark.parametrize("own", [True, False], ids=["tokenizer's", "given"])
@pytest.mark.parametrize("text", HARMFUL, ids=range(len(HARMFUL)))
def test_whatever_a_template_raises_is_told(chatting, text, own):
    if own:
        chatting.chat_template, text, why = text, None, HARMFUL[text]
    else:
        why = HARMFUL[text]
    with pytest.raises(ValueError, match="chat template .*" + why) as error:
        Prompter(chatting, "causal-lm", text).messages([user("hello")])
    assert type(error.value) is ValueError and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**7) }}",
        "{% set s = namespace(x=1) %}{% for i in range(9**5) %}{% set s.x = s.x * 7 %}{% endfor %}",
    ],
)
def test_a_template_without_an_end_is_stopped(chatting, text, monkeypatch):
    monkeypatch.setattr("lorica.data.bounded.PATIENCE", 0.2)
    with pytest.raises(ValueError, match="has not ended after"):
        Prompter(chatting, "causal-lm", text).messages([user("hello")])
    assert Prompter(chatting, "causal-lm", "chatml").messages([user("hello")])  # nothing is left


def test_templates_that_stay_below_each_bound_are_ended_by_the_sum(chatting, monkeypatch):
    """0.9 of a call's time or text, in each of 100,000 rows, would never end."""
    asked = [user("hello")]
    monkeypatch.setattr("lorica.data.bounded.PATIENCE", 0.5)
    slow = "{% for i in range(400) %}{% for j in range(999) %}{% endfor %}{% endfor %}x"
    prompter = Prompter(chatting, "causal-lm", slow + "{{ messages[0].content }}")
    with pytest.raises(
        ValueError, match="takes more than 4 ms a message again and again|not ended"
    ):
        for _ in range(1000):
            prompter.messages(asked)
    monkeypatch.setattr("lorica.data.bounded.PATIENCE", 5.0)
    long = Prompter(chatting, "causal-lm", "{{ 'a' * 10**6 }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="writes more than 20,000 characters a message"):
        for _ in range(1000):
            long.form._text(asked, None, prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_use_a_small_part_of_what_they_may(chatting, name):
    chatting.chat_template = TEMPLATES[name].text
    form = Prompter(chatting, "causal-lm").form
    turns = [user("hello"), bot("good day"), user("and so on " * 20)]
    form._text(turns, None, prompt=True)  # compiles it
    began = time.thread_time()
    for _ in range(20):
        form._text(turns, None, prompt=True)
    earned = 20 * SECONDS_PER_PART * (1 + len(turns))
    assert time.thread_time() - began < earned / 3


def test_a_template_files_own_faults(chatting, tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(ValueError, match="a.jinja: it is no UTF-8 text. Name a file"):
        Prompter(chatting, "causal-lm", str(tmp_path / "a.jinja"))
