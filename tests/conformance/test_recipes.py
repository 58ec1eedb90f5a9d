"""What holds for every word: its text, its declarations, its company, its trajectory."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from swap_often import SwapOften
from torch import nn
from walk import Chain, attach, every, recipe

import lorica
from lorica import Recipe
from lorica.methods.optional import StartsFromUnquantised
from lorica.recipe import registry
from models import batch, llama, logits, train

WORDS = [word for _, word in every()]
PAIRS = list(itertools.combinations(WORDS, 2))


@pytest.mark.parametrize("word", WORDS)
def test_text_object_and_json_are_one(word):
    made = recipe(word, r=4)
    again = Recipe.parse(made.text(), rank_pattern=made.rank_pattern)
    assert again.choices == Recipe.parse(word).choices
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert Recipe.parse({word: {}}) == Recipe.parse(word), "the YAML form"
    for spelling in (word.upper(), f" {word} ", f"{word}()", "-".join(word), "_".join(word)):
        assert Recipe.parse(spelling) == Recipe.parse(word)
    assert made == dataclasses.replace(made)


@pytest.mark.parametrize(("room", "word"), every())
def test_every_argument_can_be_written_and_read(room, word):
    cls = registry.find(word)
    for f in dataclasses.fields(cls):
        text = f"{word}({f.name}={f.default!r})"
        assert Recipe.parse(text) == Recipe.parse(word), "the default, given"
    with pytest.raises(ValueError, match=f"`{word}` has no argument `nonsense`"):
        Recipe.parse(f"{word}(nonsense=1)")


@pytest.mark.parametrize(("room", "word"), every())
def test_declarations(room, word):
    cls = registry.find(word)
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls.axis == room
    for capability in cls.gives | cls.needs | cls.withdraws:
        assert capability in registry.CAPABILITIES, capability
    assert not cls.gives & cls.withdraws and not cls.needs & cls.withdraws - {"base_unchanged"}
    assert set(cls.preset) <= set(registry.AXES) and cls.requires <= set(cls.preset)
    for other_room, text in cls.preset.items():
        # One that nothing may replace may need what the method gives.
        beside = f"{word}+{text}" if other_room in cls.requires else text
        assert Recipe.parse(beside), (other_room, text)
    choice = cls()
    assert choice == cls() and choice.name == word and choice.text() == word
    assert choice in Recipe.parse(word).choices


@pytest.mark.parametrize("word", WORDS)
def test_defaults_are_there_and_say_whose_they_are(word):
    made = Recipe.parse(word)
    rate, source = made.learning_rate
    assert 0 < rate < 1 and source in {c.name for c in made.choices}
    for name, (value, by) in made.filled.items():
        assert getattr(made, name) == value
        assert by == "Lorica" or by in {c.name for c in made.choices}


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_words_stand_together_or_the_error_names_both_and_a_way_out(pair):
    a, b = pair
    room_a, room_b = registry.axis_of(a), registry.axis_of(b)
    try:
        made = Recipe.parse(f"{a}+{b}")
    except ValueError as error:
        text = str(error)
        assert f"`{a}`" in text and f"`{b}`" in text, text
        assert any(hint in text for hint in ("name one of", "Leave one", "leave one")), text
        together = registry.find(a).needs | registry.find(b).needs
        given = Recipe.parse(a).given() & Recipe.parse(b).given()
        one_axis = room_a == room_b and not registry.AXES[room_a][2]
        presets = set(registry.find(a).preset) | set(registry.find(b).preset)
        edits = [registry.find(w).edits for w in pair if registry.axis_of(w) == "schedules"]
        shared = len(edits) == 2 and edits[0] & edits[1]
        fixed = any(registry.find(w).only_r for w in pair)
        reasons = (one_axis, together - given, presets, shared, fixed)
        assert any(reasons), "refused without a reason"
        return
    assert room_a != room_b or registry.AXES[room_a][2], "one axis, two words"
    reordered = Recipe.parse(f"{b}+{a}")
    assert {c.name for c in made.choices} == {c.name for c in reordered.choices}
    torch.manual_seed(0)
    model = Chain(a=nn.Linear(12, 12), b=nn.Linear(12, 12))
    adapters = attach(model, recipe(f"{a}+{b}", r=4))
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=20)
    before = adapters.fingerprint()
    model(torch.randn(3, 12)).square().sum().backward()
    optimizer.step()
    assert adapters.fingerprint() != before


# -- every word does something of its own ----------------------------------------------------------


def effective(word: str, **fields) -> torch.Tensor:
    """All effective weights after five steps at one rate, in one row."""
    biased = {"attention_bias": True, "mlp_bias": True}  # where a choice may be about biases
    model = llama(num_hidden_layers=2, vocab_size=31, **biased).double()
    adapters = attach(model, recipe(word, r=4, **fields))
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(0, 31, (2, 6), generator=generator)
        inputs = {"input_ids": ids, "labels": ids}
        adapters.loss(model(**inputs), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    lorica.merge(model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def text_of(word: str) -> str:
    """The method's text with what stands beside it, so that defaults and what equals them meet."""
    made = recipe(word)
    return made.text() + str(made.rank_pattern or "")


def test_every_words_trajectory_differs_from_every_others():
    """Except where a word only names a default, and for compute orders, which only round apart."""
    classes: dict[str, list[str]] = {}
    for room, word in every():
        # Where nothing was quantised, a start from what that took away is the plain one.
        plain_start = isinstance(recipe(word).init, StartsFromUnquantised)
        if room != "kernels" and not plain_start:
            classes.setdefault(text_of(word), []).append(word)
    defaults = {default for _, default, _ in registry.AXES.values() if default}
    for text, members in classes.items():
        named = [w for w in members if w not in defaults and registry.axis_of(w) != "ranks"]
        assert len(named) <= 1, f"{named} all mean `{text}`"
    # A step count per vector shows once vectors are exchanged.
    counted = {t: "vector_step" in registry.find(m[0]).gives for t, m in classes.items()}
    swaps = {"schedules": (SwapOften(every=2),)}
    plain = {True: effective("lora", **swaps), False: effective("lora")}
    rows = {t: effective(m[0], **(swaps if counted[t] else {})) for t, m in classes.items()}
    for text, row in rows.items():
        assert text == "lora" or (row - plain[counted[text]]).norm() > 1e-3, f"`{text}` is `lora`"
    for (a, one), (b, other) in itertools.combinations(rows.items(), 2):
        distance = (one - other).norm() / (one - rows["lora"]).norm().clamp_min(1e-3)
        assert distance > 1e-3, f"`{a}` and `{b}` train to the same weights"


@pytest.mark.parametrize(("room", "word"), every())
def test_every_argument_does_something(room, word):
    """An option without effect is an error, so each has one; its test names a value it may take."""
    import inspect

    cls = registry.find(word)  # an argument may be read by what the class inherits from
    modules = {inspect.getmodule(c) for c in cls.__mro__ if c.__module__.startswith("lorica.")}
    source = "".join(inspect.getsource(module) for module in modules if module is not None)
    for f in dataclasses.fields(cls):
        assert source.count(f"self.{f.name}") >= 1 or f'"{f.name}"' in source, f.name


@pytest.mark.parametrize("word", WORDS)
def test_the_same_seed_gives_the_same_run(word):
    results = []
    for stream in (0, 7):
        model = llama(num_hidden_layers=1)
        torch.manual_seed(stream)
        adapters = attach(model, recipe(word, r=4))
        optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=9)
        train(adapters, optimizer, 3)
        results.append(adapters.fingerprint())
    assert results[0] == results[1]


@pytest.mark.parametrize("word", WORDS)
def test_rows_of_tokens_train_beside_every_method(word, tmp_path):
    """They move, the rest of the tables does not, and a file gives the same model. Weights that
    train themselves keep no rows frozen."""
    plain = Recipe.parse(word)
    if plain.objectives:  # they look at a transformer's outputs
        model, tables, target = llama(num_hidden_layers=1), ("embed_tokens", "lm_head"), "o_proj"
        ids = (*batch(model)["input_ids"].unique()[:2].tolist(),)
    else:
        torch.manual_seed(2)
        model = Chain(a=nn.Embedding(61, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 61))
        tables, target, ids = ("a", "c"), "b", (41, 57)
    base = copy.deepcopy(model)
    fields = {"target_modules": (target,), "trainable_token_indices": dict.fromkeys(tables, ids)}
    if not plain.delta.wraps:
        with pytest.raises(ValueError, match="no row of them frozen: to train the tables whole"):
            recipe(word, r=4, **fields)
        return
    adapters = attach(model, recipe(word, r=4, **fields))
    optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=4)
    for seed in range(4):
        inputs = batch(model, seed) if plain.objectives else model.batch(seed)
        adapters.loss(model(**inputs), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in adapters.tables:
        was, now = base.get_submodule(name).weight, model.get_submodule(name).weight
        assert (was != now).any(1).nonzero()[:, 0].tolist() == [*ids], name
    compute = logits if plain.objectives else lambda m: m(model.batch(9)["x"])
    wanted = compute(model)
    if adapters.base_unchanged:
        lorica.load(base, lorica.save(adapters, tmp_path / "out"))
        assert torch.equal(compute(base), wanted)
    else:
        torch.testing.assert_close(compute(lorica.merge(model)), wanted)
