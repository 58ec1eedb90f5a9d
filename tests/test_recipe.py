"""Recipe: the text form, the defaults, and every error that comes before a model is touched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest

import lorica
from lorica import Recipe
from lorica.methods.choice import Choice
from lorica.methods.deltas.base import DeltaChoice
from lorica.recipe.registry import axis_of, build, find, names, normalise, unknown


@pytest.mark.parametrize(("method", "fields", "parts"), [
    # given, where, what is allowed, what to type instead
    ("dora+olara", {}, ["unknown method `olara`", "did you mean `olora`?", "Known methods:"]),
    ("zzzzzz", {}, ["unknown method `zzzzzz`", "`lorica methods` lists all methods"]),
    ("olora+pissa", {}, ["`olora` and `pissa`", "axis `init`", "name one of them"]),
    ("lora+lora", {}, ["`lora` and `lora`", "axis `scale`"]),
    ("loraplus+loraplus", {}, ["`loraplus` and `loraplus`", "axis `groups`"]),
    ("pissa(nitre=4)", {}, ["`pissa` has no argument `nitre`", "`niter`", "`pissa(niter=...)`"]),
    ("olora(x=4)", {}, ["`olora` has no argument `x`", "its arguments: none", "type `olora`"]),
    ("pissa(4)", {}, ["not of the form name=value", "pissa(niter=16)"]),
    ("pissa(niter=open)", {}, ["`pissa(niter='open')`"]),
    ("pissa(niter=", {}, ["a bracket is missing"]),
    ("pissa)niter(", {}, ["is not a method's name"]),
    ("dora++olora", {}, ["is not a method's name"]),
    ("", {}, ["the method is empty", "dora+olora"]),
    ("dora(dropout='no')", {}, ["`dora(dropout='no')`", "'update', 'authors'"]),
    ("constant(s=-1)", {}, ["`constant(s=-1)`: a number above 0"]),
    ("constant", {"lora_alpha": 8}, ["`lora_alpha=8` has no effect with `constant`", "leave"]),
    ("uniform", {"rank_pattern": {"q": 2}}, ["no effect with `uniform`"]),
    ("lora", {"r": 0}, ["`r=0`", "whole number of at least 1", "`r=16`"]),
    ("lora", {"r": True}, ["`r=True`", "whole number"]),
    ("lora", {"r": 2.0}, ["`r=2.0`", "whole number"]),
    ("lora", {"r": "8"}, ["`r='8'`", "whole number"]),
    ("lora", {"lora_alpha": 0}, ["`lora_alpha=0`", "positive"]),
    ("lora", {"lora_alpha": 1e308}, ["`lora_alpha=1e+308`", "float32"]),
    ("lora", {"lora_alpha": float("nan")}, ["`lora_alpha=nan`", "float32"]),
    ("lora", {"lora_alpha": "16"}, ["`lora_alpha='16'`", "positive"]),
    ("lora", {"lora_dropout": 1.0}, ["`lora_dropout=1.0`", "[0, 1)", "0.05"]),
    ("lora", {"lora_dropout": -0.1}, ["`lora_dropout=-0.1`"]),
    ("lora", {"bias": "some"}, ["`bias='some'`", "none, all, lora_only"]),
    ("lora", {"lora_dropout_on": "x"}, ["`lora_dropout_on='x'`", "update, delta"]),
    ("lora", {"rank_pattern": {"q": 0}}, ["`rank_pattern['q']=0`"]),
    ("lora", {"alpha_pattern": {"q": -1}}, ["`alpha_pattern['q']=-1`"]),
    ("lora", {"alpha_pattern": {"q": float("inf")}}, ["`alpha_pattern['q']=inf`", "float32"]),
    ("full", {"r": 8}, ["`r=8` has no effect with `full`", "leave it out"]),
    ("full", {"lora_alpha": 8}, ["`lora_alpha=8` has no effect with `full`"]),
    ("full", {"lora_dropout": 0.1}, ["`lora_dropout=0.1` has no effect with `full`"]),
    ("full", {"rank_pattern": {"q": 2}}, ["`rank_pattern={'q': 2}` has no effect with `full`"]),
    ("full", {"bias": "all"}, ["`bias='all'` has no effect with `full`"]),
    ("full", {"lora_dropout_on": "delta"}, ["`lora_dropout_on='delta'` has no effect with `full`"]),
    ("full+dora", {}, ["`dora` cannot be combined with `full`", "needs `weight`", "Leave one"]),
    ("full+pissa", {}, ["`pissa` cannot be combined with `full`", "needs `pair`"]),
    ("full+loraplus", {}, ["`loraplus` cannot be combined with `full`"]),
    ("full+rslora", {}, ["`rslora` cannot be combined with `full`"]),
    ("full+lora", {}, ["`lora`", "`full`"]),
    # the same word said in another way
    ("lora", {"rr": 4}, ["`rr`", "`r`"]),
    ("lora", {"lora_alfa": 4}, ["`lora_alfa`", "`lora_alpha`"]),
    ("lora", {"init": "olora"}, ["`init='olora'`", "lora+olora"]),
    ("lora", {"groups": "loraplus"}, ["`groups='loraplus'`", "lora+loraplus"]),
    ("lora", {"schedules": ["relora"]}, ["`schedules=", "relora"]),
])  # fmt: skip
def test_errors_say_what_where_what_is_allowed_and_what_to_type(method, fields, parts):
    with pytest.raises(ValueError) as caught:
        Recipe.parse(method, **fields)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_words_are_compared_without_case_dashes_and_underscores():
    assert normalise("LoRA-Plus") == normalise("lora_plus") == "loraplus"
    one = Recipe.parse("dora+olora+loraplus")
    assert Recipe.parse(" DoRA + O-LoRA +\n lora_plus ") == one
    assert Recipe.parse("loraplus+olora+dora") == one, "order plays no part"


def test_arguments_in_the_three_forms():
    text = Recipe.parse("pissa(niter=16)+loraplus(loraplus_lr_ratio=4, loraplus_lr_embedding=1e-7)")
    yaml = Recipe.parse(
        {"pissa": {"niter": 16},
         "loraplus": {"loraplus_lr_ratio": 4, "loraplus_lr_embedding": 1e-7}}
    )  # fmt: skip
    objects = Recipe(
        init=build("pissa", {"niter": 16}),
        groups=(build("loraplus", {"loraplus_lr_ratio": 4, "loraplus_lr_embedding": 1e-7}),),
    )
    assert text == yaml == objects
    assert Recipe.parse({"dora": None}) == Recipe.parse("dora")
    assert Recipe.parse("dora(dropout='authors')").combine.dropout == "authors"


@pytest.mark.parametrize("text", [
    "lora", "dora", "olora", "dora+olora+rslora", "pissa(niter=16)", "constant(s=0.5)", "full",
    "dora(detach=False, dropout='authors')", "gaussian+loraplus+lorafa", "lora+materialised",
])  # fmt: skip
def test_text_is_short_and_reads_back(text):
    recipe = Recipe.parse(text)
    assert len(recipe.text()) <= len(text)
    assert Recipe.parse(recipe.text()) == recipe


def test_the_lists_of_names_may_be_lists_tuples_or_sets():
    for form in (list, tuple, set):
        made = Recipe.parse("lora", target_modules=form(["v_proj", "q_proj"]))
        assert set(made.target_modules) == {"q_proj", "v_proj"}
    assert Recipe.parse("lora", target_modules={"b", "a"}).target_modules == ("a", "b")
    one = Recipe.parse("lora", target_modules=["q_proj"], layers_to_transform=[0, 1])
    assert one == Recipe.from_dict(one.to_dict())
    assert one.to_dict()["layers_to_transform"] == [0, 1]


def test_defaults_say_where_they_come_from():
    filled = Recipe.parse("lora").filled
    assert filled == {"r": (16, "Lorica"), "lora_alpha": (32, "lora")}
    assert Recipe.parse("rslora").filled["lora_alpha"] == (8, "rslora")
    assert Recipe.parse("olora", r=8).filled == {"lora_alpha": (8, "olora")}
    assert Recipe.parse("olora+rslora", r=16).lora_alpha == pytest.approx(4)
    assert Recipe.parse("olora+constant(s=0.5)").lora_alpha is None
    assert Recipe.parse("lora", r=8, lora_alpha=3).filled == {}
    assert Recipe.parse("full").filled == {}


@pytest.mark.parametrize(("method", "rate", "whose"), [
    ("lora", 2e-4, "lora"), ("dora", 1e-4, "dora"), ("full", 2e-5, "full"),
    ("loraplus", 5e-5, "loraplus"), ("dora+loraplus", 5e-5, "loraplus"), ("olora", 2e-4, "olora"),
])  # fmt: skip
def test_default_rates(method, rate, whose):
    assert Recipe.parse(method).learning_rate == (rate, whose)


@dataclass(frozen=True, kw_only=True)
class Rated(DeltaChoice):
    """Has a rate, and a scale that it needs to be 1."""

    gives: ClassVar[frozenset[str]] = frozenset({"weight", "wrapped"})
    preset: ClassVar[Mapping[str, str]] = {"scales": "constant"}
    requires: ClassVar[frozenset[str]] = frozenset({"scales"})
    takes: ClassVar[frozenset[str]] = frozenset({"r"})
    default_learning_rate: ClassVar[float | None] = 0.5


def test_a_part_that_a_method_has_to_fill_in_has_no_say_in_its_rate():
    recipe = Recipe(delta=Rated(), r=2)
    assert recipe.scale.default_learning_rate < 0.5
    assert recipe.learning_rate == (0.5, Rated().name)
    dora = Recipe(delta=Rated(), r=2, combine=Recipe.parse("dora").combine)
    assert dora.learning_rate == (1e-4, "dora"), "what the user adds does have one"


def test_replacing_a_field_of_a_recipe_refills_what_was_not_given():
    given = Recipe.parse("lora", r=16)
    assert Recipe.parse(given, r=4) == Recipe.parse("lora", r=4), "alpha was the method's, not 32"
    chosen = Recipe.parse("lora", r=16, lora_alpha=5)
    assert Recipe.parse(chosen, r=4).lora_alpha == 5
    assert Recipe.parse(given) is given


def test_a_recipe_is_frozen_comparable_and_copies():
    recipe = Recipe.parse("dora+olora", r=8)
    with pytest.raises(AttributeError):
        recipe.r = 4
    assert copy.deepcopy(recipe) == recipe == pickle.loads(pickle.dumps(recipe))
    assert recipe != Recipe.parse("dora+olora", r=9)


def test_unknown_fields_of_a_saved_recipe_are_named():
    saved = {**Recipe.parse("lora").to_dict(), "alpha": 3}
    with pytest.raises(ValueError, match=r"unknown recipe fields \['alpha'\]; known:"):
        Recipe.from_dict(saved)


def test_citations_are_of_exactly_the_methods_used():
    text = lorica.cite("dora+olora+rslora")
    for used in ("2106.09685", "2402.09353", "2406.01775", "2312.03732", "1711.05101"):
        assert text.count(used) == 1
    for unused in ("2404.02948", "2402.12354", "2308.03303"):
        assert unused not in text
    assert "2106.09685" not in lorica.cite("full")


def test_axes():
    assert axis_of("dora") == "combine" and axis_of("nothing") is None
    assert "reference" in names("kernels") and issubclass(find("dora"), Choice)
    assert "`dora`" in unknown("dor")
    with pytest.raises(ValueError, match="`dora` is no choice of the axis `inits`; allowed there"):
        find("dora", "inits")
    with pytest.raises(ValueError, match="unknown method `nope`"):
        find("nope")


@pytest.mark.parametrize("text", ["galore(proj_type=left)", "dora(dropout=authors)"])
def test_strings_need_no_quotes(text):
    name, _, value = text.rstrip(")").partition("=")
    assert Recipe.parse(text) == Recipe.parse(f"{name}='{value}')")
    with pytest.raises(ValueError, match="allowed"):
        Recipe.parse(f"{name}=sideways)")
