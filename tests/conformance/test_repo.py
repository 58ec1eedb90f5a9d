"""The repository's own rules: what the code may name, and what it shows to users."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from walk import every

import lorica
from lorica import Recipe
from lorica.recipe import registry

HOUSE = Path(lorica.__file__).parent
METHODS = HOUSE / "methods"
# The code of every other package serves all methods and names none; a help text may name one.
NAMING = ("methods", "cli")

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


# -- the files -------------------------------------------------------------------------------------


def test_a_word_names_one_file_and_is_spelt_as_it_is_compared():
    names = [word for _, word in every()]
    assert len(names) == len(set(names))
    for word in names:
        assert word == registry.normalise(word), "a file's name is lower case without `_`"


def test_the_axes_are_fields_of_the_recipe():
    fields = {name for name, _, _ in registry.AXES.values()}
    assert fields <= set(Recipe.__dataclass_fields__)
    for axis, (_, default, several) in registry.AXES.items():
        assert several == (default is None)
        assert default is None or default in registry.names(axis)
        assert importlib.import_module(f"lorica.methods.{axis}.base").__doc__


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
    """`lorica.attach(model, 'lora')` in a hint is an example, not a branch: a name counts where it
    is an identifier, a part of one, or a whole string."""
    generic = {"add", "auto", "constant", "full", "pattern", "uniform", "gaussian", "orthogonal",
               "reference", "svd", "linear"}  # fmt: skip
    names = {word for _, word in every()} - generic
    paths = [p for p in sorted(HOUSE.glob("*.py")) if p.name != "__init__.py"]
    paths += [p for p in sorted(METHODS.glob("*.py"))]
    for package in sorted(p for p in HOUSE.iterdir() if p.is_dir() and p.name not in NAMING):
        paths += sorted(package.rglob("*.py"))
    searched = {p.relative_to(HOUSE).parts[0] for p in paths}
    assert searched >= {"recipe", "model", "training", "tensors", "formats", "data", "run"}
    found = []
    for path in paths:
        root = tree(path)
        if path.name == "choice.py":  # the defaults are in one table
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
    "pissa_niter_", "eva", "eva_config", "loftq", "loftq_config",
}  # fmt: skip


def without_default_arguments(root: ast.Module) -> ast.Module:
    """`method="lora"` in a signature is the default of the whole library."""
    for node in ast.walk(root):
        if isinstance(node, ast.FunctionDef):
            node.args.defaults = []
            node.args.kw_defaults = [None for _ in node.args.kw_defaults]
    return root


def test_things_are_declared_not_looked_for():
    for path in sorted(HOUSE.rglob("*.py")):
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.Name) and node.id == "hasattr"), (
                f"{path}:{node.lineno}"
            )


def test_imports_run_one_way():
    """The contracts of pyproject.toml, on the very sources that the suite runs."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(HOUSE.parent)}
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    ran = subprocess.run(
        [*command, "--no-cache"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "0 broken" in ran.stdout, ran.stdout + ran.stderr


# -- the package -----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
OPTIONAL_IMPORTS = {"peft"}  # where it is installed


def project() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported(root: ast.AST) -> set[str]:
    """Top-level names of what a file imports, inside its functions too."""
    names: set[str] = set()
    for node in ast.walk(root):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_every_package_that_is_imported_is_declared():
    told = project()
    assert sorted(told["dependencies"]) == told["dependencies"]
    bounds = {r.split(">=")[0]: r.split(">=")[1] for r in told["dependencies"]}
    required = {"yaml" if name == "pyyaml" else name for name in bounds}
    extras = {r.split(">=")[0] for e in told["optional-dependencies"].values() for r in e}
    found = set().union(*(imported(tree(path)) for path in HOUSE.rglob("*.py")))
    found -= {*sys.stdlib_module_names, "lorica"}
    assert found - OPTIONAL_IMPORTS == required
    assert OPTIONAL_IMPORTS <= found & extras


def test_the_description_of_the_package_has_no_link_into_the_repository():
    spec = importlib.util.spec_from_file_location("the_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", module.description(readme))
    assert all(link.startswith("https://") for link in links), links
    homed = module.description(
        "![a](docs/a.png) [b](docs/b.md) [c](https://c)", "https://h/", "https://p/"
    )
    assert homed == "![a](https://p/docs/a.png) [b](https://h/docs/b.md) [c](https://c)"


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


def test_no_public_function_is_shadowed_by_a_module():
    """Importing `lorica.NAME` would put the module where the function was."""
    for name in modules():
        importlib.import_module(name)
    for name in PUBLIC:
        assert not isinstance(getattr(lorica, name), ModuleType), name
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


# -- the tests of the papers' claims ---------------------------------------------------------------

TESTS = Path(__file__).parents[1]


def functions(root: ast.Module) -> dict[str, ast.FunctionDef]:
    """Every function of a file by name, methods of its classes included."""
    return {node.name: node for node in ast.walk(root) if isinstance(node, ast.FunctionDef)}


def reached(name: str, known: dict[str, ast.FunctionDef]) -> list[ast.AST]:
    """All nodes of a function and of the functions of the same file that it mentions."""
    seen, left, out = set(), [name], []
    while left:
        if (current := left.pop()) in seen:
            continue
        seen.add(current)
        nodes = list(ast.walk(known[current]))
        out += nodes
        mentioned = {n.id for n in nodes if isinstance(n, ast.Name)}
        mentioned |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        mentioned |= {n.arg for n in nodes if isinstance(n, ast.arg)}  # fixtures
        left += mentioned & known.keys()
    return out


def asserts(node: ast.AST) -> bool:
    """An `assert` of something that isn't a constant, `pytest.raises`, or `assert_close`."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    called = node.func if isinstance(node, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in ("raises", "warns", "fail") or name.startswith(("assert_", "gradcheck"))


def twins(root: ast.Module) -> dict[str, set[str]]:
    """Names of the reference modules that a file imports -> what it calls them."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(root):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, _, module = node.module.partition(".")
        for alias in node.names if package == "reference" else ():
            found.setdefault(module or alias.name, set()).add(alias.asname or alias.name)
    return found


def faults_of_a_paper_test(source: str, allowed: set[str]) -> list[str]:
    """What keeps a test file from proving anything about a method.

    Args:
        allowed: reference modules of the method and of those that cite the same paper.
    """
    root = ast.parse(source)
    known = functions(root)
    tests = [name for name in known if name.startswith("test_")]
    bare = [n for n in tests if not any(asserts(node) for node in reached(n, known))]
    out = [] if tests else ["it has no test"]
    out += [f"`{name}` asserts nothing" for name in bare]
    called = set().union(*(names for m, names in twins(root).items() if m in allowed), set())
    used = any(
        isinstance(node, ast.Name) and node.id in called
        for name in tests
        for node in reached(name, known)
    )
    if not called:
        out.append(f"it imports none of {sorted(allowed)} from tests/reference")
    elif not used:
        out.append("no test uses the twin that it imports")
    return out


def papers_of() -> dict[str, set[str]]:
    """Published methods -> the methods that cite one of the same papers, themselves included."""
    cited = {w: set(registry.source(registry.find(w)).bibtex) for _, w in every()}
    return {w: {v for v in cited if cited[v] & cited[w]} for w in cited if cited[w]}


@pytest.mark.parametrize("word", sorted(papers_of()))
def test_every_published_method_is_compared_with_its_twin(word):
    """In a file with the method's name, or that of another method which cites the same paper."""
    family = papers_of()[word]
    files = {w: TESTS / "papers" / f"test_{w}.py" for w in sorted(family)}
    found = {w: path for w, path in files.items() if path.exists()}
    assert found, f"tests/papers/test_{word}.py is missing"
    allowed = {w for w in family if (TESTS / "reference" / f"{w}.py").exists()}
    assert allowed, f"tests/reference/{word}.py is missing"
    path = found.get(word, next(iter(found.values())))
    faults = faults_of_a_paper_test(path.read_text(encoding="utf-8"), allowed)
    assert not faults, f"{path.name}: {'; '.join(faults)}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("", "it has no test"),
        ("from reference import x as twin\ndef test_a():\n    assert True", "asserts nothing"),
        ("from reference import x as twin\ndef test_a():\n    twin.f()", "asserts nothing"),
        ("def test_a():\n    assert f() == 1", "imports none of ['x']"),
        ("from reference import y as twin\ndef test_a():\n    assert twin.f()", "imports none"),
        ("from reference import x as twin\ndef test_a():\n    assert f()", "no test uses"),
    ],
)
def test_a_paper_test_that_proves_nothing_is_noticed(source, fault):
    assert any(fault in f for f in faults_of_a_paper_test(source, {"x"}))


def test_a_paper_test_may_assert_through_its_helpers():
    source = """
from reference.x import step

def check(a):
    assert a == step()

def test_a():
    check(1)
"""
    assert not faults_of_a_paper_test(source, {"x"})
