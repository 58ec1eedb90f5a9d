"""The model card (README.md) beside what was trained: what it is, how it was made, how to load it.

It says only what the folder and its run know. A license is left out: it depends on the base and the
data. torch and transformers are not imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.embedded import BASE
from lorica.text import one_line, parse_json

CARD = "README.md"
_MARK = "<!-- written by lorica -->"  # a card that carries it may be replaced
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# task -> (the hub's name of it, transformers' class)
_TASKS = {
    "causal-lm": ("text-generation", "AutoModelForCausalLM"),
    "seq2seq-lm": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "sequence-classification": ("text-classification", "AutoModelForSequenceClassification"),
    "token-classification": ("token-classification", "AutoModelForTokenClassification"),
}
_SHOWN = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "seed",
)  # fmt: skip


def write(folder: Path, text: str) -> bool:
    """Write README.md into a finished folder, unless one that Lorica did not write is there.

    Returns:
        Whether it was written.
    """
    file = folder / CARD
    if file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return False
    for left in folder.glob(f".{CARD}.*"):  # by a process that died here
        left.unlink(missing_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{CARD}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, file)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return True


def facts_of(adapter: Path) -> dict[str, Any]:
    """What the run that wrote an adapter told of it: result.json beside the adapter's folder."""
    folder = adapter.resolve()
    found = _mapping(folder.parent / "result.json")
    return found if Path(str(found.get("output"))).name == folder.name else {}


def _mapping(file: Path) -> dict[str, Any]:
    """A JSON mapping; an empty one where the file holds none."""
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def of_adapter(out: Path, adapter: Path, what: str) -> str:
    """The card of what `merge` or `export` made of an adapter.

    Args:
        out: the finished folder.
        adapter: the adapter's folder, whose run may lie around it.
        what: see `text`.
    """
    import lorica
    from lorica import formats

    told = formats.inspect(adapter)
    citation = ""
    with contextlib.suppress(ValueError):  # PEFT's own terms for a file that Lorica did not write
        citation = lorica.cite(told["method"])
    return text(
        out,
        method=told["method"],
        base=told["base"].get("name"),
        what=what,
        result=facts_of(adapter),
        citation=citation,
    )


def text(
    folder: Path,
    *,
    method: str,
    base: str | None,
    what: str,
    result: Mapping[str, Any],
    citation: str,
) -> str:
    """The card.

    Args:
        folder: what it describes; its files decide which programs can load it.
        method: in the text form.
        base: name of the base; only a hub id is named as such, a folder by its last part.
        what: `adapter`, `merged model`, `model` or `compressed model`.
        result: what result.json holds of the run, or nothing.
        citation: BibTeX.

    Returns:
        Markdown with the hub's metadata on top.
    """
    from huggingface_hub import ModelCardData

    task = result.get("task")
    pipeline, auto = _TASKS.get(str(task), (None, "AutoModelForCausalLM"))
    config = _mapping(folder / "adapter_config.json")
    peft = bool(config)
    whole = (folder / "config.json").is_file()
    data = _told(result.get("data"), "name")
    metadata: dict[str, Any] = {
        "library_name": "peft" if peft else "transformers" if whole else "lorica",
        "tags": ["lorica", *([str(config.get("peft_type")).lower()] if peft else [])],
        "pipeline_tag": pipeline,
        "base_model": base if _on_hub(base) else None,
        "datasets": [data.partition(":")[0]] if data and _on_hub(data) else None,
    }
    if metadata["base_model"]:
        metadata["base_model_relation"] = "adapter" if not whole else "finetune"
    head = ModelCardData(**{k: v for k, v in metadata.items() if v is not None}).to_yaml()
    parts = [
        f"---\n{head.strip()}\n---\n{_MARK}",
        f"# {_code(method)} on {_code(_short(base))}",
        f"This {what} was made with Lorica: low-rank updates of {_code(_short(base))} with the"
        f" method {_code(method)}" + (f", trained on {_code(_short(data))}." if data else "."),
        *_figures(result),
        *_settings(result),
        "## Use it\n\n" + "\n\n".join(_ways(base, auto, what, peft=peft, whole=whole)),
    ]
    if citation:
        parts.append(f"## Cite\n\n```bibtex\n{citation}\n```")
    return "\n\n".join(parts) + "\n"


def _told(mapping: Any, name: str) -> str | None:
    found = mapping.get(name) if isinstance(mapping, Mapping) else None
    return found if isinstance(found, str) and found else None


def _on_hub(name: str | None) -> bool:
    """Whether a name is a hub id, with a configuration or without; a folder here is none."""
    bare = (name or "").partition(":")[0]
    return _HUB_ID.fullmatch(bare) is not None and not Path(bare).exists()


def _short(name: str | None) -> str:
    """A name for strangers: of a path only its last part."""
    if not name:
        return "an unnamed model"
    local = Path(name).is_absolute() or Path(name).expanduser().exists()
    return Path(name).name if local else name


def _code(value: object) -> str:
    return "`" + one_line(str(value)).replace("`", "'") + "`"


def _figures(result: Mapping[str, Any]) -> list[str]:
    found = result.get("evaluation")
    rows = [("loss of the last logged step", result.get("loss"))]
    if isinstance(found, Mapping):
        rows = [(str(name).removeprefix("eval_"), value) for name, value in found.items()]
    rows = [(name, value) for name, value in rows if isinstance(value, (int, float))]
    if not rows:
        return []
    title = "Evaluation" if isinstance(found, Mapping) else "Training"
    lines = [f"| {_code(name)} | {value:.4f} |" for name, value in rows]
    return ["\n".join([f"## {title}", "", "| figure | value |", "|---|---|", *lines])]


def _settings(result: Mapping[str, Any]) -> list[str]:
    recipe = result.get("recipe")
    rows: list[tuple[str, Any]] = [
        (name, result.get(name)) for name in ("learning_rate", "steps", "epochs", "tokens")
    ]
    if isinstance(recipe, Mapping):
        rows += [(name, recipe.get(name)) for name in _SHOWN]
    rows += [("trainable parameters", result.get("trainable"))]
    kept = [(name, value) for name, value in rows if value not in (None, [], {}, "")]
    if not kept:
        return []
    lines = [f"| {name} | {_code(value)} |" for name, value in kept]
    versions = result.get("versions")
    made = ""
    if isinstance(versions, Mapping):
        made = "\n\nMade with " + ", ".join(f"{_code(f'{k} {v}')}" for k, v in versions.items())
    title = ["## How it was trained", "", "| setting | value |", "|---|---|"]
    return ["\n".join([*title, *lines]) + made]


def _ways(base: str | None, auto: str, what: str, *, peft: bool, whole: bool) -> list[str]:
    """Code for every program that can load the folder, and for no other."""
    here = '"PATH_OR_HUB_ID_OF_THIS"'
    if what == "compressed model":
        return [
            "With Lorica, on the command line (`lorica generate --model PATH`) or in Python:",
            "```python\nfrom lorica.formats.compressed import unpack\n\n"
            'model = unpack("PATH_OF_THIS")\n```',
        ]
    if whole:
        return [
            "With transformers; every program that loads a transformers model can use it:",
            f"```python\nfrom transformers import {auto}\n\n"
            f"model = {auto}.from_pretrained({here})\n```",
        ]
    embedded = base == BASE
    name = "base_path()" if embedded else f'"{_short(base) if base else "THE_BASE"}"'
    load = f"from transformers import {auto}\n"
    load += "\nfrom lorica.embedded import base_path\n" if embedded else ""
    start = f"model = {auto}.from_pretrained({name})\n"
    ways = [
        "With Lorica:",
        f"```python\nimport lorica\n{load}\n{start}lorica.load(model, {here})\n```",
    ]
    if peft:
        ways += [
            "With PEFT:",
            f"```python\nfrom peft import PeftModel\n{load}\n{start}"
            f"model = PeftModel.from_pretrained(model, {here})\n```",
        ]
    return ways
