"""Generation: prompts are training's; batches, streams and merging change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import lorica
from lorica.data import prepare
from lorica.inference.generate import Answer, Decoding, Prompter, generate, language_task, room
from models import bert, gpt2, llama, perturb, t5

SPECIAL = ("<pad>", "<s>", "</s>")
MARKS = ("<|im_start|>", "<|im_end|>")


def make_tokenizer(special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """A token a byte, <s> before a text; nothing has to be trained."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    backend = Tokenizer(token_models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=list(special[3:]),
    )  # fmt: skip


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


SIZE = 259
MAKERS = {
    "llama": lambda: llama(vocab_size=SIZE, max_position_embeddings=128),
    "gpt2": lambda: gpt2(vocab_size=SIZE, n_positions=128, bos_token_id=1, eos_token_id=2),
    "t5": lambda: t5(vocab_size=SIZE, eos_token_id=2),
}
TEXTS = ["one", "a much longer prompt than the others", "two words", "", "the end"]


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]()


def ask(model, tokenizer, texts=TEXTS, **how):
    prompts = Prompter(tokenizer, language_task(model.config)).texts(texts)
    batch_size = how.pop("batch_size", 8)
    return generate(model, tokenizer, prompts, Decoding(**how), batch_size=batch_size)


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"repetition_penalty": 1.3}, {"stop_strings": ("e", "\ufffd")}]
)
def test_greedy_answers_do_not_depend_on_the_batches(model, tokenizer, how):
    texts = [text for text in TEXTS if text or not model.config.is_encoder_decoder]
    alone = ask(model, tokenizer, texts, max_new_tokens=12, batch_size=1, **how)
    for size in (2, 3, 8):
        assert ask(model, tokenizer, texts, max_new_tokens=12, batch_size=size, **how) == alone
    assert len({answers[0].ids for answers in alone}) > 1, "the model says more than one thing"


def test_one_greedy_answer_is_transformers_own(model, tokenizer):
    ids = tokenizer("two words", return_tensors="pt")
    ids.pop("token_type_ids", None)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    start = 1 if model.config.is_encoder_decoder else ids["input_ids"].shape[1]
    new = out[0, start:].tolist()
    new = new[: new.index(2)] if 2 in new else new
    [[answer]] = ask(model, tokenizer, ["two words"], max_new_tokens=12)
    assert list(answer.ids) == new


@pytest.mark.parametrize("method", ["lora", "dora+olora"])
def test_merged_answers_are_the_adapted_ones(model, tokenizer, method):
    plain = ask(model, tokenizer, ["one", "two words"], max_new_tokens=12)
    adapters = lorica.attach(model, method, r=4, verbose=False)
    perturb(adapters)
    adapted = ask(model, tokenizer, ["one", "two words"], max_new_tokens=12)
    with adapters.disabled():
        assert ask(model, tokenizer, ["one", "two words"], max_new_tokens=12) == plain
    assert adapted != plain
    assert ask(lorica.merge(model), tokenizer, ["one", "two words"], max_new_tokens=12) == adapted


def test_nothing_is_changed_behind_ones_back(tokenizer):
    model = MAKERS["llama"]().train()
    model.generation_config.temperature = 0.1
    settings = model.generation_config.to_dict()
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.chat_template)
    state = torch.get_rng_state()
    ask(model, tokenizer, do_sample=True, max_new_tokens=3)
    assert model.training and model.generation_config.to_dict() == settings
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.chat_template) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MAKERS)
def test_padding_brings_no_token_that_a_penalty_could_see(tokenizer, name, monkeypatch):
    """transformers' repetition penalty looks at masked tokens too, EOS as padding among them."""
    model, seen = MAKERS[name](), {}
    generates = type(model).generate

    def spy(self, **given):
        seen.update(given)
        return generates(self, **given)

    monkeypatch.setattr(type(model), "generate", spy)
    ask(model, tokenizer, ["one", "two words"], max_new_tokens=1)
    for ids, mask in zip(seen["input_ids"], seen["attention_mask"], strict=True):
        assert set(ids[mask == 0].tolist()) <= set(ids[mask == 1].tolist())
    assert (seen["attention_mask"] == 0).any()


def test_the_checkpoints_sampling_settings_are_not_used(tokenizer):
    model = MAKERS["llama"]()
    plain = ask(model, tokenizer, max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=2.0)
    assert ask(model, tokenizer, max_new_tokens=8) == plain


def test_draws_follow_the_seed_and_the_options(tokenizer):
    model = MAKERS["llama"]()

    def draw(**how):
        return ask(model, tokenizer, ["one"], max_new_tokens=20, **how)

    hot = {"temperature": 2.0, "num_return_sequences": 3}
    assert draw(**hot, seed=1) == draw(**hot, seed=1) != draw(**hot, seed=2)
    assert len({answer.ids for answer in draw(**hot)[0]}) == 3
    assert draw(top_k=1) == draw(top_p=1e-6) == draw(temperature=1e-4) == draw()
    beams = ask(model, tokenizer, ["one"], num_beams=3, num_return_sequences=3, max_new_tokens=6)
    assert len({answer.ids for answer in beams[0]}) == 3


def test_an_answer_ends_before_its_stop(tokenizer):
    model = MAKERS["llama"]()
    free = ask(model, tokenizer, ["one"], max_new_tokens=30)[0][0]
    assert free.stopped == "max_new_tokens" and not free.finished and len(free.ids) == 30
    middle = free.text[3:5]  # two tokens at least: it is found across them
    stopped = ask(model, tokenizer, ["one"], max_new_tokens=30, stop_strings=(middle,))[0][0]
    assert stopped.finished and stopped.stopped == "stop"
    assert stopped.text == free.text[: free.text.index(middle)]
    assert stopped.ids == free.ids[: len(stopped.ids)] and len(stopped.ids) < 30


def test_every_end_of_the_checkpoint_ends_an_answer(tokenizer):
    model = MAKERS["llama"]()
    free = ask(model, tokenizer, ["one"], max_new_tokens=30)[0][0]
    end = free.ids[5]
    model.generation_config.eos_token_id = [2, end]
    [[answer]] = ask(model, tokenizer, ["one"], max_new_tokens=30)
    assert answer.stopped == "eos" and answer.ids == free.ids[: free.ids.index(end)]
    assert answer == ask(model, tokenizer, ["one", "two"], max_new_tokens=30)[0][0]


def test_tokens_that_the_checkpoint_forbids_are_not_said(tokenizer):
    model = MAKERS["t5"]()
    [[free]] = ask(model, tokenizer, ["one"], max_new_tokens=8)
    model.generation_config.bad_words_ids = [[free.ids[0]]]
    [[answer]] = ask(model, tokenizer, ["one"], max_new_tokens=8)
    assert free.ids[0] not in answer.ids
    model.generation_config.bad_words_ids = None
    model.generation_config.begin_suppress_tokens = [free.ids[0]]
    [[answer]] = ask(model, tokenizer, ["one"], max_new_tokens=8)
    assert answer.ids[0] != free.ids[0]


def test_room_ends_with_the_positions(tokenizer):
    model = MAKERS["gpt2"]()
    texts = ["x" * 110, "short"]
    one, other = (answers[0] for answers in ask(model, tokenizer, texts, max_new_tokens=40))
    assert len(one.ids) == 128 - 111 and one.stopped == "positions"
    assert len(other.ids) == 40 and other.stopped == "max_new_tokens"
    prompt = Prompter(tokenizer, "causal-lm").texts(["x" * 127])[0]
    assert room(model, tokenizer, prompt, Decoding()) == 0
    with pytest.raises(ValueError, match="128 tokens.*no room for an answer"):
        ask(model, tokenizer, ["x" * 127])


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(), ("ab", "\ufffd\ufffd"), ("zzzz",)])
def test_a_stream_adds_up_to_the_answer(model, tokenizer, stops):
    drawn = {"max_new_tokens": 60, "temperature": 3.0, "top_k": 0}  # else a tiny T5 repeats itself
    if stops:  # one that occurs, too
        text = ask(model, tokenizer, ["one"], **drawn)[0][0].text
        stops = (*stops, text[20:23])
    how = Decoding(stop_strings=stops, **drawn)
    prompts = Prompter(tokenizer, language_task(model.config)).texts(["one"])
    bits: list[str] = []
    [[streamed]] = generate(model, tokenizer, prompts, how, on_text=bits.append)
    assert generate(model, tokenizer, prompts, how) == [[streamed]]
    assert "".join(bits) == streamed.text
    assert all(bits) and len(bits) > 1


def test_half_a_character_waits(tokenizer):
    model = MAKERS["llama"]()
    said = tokenizer("né €!", add_special_tokens=False)["input_ids"]

    def fake(input_ids, streamer, **_):
        streamer.put(input_ids)
        for token in said:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.tensor([[*input_ids[0].tolist(), *said, 2]])

    model.generate = fake
    bits: list[str] = []
    prompts = Prompter(tokenizer, "causal-lm").texts(["one"])
    [[answer]] = generate(model, tokenizer, prompts, on_text=bits.append)
    assert answer == Answer("né €!", tuple(said), "eos")
    assert bits == ["n", "é", " ", "€", "!"]


# -- prompts are training's ------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "what is two and two"},
    {"role": "assistant", "content": "four"},
]
SHARE = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "four"}]
MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ROWS = {
    "prompt-completion": ({"prompt": "2+2=", "completion": "four"}, None),
    "prompt messages": ({"prompt": CHAT[:4], "completion": CHAT[4:]}, "chatml"),
    "alpaca": (
        {
            "instruction": "add", "input": "2 2", "output": "four", "system": "be kind",
            "history": [["hi", "ho"]],
        },
        None,
    ),
    "alpaca chat": ({"instruction": "add", "output": "four", "history": [["hi", "ho"]]}, "plain"),
    "question-answer": ({"question": "2+2?", "answer": "four"}, None),
    "question-answer chat": ({"question": "2+2?", "answer": "four"}, "chatml"),
    "messages plain": ({"messages": CHAT}, "plain"),
    "messages chatml": ({"messages": CHAT}, "chatml"),
    "messages marked": ({"messages": CHAT}, MARKED),
    "conversations": ({"conversations": SHARE}, "plain"),
    "tokenised": ({"input_ids": [1, 5, 6, 7, 8], "labels": [-100, -100, 6, -100, 8]}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_what_training_has_before_the_answer(tokenizer, name):
    row, template = ROWS[name]
    data = Dataset.from_list([row])
    how = {} if template is None else {"chat_template": template}
    [trained] = prepare(data, tokenizer, max_length=500, **how).dataset
    learnt = [label != -100 for label in trained["labels"]]
    last = len(learnt) - learnt[::-1].index(True)  # the end of the last trained run, and its start
    first = last - (learnt[:last][::-1].index(False))
    [prompt] = Prompter(tokenizer, "causal-lm", template).rows(data)
    assert list(prompt.ids) == trained["input_ids"][:first]
    if name != "tokenised":
        assert (prompt.reference or "").strip() == "four"
        bare = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        assert prompt.text.replace("<s>", "").replace("</s>", "") == bare


def test_an_encoder_reads_what_it_read_in_training(tokenizer):
    data = Dataset.from_list([{"instruction": "add", "input": "2 2", "output": "four"}])
    [trained] = prepare(data, tokenizer, max_length=500, task="seq2seq-lm").dataset
    [prompt] = Prompter(tokenizer, "seq2seq-lm").rows(data)
    assert list(prompt.ids) == trained["input_ids"] and prompt.reference == "four"


@pytest.mark.parametrize(
    "row, text",
    [
        ({"prompt": "2+2="}, "2+2="),
        ({"question": "2+2?"}, "Question: 2+2?\nAnswer:"),
        (
            {"instruction": "add"},
            "Here is a task. Write a response that carries it out.\n\n"
            "### Instruction:\nadd\n\n### Response:\n",
        ),
        ({"text": "once"}, "once"),
        ({"prompt": CHAT[:2]}, "<s>System: be kind\n\nUser: hello\n\nAssistant: "),
        ({"messages": CHAT[:2]}, "<s>System: be kind\n\nUser: hello\n\nAssistant: "),
    ],
)
def test_answers_may_be_absent(tokenizer, row, text):
    template = "plain" if isinstance(next(iter(row.values())), list) else None
    [prompt] = Prompter(tokenizer, "causal-lm", template).rows(Dataset.from_list([row]))
    assert prompt.text == text and prompt.reference is None


def test_what_a_template_writes_behind_an_answer_ends_it():
    plain, marked = make_tokenizer(), make_tokenizer((*SPECIAL, *MARKS))
    spelt = Prompter(plain, "causal-lm", "chatml").messages(CHAT[:2])
    assert spelt.stops == ("<|im_end|>",) and spelt.ends == ()
    token = Prompter(marked, "causal-lm", "chatml").messages(CHAT[:2])
    assert token.stops == () and token.ends == (marked.convert_tokens_to_ids("<|im_end|>"),)
    eos = Prompter(plain, "causal-lm", "plain").messages(CHAT[:2])
    assert eos.stops == () and eos.ends == (2,)


def test_a_template_that_rewrites_earlier_turns_still_makes_a_prompt(tokenizer):
    """Training refuses it, as nothing then tells what to train; asking needs no such thing."""
    last = "{{ messages[-1]['content'] }} after {{ messages | length }}"
    prompt = Prompter(tokenizer, "causal-lm", last).messages(CHAT[:4])
    assert prompt.text == "what is two and two after 4"
    assert tokenizer.decode(prompt.ids) == prompt.text


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, part",
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"temperature": 0.0}, "for greedy answers leave it out"),
        ({"top_k": -1}, "0 for all"),
        ({"top_p": 1.5}, "at most 1"),
        ({"num_beams": 0}, "at least 1"),
        ({"repetition_penalty": -1.0}, "above 0"),
        ({"num_return_sequences": 2}, "draw them with `do_sample`"),
        ({"stop_strings": ("",)}, "a character at least"),
        ({"seed": -1}, "from 0"),
    ],
)
def test_options_out_of_range_are_refused(how, part):
    with pytest.raises(ValueError, match=part):
        Decoding(**how)


def test_what_cannot_be_asked_is_refused(tokenizer):
    model = MAKERS["llama"]()
    causal = Prompter(tokenizer, "causal-lm")
    two = causal.texts(["a", "b"])
    with pytest.raises(ValueError, match="one greedy or drawn answer"):
        generate(model, tokenizer, two, on_text=print)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        generate(model, tokenizer, two, batch_size=0)
    with pytest.raises(ValueError, match="BertForSequenceClassification generates no text"):
        generate(bert(vocab_size=SIZE), tokenizer, two)
    with pytest.raises(ValueError, match="this tokenizer has none"):
        causal.messages(CHAT[:2])
    with pytest.raises(ValueError, match="asked of a causal model"):
        Prompter(tokenizer, "seq2seq-lm", "plain").messages(CHAT[:2])
    with pytest.raises(ValueError, match="no shape of data"):
        causal.rows(Dataset.from_list([{"nothing": "here"}]))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        Prompter(tokenizer, "causal-lm").texts(["a", ""])


def test_mixed_prompt_messages_are_json_text_too(tokenizer):
    """Arrow can't hold lists of unlike objects unchanged: they arrive as marked JSON text."""
    rows = [{"prompt": "\x1e" + json.dumps(CHAT[:2])}]
    [prompt] = Prompter(tokenizer, "causal-lm", "plain").rows(Dataset.from_list(rows))
    assert prompt.text.endswith("User: hello\n\nAssistant: ")


def test_ids_beyond_the_table_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = llama(vocab_size=SIZE, max_position_embeddings=64)
    asks = Prompter(tokenizer, "causal-lm").texts(["once", "a <new> day"])
    with pytest.raises(ValueError, match=rf"prompt 2: it has the token id {SIZE} \(`<new>`\)"):
        generate(model, tokenizer, asks, Decoding(max_new_tokens=1))
    assert len(generate(model, tokenizer, asks[:1], Decoding(max_new_tokens=1))) == 1
