"""lorica.inference.evaluate: exact sums whatever the batches, figures as elsewhere, exact match."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForTokenClassification

from lorica.data import Labels, prepare
from lorica.inference import evaluate as module
from lorica.inference import metrics
from lorica.inference.evaluate import evaluate, exact_match, figures
from lorica.inference.generate import Answer, Prompt, Prompter
from models import bert, gpt2, llama, t5
from test_generate import SIZE, make_tokenizer

MAKERS = {
    "llama": lambda: llama(vocab_size=SIZE, max_position_embeddings=256),
    "gpt2": lambda: gpt2(vocab_size=SIZE, n_positions=256, bos_token_id=1, eos_token_id=2),
    "t5": lambda: t5(vocab_size=SIZE, eos_token_id=2, pad_token_id=0),
}
PAIRS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": "a question of some length", "completion": "yes"},
    {"prompt": "short", "completion": "an answer that goes on and on and on, much longer"},
    {"prompt": "x y z", "completion": "é€"},
    {"prompt": "", "completion": "nothing was asked"},
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def plain_loop(model, rows) -> tuple[float, int, list[float]]:
    """(nats, label tokens, means of the rows), a row at a time without padding, in float64."""
    total, count, means = 0.0, 0, []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(input_ids=ids, labels=labels).logits[0]
                wanted = labels[0]
            else:
                logits, wanted = model(input_ids=ids).logits[0, :-1], labels[0, 1:]
        logp = logits.double().log_softmax(-1)
        nats = [-float(logp[i, w]) for i, w in enumerate(wanted.tolist()) if w != -100]
        total, count = total + sum(nats), count + len(nats)
        means.append(sum(nats) / len(nats))
    return total, count, means


@pytest.mark.parametrize("name", MAKERS)
def test_the_loss_weighs_every_label_token_alike(tokenizer, name):
    model = MAKERS[name]().train()
    task = "seq2seq-lm" if name == "t5" else "causal-lm"
    rows = [row for row in PAIRS if row["prompt"]]
    ready = prepare(Dataset.from_list(rows), tokenizer, max_length=200, task=task)
    total, count, means = plain_loop(model.eval(), ready.dataset)
    model.train()
    assert count == ready.report.label_tokens
    assert abs(total / count - np.mean(means)) > 1e-3, "the mean of means is another number"
    for size in (1, 2, 8):
        found = evaluate(model, ready, tokenizer, batch_size=size)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
        assert found["perplexity"] == math.exp(found["loss"])
        letters = sum(len(row["completion"]) for row in rows)
        octets = sum(len(row["completion"].encode()) for row in rows)
        assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / octets, rel=1e-5)
        assert found["bits_per_character"] == pytest.approx(total / math.log(2) / letters, rel=1e-5)
    assert tuple(found) == figures(task, None)
    assert model.training


def test_documents_in_several_rows_count_the_text_that_is_predicted(tokenizer):
    model = MAKERS["llama"]()
    text = "once upon a time there was a cat"
    ready = prepare(Dataset.from_dict({"text": [text]}), tokenizer, max_length=10)
    assert len(ready.dataset) > 1
    total, _, _ = plain_loop(model, ready.dataset)
    first = len(ready.dataset) - 1  # the first of a row isn't predicted; of the first row it's <s>
    found = evaluate(model, ready, tokenizer)
    assert found["bits_per_byte"] == pytest.approx(
        total / math.log(2) / (len(text) - first), rel=1e-5
    )


def test_packed_rows_have_the_same_loss(tokenizer):
    model = MAKERS["llama"]()
    data = Dataset.from_list(PAIRS)
    found = [
        evaluate(model, prepare(data, tokenizer, max_length=120, packing=how), tokenizer)
        for how in ("none", "best_fit")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert model.config.use_cache


# -- classes and figures ---------------------------------------------------------------------------


def _texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return ["".join(draw.choice(list("abcdefg "), draw.integers(2, 30))) for _ in range(count)]


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_agrees_with_scikit_learn(tokenizer, classes):
    sk = pytest.importorskip("sklearn.metrics")
    model = bert(vocab_size=SIZE, num_labels=classes)
    texts, draw = _texts(40), np.random.default_rng(1)
    data = Dataset.from_dict({"text": texts, "label": draw.integers(0, classes, 40).tolist()})
    ready = prepare(data, tokenizer, max_length=64, labels=Labels.from_num_labels(classes))
    found = evaluate(model, ready, tokenizer, batch_size=7)
    logits = []
    with torch.no_grad():
        for row in ready.dataset:
            logits.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0])
    true, scores = torch.tensor(ready.dataset["labels"]), torch.stack(logits)
    said = scores.argmax(-1)
    assert len(said.unique()) > 1
    kind = "binary" if classes == 2 else "macro"
    assert found == pytest.approx(
        {
            "loss": float(torch.nn.functional.cross_entropy(scores, true)),
            "accuracy": sk.accuracy_score(true, said),
            "f1": sk.f1_score(true, said, average=kind),
            "matthews": sk.matthews_corrcoef(true, said),
            "f1_macro": sk.f1_score(true, said, average="macro"),
        },
        rel=1e-5,
    )
    assert set(found) == set(figures(ready.report.task, ready.labels))


def test_regression_agrees_with_scipy(tokenizer):
    stats = pytest.importorskip("scipy.stats")
    model = bert(vocab_size=SIZE, num_labels=1)
    true = np.random.default_rng(1).normal(size=30).round(1)
    data = Dataset.from_dict({"text": _texts(30), "label": true.tolist()})
    ready = prepare(data, tokenizer, max_length=64)
    found = evaluate(model, ready, tokenizer, batch_size=7)
    with torch.no_grad():
        said = [
            float(model(input_ids=torch.tensor([r["input_ids"]])).logits) for r in ready.dataset
        ]
    assert found["loss"] == pytest.approx(found["mse"])
    assert found["mse"] == pytest.approx(np.mean((np.array(said) - true) ** 2), rel=1e-5)
    assert found["pearson"] == pytest.approx(stats.pearsonr(said, true).statistic, rel=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(said, true).statistic, rel=1e-5)
    assert set(found) == set(figures(ready.report.task, ready.labels))


def test_tags_leave_the_ignored_aside(tokenizer):
    torch.manual_seed(0)
    model = BertForTokenClassification(bert(vocab_size=SIZE, num_labels=3).config).eval()
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    rows = [
        {"tokens": ["ab", "c"], "tags": [0, 2]},
        {"tokens": ["d", "ef", "g"], "tags": [1, 1, 0]},
    ]
    labels = Labels.from_num_labels(3)
    ready = prepare(Dataset.from_list(rows), tokenizer, max_length=64, labels=labels)
    found = evaluate(model, ready, tokenizer)
    hits = nats = count = 0
    with torch.no_grad():
        for row in ready.dataset:
            logp = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for line, label in zip(logp, row["labels"], strict=True):
                if label != -100:
                    hits, count = hits + int(line.argmax() == label), count + 1
                    nats -= float(line[label])
    assert count == 5
    assert found["accuracy"] == hits / count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert set(found) == set(figures(ready.report.task, ready.labels))


def test_tags_of_spans_are_counted_whole(tokenizer):
    """Batches of sentences of other lengths give what all sentences at once give."""
    names = ("O", "B-PER", "I-PER", "B-LOC")
    model = BertForTokenClassification(bert(vocab_size=SIZE, num_labels=4).config).eval()
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    draw = np.random.default_rng(0)
    rows = [
        {
            "tokens": ["".join(draw.choice(list("abcdefg"), 3)) for _ in range(n)],
            "tags": draw.integers(0, 4, n).tolist(),
        }
        for n in (3, 9, 1, 6, 12)
    ]
    ready = prepare(Dataset.from_list(rows), tokenizer, max_length=96, labels=Labels(names))
    pairs = []
    with torch.no_grad():
        for row in ready.dataset:
            said = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
            kept = [
                (names[p], names[t]) for p, t in zip(said, row["labels"], strict=True) if t != -100
            ]
            pairs.append(tuple(zip(*kept, strict=True)))
    wanted = metrics.span_figures(*zip(*pairs, strict=True))
    assert wanted["recall"] > 0
    for size in (1, 2, 8):
        found = evaluate(model, ready, tokenizer, batch_size=size)
        assert {name: found[name] for name in wanted} == wanted
        assert set(found) == set(figures(ready.report.task, ready.labels))


@pytest.mark.parametrize(
    "tags, found",
    [
        ("O O", []),
        ("B-a I-a O I-a", [("a", 0, 2), ("a", 3, 4)]),  # IOB1 begins with I-
        ("I-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),  # IOB1's B-: a neighbour of the same type
        ("I-a I-b", [("a", 0, 1), ("b", 1, 2)]),
        ("B-a E-a S-a B-b", [("a", 0, 2), ("a", 2, 3), ("b", 3, 4)]),  # BIOES
        ("B-a L-a U-a I-a", [("a", 0, 2), ("a", 2, 3), ("a", 3, 4)]),  # BILOU
        ("S-a I-a E-a E-a", [("a", 0, 1), ("a", 1, 3), ("a", 3, 4)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
        ("B-O I-O", [("O", 0, 2)]),
    ],
)
def test_spans_of_every_scheme(tags, found):
    assert sorted(metrics.spans(tags.split()), key=lambda span: span[1:]) == found


def test_span_figures_in_closed_form():
    true = [["B-a", "I-a", "O", "B-b"], ["B-a", "O"], ["O"]]
    said = [["B-a", "I-a", "O", "B-a"], ["B-a", "I-a"], ["B-b"]]
    # One of four said is right (the first): a wrong type, a wrong end, and one that isn't there.
    got = metrics.span_figures(said, true)
    assert got == {"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7}
    assert metrics.span_figures([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}
    assert metrics.span_figures(true, true)["f1"] == 1


@pytest.mark.parametrize(
    "names, marks",
    [
        (["O", "B-PER", "I-PER"], True),
        (["O", "I-PER"], True),
        (["O", "S-PER"], False),
        (["B-PER", "X-PER"], False),
        (["NOUN", "I", "O"], False),
        (["0", "1"], False),
    ],
)
def test_which_tags_mark_spans(names, marks):
    assert metrics.mark_spans(names) is marks


@pytest.mark.parametrize("share, best", [(0.5, "accuracy"), (0.6, "accuracy"), (0.61, "matthews")])
def test_accuracy_decides_only_where_classes_are_balanced(share, best):
    labels = np.repeat([0, 1, -100], [round(100 * share), 100 - round(100 * share), 30])
    assert metrics.majority(labels) == share
    scores = metrics.Scores("sequence-classification", ("a", "b"), metrics.majority(labels))
    assert scores.best == (best, True)
    assert ("61% of the training labels" in scores.why) == (best == "matthews")


def test_one_class_for_everything_is_named(tokenizer, caplog):
    model = bert(vocab_size=SIZE, num_labels=2)
    texts = _texts(10)
    labels = Labels(("no", "yes"))
    data = Dataset.from_dict({"text": texts, "label": [1] * 7 + [0] * 3})
    ready = prepare(data, tokenizer, max_length=64, labels=labels)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 1.0])
    told: list[metrics.Degenerate] = []
    found = evaluate(model, ready, tokenizer, batch_size=3, on_degenerate=told.append)
    assert found["accuracy"] == 0.7 and found["matthews"] == 0
    [alike] = told
    assert alike.as_dict() == {"class": "yes", "share": 0.7} and alike.predictions == 10
    assert not caplog.records
    evaluate(model, ready, tokenizer)
    assert "all 10 predictions are `yes`, which 70% of the labels are" in caplog.text
    only = prepare(data.select(range(7)), tokenizer, max_length=64, labels=labels)
    evaluate(model, only, tokenizer, on_degenerate=told.append)
    assert len(told) == 1, "where there is one class only, one answer is right"


def test_what_cannot_be_measured_is_refused(tokenizer):
    data = Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]})
    ready = prepare(data, tokenizer, max_length=8)
    with pytest.raises(ValueError, match="head has 2 outputs, and the data 3 classes"):
        evaluate(bert(vocab_size=SIZE, num_labels=2), ready, tokenizer)
    model = MAKERS["llama"]()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    pairs = prepare(Dataset.from_list(PAIRS), tokenizer, max_length=200)
    with pytest.raises(ValueError, match="the loss is nan"):
        evaluate(model, pairs, tokenizer)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        evaluate(model, pairs, tokenizer, batch_size=0)


# -- exact match -----------------------------------------------------------------------------------


def says(monkeypatch, *texts: str, stopped: str = "eos") -> None:
    answers = [[Answer(text, (), stopped)] for text in texts]
    monkeypatch.setattr(module, "generate", lambda model, tokenizer, prompts, *_, **__: answers)


def asks(*references: str | None) -> list[Prompt]:
    return [Prompt((1,), "?", reference, f"line {i}") for i, reference in enumerate(references, 1)]


def test_answers_are_compared_stripped(monkeypatch, tokenizer):
    model = MAKERS["llama"]()
    says(monkeypatch, " four\n", "Four", "four.")
    found = exact_match(model, tokenizer, asks("four", "four", "four"))
    assert (found.matched, found.examples, found.rate) == (1, 3, 1 / 3)
    assert (found.unfinished, found.too_long) == (0, 0)


@pytest.mark.parametrize(
    "pattern, answer, matched",
    [
        (r"#### (.+)", "2+2\n#### 5\nno:\n#### 4", True),  # the last match, its group
        (r"#### (.+)", "#### 4\n#### 5", False),
        (r"#### (.+)", "4", False),
        (r"-?\d+", "so it is 3 or 4.", True),  # without a group the whole match
        (r"#### (?:(-)|(\d))", "#### -", True),
    ],
)
def test_a_pattern_says_what_is_compared(monkeypatch, tokenizer, pattern, answer, matched):
    says(monkeypatch, answer, stopped="max_new_tokens")
    reference = "#### -" if "?:" in pattern else "two and two\n#### 4"
    found = exact_match(MAKERS["llama"](), tokenizer, asks(reference), answer_pattern=pattern)
    assert found.matched == matched and found.unfinished == 1


def test_references_are_looked_at_before_anything_is_generated(monkeypatch, tokenizer):
    monkeypatch.setattr(module, "generate", None)
    model = MAKERS["llama"]()
    with pytest.raises(ValueError, match="line 2: there is no answer"):
        exact_match(model, tokenizer, asks("4", None))
    with pytest.raises(ValueError, match="line 1: .*doesn't match the data's own answer"):
        exact_match(model, tokenizer, asks("4"), answer_pattern="#### (.+)")
    with pytest.raises(ValueError, match="is no regular expression"):
        exact_match(model, tokenizer, asks("4"), answer_pattern="(")


def test_a_model_that_learnt_its_answers_matches_them(tokenizer):
    """Trained on four pairs until it knows them: what is asked is what was trained."""
    rows = [
        {"question": "one", "answer": "uno"}, {"question": "two", "answer": "dos"},
        {"question": "three", "answer": "tres"}, {"question": "x" * 300, "answer": "long"},
    ]  # fmt: skip
    model = llama(vocab_size=SIZE, max_position_embeddings=256, initializer_range=0.02)
    data = Dataset.from_list(rows)
    ready = prepare(data.select(range(3)), tokenizer, max_length=200)
    batch = ready.collator()(list(ready.dataset))
    prompts = Prompter(tokenizer, "causal-lm").rows(data)
    assert exact_match(model, tokenizer, prompts, max_new_tokens=8).matched == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = exact_match(model, tokenizer, prompts, max_new_tokens=8)
    assert found.matched == 3 and found.examples == 4
    assert found.too_long == 1 and found.unfinished == 0
