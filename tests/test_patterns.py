"""Patterns are matched in bounded time, with Python's own meaning, wherever one can be given."""

from __future__ import annotations

import re
import time

import pytest

import lorica
import models
from lorica.inference.evaluate import _extract
from lorica.methods.ranks.base import ENDS
from lorica.patterns import Endless, find, flaw, matching

NAMES = ["h.0.attn.q", "h.0.attn.v", "h.1.mlp.up", "h.10.attn.q", "head"]
ENDLESS = [r"(\w|.)+!", r"(\w+\.?)*!", ".*.*.*.*.*.*.*.*.*.*.*!"]


@pytest.mark.parametrize("form, how", [("{}", "fullmatch"), (ENDS, "fullmatch"), ("{}", "match")])
def test_matches_are_those_of_re(form, how):
    patterns = [
        "h.0.attn.q",
        r"h\.0\.attn\.v",
        "q",
        r".*\.(q|v)",
        "(?!h).*",
        r"(\w)\.\d+.*",
        "^head$",
    ]
    expected = {
        p: {n: [m[0], *m.groups()] for n in NAMES if (m := getattr(re, how)(form.format(p), n))}
        for p in patterns
    }
    assert find(patterns, NAMES, form=form, how=how) == expected
    assert sum(map(len, expected.values())) > 4


def test_the_last_match_of_a_text():
    texts = ["#### 1 and #### 2", "none", "####  3\nx"]
    assert _extract(texts, r"#### *(\d)") == ["2", None, "3"]
    assert _extract(texts, "####") == ["####", None, "####"]
    assert _extract([" a "], None) == ["a"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_takes_for_ever_is_stopped(pattern, monkeypatch):
    monkeypatch.setattr("lorica.patterns.PATIENCE", 0.1)
    began = time.process_time()
    with pytest.raises(Endless, match="has not ended after .* s: .* Write the names as a list"):
        matching(pattern, ["model.layers.0.self_attn.q_proj_with_a_long_name"])
    assert time.process_time() - began < 1  # the time was another process's


@pytest.mark.parametrize(
    "field",
    [
        {"target_modules": ENDLESS[0]},
        {"target_modules": ["q_proj"], "exclude_modules": ENDLESS[0]},
        {"rank_pattern": {ENDLESS[0]: 2}},
        {"alpha_pattern": {ENDLESS[0]: 2}},
    ],
)
def test_in_python_too(field, monkeypatch):
    monkeypatch.setattr("lorica.patterns.PATIENCE", 0.1)
    model = models.llama()
    with pytest.raises(ValueError, match="has not ended after"):
        lorica.attach(model, "lora", r=2, verbose=False, **field)
    lorica.attach(model, "lora", r=2, verbose=False, target_modules=["q_proj"])  # as it was


def test_flaws():
    assert flaw("(") == "missing ), unterminated subpattern at position 0"
    assert flaw("(" * 5000 + ")" * 5000) == "its groups are nested too deeply"
    assert flaw("a{99999999999999999999}") is not None
    assert flaw("a" * 2_000_000) == "it has 2,000,000 characters, of 1,000,000 at most"


def test_without_another_process(monkeypatch):
    """Plain names need none, and where none can be started the message says what to type."""
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert matching("h.0.attn.q", NAMES) == ["h.0.attn.q"]
    with pytest.raises(ValueError, match="no process could be started .* as a list"):
        matching(".*q", NAMES)
