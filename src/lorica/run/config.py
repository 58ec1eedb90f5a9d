"""config.yaml, which repeats a run, and defaults.json, which says what chose its values.

config.yaml holds every option, filled in; a comment tells people which values are defaults of the
method. Nothing reads comments: a resumed run learns from defaults.json which of its options were
not given. Without that file every value counts as given.

torch is imported inside the functions: the command line reads configurations without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorica.run.folder import DEFAULTS, HEAD
from lorica.run.options import UsageError
from lorica.run.plan import RunPlan
from lorica.text import parse_json

OF_A_CALL = ("resume", "overwrite_output_dir", "verbose", "json", "dry_run")  # no part of the run
_NOT_KEPT = {"log_level", "disable_tqdm", "logging_nan_inf_filter"}  # unless they were given

Defaults = Mapping[str, Mapping[str, Any]]
"""{option: {"value": ..., "from": the name of what chose it}}"""


def resolved(plan: RunPlan[Any, Any]) -> dict[str, Any]:
    """The options that repeat this run, all filled in, as YAML reads them back."""
    training, given = plan.arguments.training, plan.options.further
    options = dataclasses.asdict(plan.options)
    for name in ("further", *OF_A_CALL):
        options.pop(name, None)
    told = plan.options.recipe_fields()
    options |= {name: told.get(name) for name in plan.options.recipe_names}
    for name, but in plan.options.paths.items():
        options[name] = absolute(options[name], but)
    options |= plan.data.settled
    options["learning_rate"] = plan.arguments.learning_rate
    if training.max_steps <= 0:
        options["num_train_epochs"] = training.num_train_epochs
    if "warmup_steps" not in given:
        options["warmup_ratio"] = float(training.warmup_steps)
    if plan.recipe is not None and plan.own_recipe:
        fields = plan.recipe.to_dict()
        names = plan.options.recipe_fields() | plan.recipe.filled
        options |= {"method": plan.recipe.text(), **{name: fields[name] for name in names}}
    kept = {k: v for k, v in plan.arguments.values.items() if k not in _NOT_KEPT or k in given}
    kept = {k: v for k, v in kept.items() if not k.endswith("checkpointing_kwargs")} | given
    options |= {k: getattr(v, "value", v) for k, v in kept.items() if v is not None}
    for name, value in options.items():  # transformers reads every `*_steps` as a fraction
        if name.endswith("_steps") and isinstance(value, float) and value.is_integer():
            options[name] = int(value)
    return {k: plain(v) for k, v in options.items() if v is not None and v != {}}


def write(plan: RunPlan[Any, Any]) -> None:
    """Write both files; defaults.json first, as config.yaml marks the folder as a run's."""
    import lorica

    config = resolved(plan)
    filled = {name: plain(default) for name, default in plan.adapters.summary.defaults.items()}
    defaults = {k: filled[k] for k in config if k in filled and config[k] == filled[k]["value"]}
    data = {"lorica": lorica.__version__, "defaults": defaults}
    plan.folder.write(DEFAULTS, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    plan.folder.write("config.yaml", as_yaml(config, plan.verb, defaults))


def as_yaml(config: Mapping[str, Any], verb: str, defaults: Defaults) -> str:
    """config.yaml's text, with a comment beside what is a default of the method."""
    import yaml

    import lorica

    lines = [
        f"{HEAD} {lorica.__version__}. To repeat the run:"
        f" lorica {verb} config.yaml --output-dir ANOTHER"
    ]
    for name, value in config.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=10**9)
        text = text.rstrip("\n")
        if name in defaults and "\n" not in text:
            text += f"  # by default: {defaults[name]['from']}"
        lines.append(text)
    return "\n".join(lines) + "\n"


def read(folder: Path) -> dict[str, Any] | None:
    """config.yaml of a run's folder; None: there is none.

    Raises:
        UsageError: it is no mapping any more.
    """
    import yaml

    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UsageError(
            f"`--resume`: {file} does not say any more what the run is: a mapping `key: value` is"
            " wanted. Put the old one back, or start a run of its own"
        )
    return config


def read_defaults(folder: Path) -> Defaults:
    """What defaults.json of a run's folder says; nothing where there is no such file.

    Raises:
        UsageError: the file was changed.
    """
    file = folder / DEFAULTS
    if not file.is_file():
        return {}
    try:
        defaults = parse_json(file.read_text(encoding="utf-8"))["defaults"]
        return {name: {"value": d["value"], "from": str(d["from"])} for name, d in defaults.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(
            f"`--resume`: {file} was changed: a mapping `defaults` of options to their `value` and"
            " `from` is wanted. Put the old one back, or remove it: every option of config.yaml"
            " then counts as given"
        ) from None


def absolute(value: Any, but: Collection[str] = ()) -> Any:
    """A path that exists, from the root on; anything else as it is, and so are the names `but`."""
    if isinstance(value, (tuple, list)):
        return tuple(absolute(part, but) for part in value)
    if isinstance(value, str) and value not in but and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def plain(value: Any) -> Any:
    """Lists for tuples, so that YAML and JSON read back what was written."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value
