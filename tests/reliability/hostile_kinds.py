"""Hostile values of certain kinds: patterns that take years, templates that never end, tables with
many columns, text that a terminal would obey, and arguments of calls in Python."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

# -- patterns --------------------------------------------------------------------------------------

_ATOMS = (r"\w", ".", "[a-z_]", "a", r"\S", "[^!]", r"(?:\.|\w)", "self_attn", "layers")
_AGAIN = ("+", "*", "{1,}", "+?", "{0,30}", "{1,9999}")


def pattern(draw: Random) -> str:
    """One that matches in exponential or high polynomial time, or is merely large."""
    kind = draw.randrange(9)
    one, two = draw.choice(_ATOMS), draw.choice(_ATOMS)
    again = lambda: draw.choice(_AGAIN)  # noqa: E731
    end = draw.choice(("!", "$!", "(?!x)!", r"\b!", "q_projj", "\\Z!"))
    if kind == 0:  # an alternative that matches twice
        return f"({one}|{two}){again()}{end}"
    if kind == 1:  # a quantifier in a quantifier
        return f"({one}{again()}){again()}{end}"
    if kind == 2:
        return f"({one}{again()}{two}?){again()}{end}"
    if kind == 3:  # side by side: a high polynomial
        return f"{one}*" * draw.randint(5, 60) + end
    if kind == 4:
        count = draw.randint(20, 60)
        return f"({one}?){{{count}}}{one}{{{count}}}{end}"
    if kind == 5:  # with what a linear-time engine lacks
        return f"(?=({one}{again()}){again()}{end})({two}|{one})*\\1{end}"
    if kind == 6:
        depth = draw.choice((50, 99, 1000))
        return "(" * depth + one + f"){draw.choice('+*')}" * depth + end
    if kind == 7:
        return "|".join([f"{one}{i}{again()}" for i in range(draw.choice((100, 5000)))])
    return f".*({one}{again()}|{two}{again()}){again()}{end}" * draw.randint(1, 9)


# -- templates -------------------------------------------------------------------------------------


def template(draw: Random) -> str:
    """A chat template that does not end, writes without end, fails, or reaches for code."""
    many = draw.choice((10**4, 10**7, 10**10))
    depth = draw.randint(2, 9)
    loops = "".join(f"{{% for a{i} in range({many}) %}}" for i in range(depth))
    every = (
        loops + "x" + "{% endfor %}" * depth,
        f"{{{{ 'a' * {many} }}}}",
        f"{{{{ lipsum(n={many}) }}}}",
        f"{{{{ range({many})|join }}}}",
        f"{{{{ 'a'|center({many}) }}}}",
        f"{{{{ '%{many}d'|format(1) }}}}",
        f"{{{{ '{{:>{many}}}'.format(1) }}}}",
        f"{{{{ messages|tojson(indent={many}) }}}}",
        "{{ 9**9**9 }}",
        "{{ 1/0 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}{{ n.x }}",
        "{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(0) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if true %}" * 3000 + "x" + "{% endif %}" * 3000,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        f"{{{{ raise_exception({json.dumps(escape(draw))}) }}}}",
        f"{{{{ raise_exception('a' * {min(many, 10**7)}) }}}}",
        "{{ messages.nothing.nothing }}",
        "{{ messages|nofilter }}",
        "{{ strftime_now('%Y' * 10000000) }}",
        "{{ bos_token * 3 ",
        "{{ messages[99]['content'] }}",
        escape(draw) + "{{ messages[0]['content'] }}" + escape(draw),
        "{% for m in messages %}{{ m['content'] }}{% endfor %}" + "\ud800",
        "",
    )
    return draw.choice(every)


# -- tables ----------------------------------------------------------------------------------------


def columns(draw: Random, delimiter: str) -> bytes:
    """Many columns, or names that are long, equal, empty or strange."""
    count = draw.choice((300, 3000, 20_000))
    name: Callable[[int], str] = draw.choice(
        (
            lambda i: f"c{i}",
            lambda i: "text",
            lambda i: "",
            lambda i: f"{'n' * 300}{i}",
            lambda i: f"text{i % 7}",
            lambda i: escape(draw),
        )
    )
    names = [
        name(i).replace(delimiter, "").replace("\n", "").replace('"', "") for i in range(count)
    ]
    if draw.random() < 0.5:
        names[draw.randrange(count)] = "text"
    row = delimiter.join(draw.choice(("x", "the cat", "", "1")) for _ in names)
    lines = [delimiter.join(names), *[row] * draw.choice((1, 3, 20))]
    return "\n".join(lines).encode(errors="surrogatepass")


# -- text that a terminal would obey ---------------------------------------------------------------

_SEQUENCES = (
    "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m", "\x9d0;t\x9c",
    "\x1bP", "\u202e", "\u2066\u2067", "\u200f", "\r", "\n\n\n", "\x08" * 40, "\x00", "\u2028",
    "\x85", "\x7f", "\x1b[8m", "\x1bc", "\ufeff", "\u0301" * 60, "\x0b\x0c",
)  # fmt: skip


def escape(draw: Random) -> str:
    """Words around such a sequence."""
    return f"the{draw.choice(_SEQUENCES)}cat{draw.choice(_SEQUENCES)}"


def raw(text: str) -> str | None:
    """The first character that a terminal would obey, or that would turn a line round."""
    for c in text:
        code = ord(c)
        if (code < 32 and c not in "\n\t") or 127 <= code < 160:
            return repr(c)
        if code in (0x200E, 0x200F, 0x2028, 0x2029) or 0x202A <= code <= 0x202E:
            return repr(c)
        if 0x2066 <= code <= 0x2069:
            return repr(c)
    return None


# -- arguments in Python ---------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "0": 0, "-1": -1, "2.5": 2.5, "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "none": None,
    "true": True, "text": "1e-3", "empty": "", "list": [1], "dict": {"a": 1}, "huge": 10**400,
    "complex": 1j, "tuple": (0.9, 1.5), "pair": (0.9, 0.99), "bytes": b"x", "long": "x" * 50_000,
    "1e38": 1e38, "1e-40": 1e-40, "set": {1}, "type": int,
}  # fmt: skip

NAMES: dict[str, tuple[str, ...]] = {
    "optimizer": (
        "lr", "weight_decay", "modules_lr", "total_steps", "seed", "betas", "eps", "momentum",
        "fused", "foreach", "amsgrad", "nothing",
    ),
    "attach": (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
        "layers_to_transform", "bias", "rank_pattern", "alpha_pattern", "seed", "train_rest",
        "trainable_token_indices", "nothing",
    ),
}  # fmt: skip


def call(data: bytes, draw: Random) -> tuple[str, bytes]:
    """A call as JSON: what is called, the rule, and the names of `VALUES` that it is given."""
    what = draw.choice((*NAMES, "adapters state", "optimizer state", "rank"))
    rule = draw.choice(("adamw", "sgd", "lorarite", "riemannian", "vectoradamw", "muon", "galore"))
    given = {}
    if what in NAMES:
        names = draw.sample(NAMES[what], draw.randint(1, 2))
        given = {name: draw.choice(list(VALUES)) for name in names}
    told = {"call": what, "rule": rule, "given": given, "draw": draw.randrange(10**6)}
    return f"call/{what}", json.dumps(told).encode()
