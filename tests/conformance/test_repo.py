"""The house's own rules: what the code may name, how large it may be, what it shows to users."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import io
import pkgutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from walk import every

import lorica
from lorica import Recipe
from lorica.recipe import registry

HOUSE = Path(lorica.__file__).parent
CORE = ("recipe.py", "layer.py", "attach.py", "bind.py", "moves.py", "adapters.py")
NAMELESS_ROOMS = ("train", "io", "data")
CORE_LIMIT = 700

# Growing any of these is a decision, not an accident.
PUBLIC = [
    "Adapters", "Recipe", "__version__", "attach", "cite", "detach", "load", "merge", "optimizer",
    "save",
]  # fmt: skip


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(HOUSE)], "lorica.")
    return [m.name for m in found if not m.name.endswith("__main__")]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(root: ast.AST) -> set[int]:
    """Ids of the constants that are docstrings."""
    out = set()
    for node in ast.walk(root):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and node.body and isinstance(node.body[0], ast.Expr):
            out.add(id(node.body[0].value))
    return out


def code_lines(path: Path) -> int:
    """Lines that are not blank, not comments and not docstrings."""
    source = path.read_text(encoding="utf-8")
    root = ast.parse(source)
    hidden = docstrings(root)
    words = set()
    for node in ast.walk(root):
        if id(node) in hidden:
            words |= set(range(node.lineno, node.end_lineno + 1))
    skip = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER,
    }  # fmt: skip
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - words)


# -- the files -------------------------------------------------------------------------------------


def test_a_word_names_one_file_and_is_spelt_as_it_is_compared():
    names = [word for _, word in every()]
    assert len(names) == len(set(names))
    for word in names:
        assert word == registry.normalise(word), "a file's name is lower case without `_`"


def test_the_axes_are_fields_of_the_recipe():
    fields = {name for name, _, _ in registry.AXES.values()}
    assert fields <= set(Recipe.__dataclass_fields__)
    for room, (_, default, several) in registry.AXES.items():
        assert several == (default is None)
        assert default is None or default in registry.names(room)
        assert importlib.import_module(f"lorica.{room}").__doc__


def identifiers(root: ast.AST) -> dict[str, int]:
    """Every identifier and string constant in the code, docstrings excluded -> its line."""
    hidden, out = docstrings(root), {}
    for node in ast.walk(root):
        line = getattr(node, "lineno", 0)
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in hidden
        ):
            out[node.value] = line
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                out[value] = line
    return out


def test_no_method_is_named_outside_its_file():
    """`lorica.attach(model, 'lora')` in a hint is an example, not a branch: a word counts where it
    stands alone, as an identifier or as a whole string."""
    generic = {"add", "auto", "constant", "full", "pattern", "uniform", "gaussian", "orthogonal",
               "reference", "svd", "linear"}  # fmt: skip
    names = {word for _, word in every()} - generic
    paths = [p for p in sorted(HOUSE.glob("*.py")) if p.name != "__init__.py"]
    paths += [p for room in NAMELESS_ROOMS for p in sorted((HOUSE / room).rglob("*.py"))]
    found = []
    for path in paths:
        root = tree(path)
        if path.name == "rooms.py":  # the defaults stand in one table
            root.body = [n for n in root.body if not (isinstance(n, ast.AnnAssign)
                         and getattr(n.target, "id", "") == "AXES")]  # fmt: skip
        for text, line in identifiers(without_default_arguments(root)).items():
            if not text.isidentifier() or text in EXEMPT:
                continue
            parts = {
                registry.normalise(text),
                *(registry.normalise(part) for part in text.split("_")),
            }
            if hit := parts & names:
                found.append(f"{path.relative_to(HOUSE)}:{line}: {text!r} names {sorted(hit)}")
    assert not found, "\n".join(found)


# PEFT's and transformers' own names of options and keys, which users and files already use.
EXEMPT = {
    "lora_alpha", "lora_dropout", "lora_dropout_on", "lora_only", "lora_A", "lora_B", "use_rslora",
    "use_dora", "init_lora_weights", "default_lora_alpha", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector", "lora_bias", "LORA", "peft_rslora", "lora_ga", "lora_ga_config",
    "pissa_niter_",
}  # fmt: skip


def without_default_arguments(root: ast.Module) -> ast.Module:
    """`method="lora"` in a signature is the default of the whole library."""
    for node in ast.walk(root):
        if isinstance(node, ast.FunctionDef):
            node.args.defaults = []
            node.args.kw_defaults = [None for _ in node.args.kw_defaults]
    return root


def test_the_core_stays_small():
    sizes = {name: code_lines(HOUSE / name) for name in CORE}
    assert sum(sizes.values()) <= CORE_LIMIT, sizes


def test_things_are_declared_not_looked_for():
    for path in sorted(HOUSE.rglob("*.py")):
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.Name) and node.id == "hasattr"), (
                f"{path}:{node.lineno}"
            )


def test_method_files_are_short():
    for room, word in every():
        path = HOUSE / room / f"{word}.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 190, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{path}: {node.name}"


# -- what users see --------------------------------------------------------------------------------


def test_the_public_names_are_these():
    assert sorted(lorica.__all__) == PUBLIC
    assert dir(lorica) == sorted(lorica.__all__)
    for name in PUBLIC:
        assert getattr(lorica, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lorica.nonsense  # noqa: B018


def test_importing_the_package_is_light():
    """torch and transformers take seconds; `lorica --help` must not."""
    heavy = "{'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'safetensors'}"
    code = f"import sys, lorica; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout


def test_the_function_is_not_shadowed_by_its_module():
    import lorica.attach  # noqa: F401

    assert callable(lorica.attach) and callable(lorica.merge)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    with torch.random.fork_rng():
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not result.failed


@pytest.mark.parametrize(("room", "word"), every())
def test_every_choice_explains_itself(room, word):
    cls = registry.find(word)
    doc = cls.__doc__ or ""
    first = " ".join(doc.split("\n\n", 1)[0].split())
    assert first.endswith("."), "the first paragraph is a sentence"
    assert registry.source(cls).title == first.rstrip("."), "the table of methods shows all of it"
    assert "Example:" in doc and ">>> " in doc
    assert (importlib.import_module(cls.__module__).__doc__ or "").strip(), "equations"
    for argument in (f.name for f in dataclasses.fields(cls)):
        assert f"{argument}:" in doc or f"{argument}," in doc, f"`{argument}` is not described"
    for entry in registry.source(cls).bibtex:
        assert entry.count("{") == entry.count("}")
        assert "year = {" in entry and "author = {" in entry and "title = {" in entry


def test_every_published_method_says_what_it_costs_and_when_to_choose_it():
    for _, word in every():
        cls = registry.find(word)
        if registry.source(cls).bibtex:
            lines = [line.strip() for line in (cls.__doc__ or "").splitlines()]
            for label in ("Cost: ", "When: "):
                assert sum(line.startswith(label) for line in lines) == 1, (word, label)


def test_every_published_method_cites_its_paper():
    """A word without a reference is one of the plain choices listed here."""
    own = {"add", "auto", "constant", "factored", "full", "gaussian", "kaiming", "materialised",
           "orthogonal", "pattern", "reference", "uniform"}  # fmt: skip
    bare = {w for _, w in every() if not registry.source(registry.find(w)).bibtex}
    assert bare == own
    for _, word in every():
        text = lorica.cite(word)
        for entry in registry.source(registry.find(word)).bibtex:
            assert entry in text


def test_every_published_method_has_a_test_of_its_papers_claims():
    """The file has the word's name, or that of another word which cites the same paper."""
    papers = {
        p.stem.removeprefix("test_") for p in (Path(__file__).parents[1] / "papers").glob("*")
    }
    covered = {
        b for _, w in every() if w in papers for b in registry.source(registry.find(w)).bibtex
    }
    for _, word in every():
        entries = set(registry.source(registry.find(word)).bibtex)
        assert not entries or entries & covered, f"tests/papers/test_{word}.py is missing"
