"""Reads `adapter_config.json`: checks its values, and finds the recipe that computes the same.

Nothing here needs a model; `read.py` resolves the configuration's patterns on one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lorica.formats.fields import NUMBER, Field, check_fields, one_of
from lorica.formats.peft.names import SHADOWS
from lorica.formats.peft.places import LORA
from lorica.methods.choice import AXES, method_name
from lorica.methods.deltas.base import DeltaChoice, PeftForm
from lorica.methods.optional import ReadsAsLora
from lorica.methods.ranks.base import ENDS
from lorica.patterns import Endless, flaw
from lorica.patterns import find as find_matches
from lorica.recipe.compatibility import MOST, MOST_R, tokens
from lorica.recipe.recipe import Recipe
from lorica.recipe.registry import find, names
from lorica.text import shorten

# The values of a JSON object. Any: what each is, the tables below say and `check_values` checks.
Config = Mapping[str, Any]

_RANK = Field(
    types=(int,), fits=lambda r: 1 <= r <= MOST_R,
    allowed="a whole number of at least 1, and of at most a layer's size",
)  # fmt: skip
_ALPHA = Field(
    types=NUMBER, fits=lambda a: 0 < a <= MOST, allowed="a positive number that float32 holds"
)
_DROPOUT = Field(types=NUMBER, fits=lambda p: 0 <= p < 1, allowed="a probability in [0, 1)")
_TEXT = Field(types=(str,))
_NAMES = Field(types=(list, str), items=(str,))
FIELDS = {  # of every type of PEFT's that is read
    "peft_type": _TEXT, "r": _RANK, "target_modules": _NAMES,
    "target_parameters": Field(types=(list,), items=(str,)),
    "exclude_modules": _NAMES, "modules_to_save": Field(types=(list,), items=(str,)),
    "layers_to_transform": Field(types=(list, int), items=(int,)), "layers_pattern": _NAMES,
    "bias": _TEXT, "task_type": _TEXT, "peft_version": _TEXT, "base_model_name_or_path": _TEXT,
}  # fmt: skip
_PAIR_FIELDS = {
    "lora_alpha": _ALPHA, "lora_dropout": _DROPOUT,
    "use_rslora": Field(types=(bool,)), "init_lora_weights": Field(types=(bool, str)),
    "rank_pattern": replace(_RANK, types=(dict,), items=(int,)),
    "alpha_pattern": replace(_ALPHA, types=(dict,), items=NUMBER),
    "fan_in_fan_out": Field(types=(bool,)), "ensure_weight_tying": Field(types=(bool,)),
    "trainable_token_indices": Field(types=(list, dict), items=(int, list)),
}  # fmt: skip


class Use(NamedTuple):
    """How a pattern is matched with modules' paths; see `lorica.patterns.find`."""

    form: str
    how: Literal["fullmatch", "match"]


USED_AS = {
    "target_modules": Use("{}", "fullmatch"),
    "exclude_modules": Use("{}", "fullmatch"),
    "modules_to_save": Use(SHADOWS, "match"),
    "layers_pattern": Use(r"(?:^|.*?\.){}\.(\d+)\.", "match"),
    "rank_pattern": Use(ENDS, "fullmatch"),
    "alpha_pattern": Use(ENDS, "fullmatch"),
}
# They say where the file comes from.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
}  # fmt: skip
# They belong to a start that `init_lora_weights` names.
_PAIR_IGNORED = {
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_STARTS = {True, False, "gaussian", "eva", "orthogonal", "mica"}  # leave the base as it is
_LOST = {  # start -> why the base that the adapter was trained on is not available
    "corda": "its base was corrected by calibration data that the file doesn't hold",
    "lora_ga": "its base was corrected by gradients that the file doesn't hold",
    "loftq": "it was trained on a base quantised on the fly, whose bytes the file doesn't hold",
}
_PROMPTS = {  # they hold tokens of a prompt, and no update of the weights
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "CARTRIDGE",
}  # fmt: skip
_NEVER_MERGED = {"ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"}  # not by PEFT (0.21) either
_RANDOM = "its base was corrected by a random decomposition that the file doesn't hold"
CONVERT = (
    "convert it where it was trained: `model.save_pretrained(out,"
    " path_initial_model_for_weight_conversion=...)`"
)


class Unsupported(ValueError):
    """The file is well formed, and asks for something that is not implemented here."""


class Method(NamedTuple):
    """What computes the same as PEFT does.

    Attributes:
        text: of the recipe.
        fields: of the recipe, beside r and the names of modules.
        frozen_start: PEFT takes this start out of the base as it loads the file.
    """

    text: str
    fields: dict[str, Any]  # Any: fields of `Recipe`, each of its own type
    frozen_start: bool = False


def check_values(data: Config, file: Path) -> None:
    """Every value has a type and a range that PEFT gives it, whether it is in use or not.

    Raises:
        ValueError: naming those that don't.
    """
    check_fields(data, {**FIELDS, **dict.fromkeys(flags(), Field(types=(bool,)))}, file)
    if data.get("peft_type") == LORA:
        check_fields(data, {**_PAIR_FIELDS, "bias": one_of("none", "all", "lora_only")}, file)
        _check_tokens(data, file)
    elif (form := _forms().get(str(data.get("peft_type")))) is not None:
        biases = one_of("none", "all", "lora_only", form.bias)
        own = {form.dropout: _DROPOUT, "bias": biases}
        if form.transposed is not None:
            own[form.transposed] = Field(types=(bool,))
        check_fields(data, own, file)
    check_expressions(data, file)


def _check_tokens(data: Config, file: Path) -> None:
    """Token ids are what a recipe takes, too.

    Raises:
        ValueError: they aren't.
    """
    try:
        tokens(data.get("trainable_token_indices") or None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_expressions(data: Config, file: Path) -> None:
    """Every pattern of a configuration, PEFT's or a recipe, is a regular expression where it is
    used as one.

    Raises:
        ValueError: naming the first that isn't.
    """
    for key, pattern in _expressions(data):
        if (why := flaw(pattern, USED_AS[key].form)) is not None:
            raise ValueError(
                f"{file}: `{key}` has {shorten(pattern)}, which is no regular expression"
                f" ({why}). Correct the file, or copy it again from where it came"
            )


def _expressions(data: Config) -> list[tuple[str, str]]:
    """(key, what the configuration gives to the matcher of regular expressions)."""
    found = [(key, data.get(key)) for key in ("target_modules", "exclude_modules")]
    out = [(key, spec) for key, spec in found if isinstance(spec, str)]
    for key in ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern"):
        held = data.get(key) or ()
        out += [(key, p) for p in ([held] if isinstance(held, str) else held)]
    return out


def check_ending(data: Config, names: Iterable[str], file: Path) -> None:
    """Matching the patterns of a checked configuration, PEFT's or a recipe, with these names comes
    to an end. So a file that takes for ever is refused before there is a model.

    Raises:
        ValueError: it does not.
    """
    given: dict[Use, list[str]] = {}
    for key, pattern in _expressions(data):
        given.setdefault(USED_AS[key], []).append(pattern)
    names = list(names)
    with of_file(file):
        for use, patterns in given.items():
            find_matches(patterns, names, form=use.form, how=use.how)


@contextlib.contextmanager
def of_file(file: Path) -> Iterator[None]:
    """Names the file in an error about matching that took too long.

    Raises:
        ValueError: such an error.
    """
    try:
        yield
    except Endless as error:
        raise ValueError(f"{file}: {error}") from None


def method_of(data: Config, file: Path) -> Method:
    """The method of a configuration that `check_values` let pass.

    Raises:
        Unsupported: another type of PEFT's, a start that can't be had, or a switch that changes
            what is computed and isn't implemented here.
        ValueError: a key that is missing.
    """
    if (form := _forms().get(str(data.get("peft_type")))) is not None:
        return _own_method(data, form, file)
    if data.get("peft_type") != LORA:
        synonyms = {c.peft_synonym for c in _deltas() if issubclass(c, ReadsAsLora)}
        others = "".join(f" and {name}" for name in sorted({*_forms(), *synonyms}))
        raise Unsupported(
            f"{file}: `peft_type` is {shorten(data.get('peft_type'))}; read are LORA files (LoRA,"
            f" DoRA, rsLoRA, OLoRA, PiSSA, ...){others}. {_elsewhere(data)}"
        )
    targets = set[str]() if data.get("target_parameters") else {"target_modules"}
    _complete(data, {"r", "lora_alpha", *targets}, file)
    known = {*FIELDS, *_PAIR_FIELDS, *_IGNORED, *_PAIR_IGNORED, *flags()}
    _refuse_others(data, known, file)
    start = _frozen_start(data, file)
    wanted = {key: data[key] for key in flags() if data.get(key)}
    rooted = bool(data.get("use_rslora"))
    names = [
        _first("scales", lambda c: c.peft_rslora is rooted),
        _first("combine", lambda c: c.peft_flags is not None and dict(c.peft_flags) == wanted),
        start or str(AXES["inits"].default),
    ]
    fields = {
        "lora_alpha": data["lora_alpha"],
        "lora_dropout": data.get("lora_dropout") or 0.0,
        "lora_dropout_on": "delta" if start else "update",  # PEFT's base has no dropout
        "bias": data.get("bias") or "none",
        "rank_pattern": dict(data.get("rank_pattern") or {}),
        "alpha_pattern": dict(data.get("alpha_pattern") or {}),
    }
    return Method("+".join(names), fields, start is not None)


def _own_method(data: Config, form: PeftForm, file: Path) -> Method:
    """The same for a type that a delta declares as PEFT's own."""
    _complete(data, {"r", "target_modules"}, file)
    # The layers themselves say how they store their weight.
    known = {*FIELDS, *_IGNORED, *form.fields, form.dropout}
    known |= {form.transposed} if form.transposed is not None else set()
    _refuse_others(data, known, file)
    if (choice := own_choice(data)) is None:
        given = ", ".join(f"`{k}={shorten(data.get(k))}`" for k in form.fields)
        raise Unsupported(
            f"{file}: a {form.peft_type} adapter with {given} is not known here. {_elsewhere(data)}"
        )
    bias = data.get("bias") or "none"
    fields = {
        "lora_dropout": data.get(form.dropout) or 0.0,
        "bias": "lora_only" if bias == form.bias else bias,
    }
    return Method(choice.text(), fields)


def _elsewhere(data: Config) -> str:
    """What to do with a file that PEFT alone reads."""
    kind = str(data.get("peft_type"))
    with_peft = "Use it with PEFT (`PeftModel.from_pretrained(base, folder)`)"
    if kind in _PROMPTS:
        return (
            f"{with_peft}: it holds the tokens of a prompt and no update of the weights, so there"
            " is nothing to merge. Or train an adapter here"
        )
    if kind in _NEVER_MERGED:
        return f"{with_peft}, which can't merge this type into the base; or train an adapter here"
    return (
        "Merge it with PEFT (`PeftModel.from_pretrained(base, folder).merge_and_unload()`) and use"
        " the merged model, or train an adapter here"
    )


def recipe_of(data: Config, file: Path) -> Recipe:
    """The recipe of a checked configuration, before its patterns are resolved on a model.

    Raises:
        Unsupported: see `method_of`.
        ValueError: a value that no recipe takes.
    """
    method = method_of(data, file)
    names = {
        "target_modules": data.get("target_modules") or (),
        "target_parameters": data.get("target_parameters") or None,
    }
    return build_recipe(data, method, file, **names)


def build_recipe(data: Config, method: Method, file: Path, **names: Any) -> Recipe:
    """A recipe of a configuration's numbers.

    Args:
        names: fields of `Recipe` that name modules, and others that replace the method's own.

    Raises:
        ValueError: a value that no recipe takes.
    """
    try:
        return Recipe.parse(method.text, r=data["r"], **{**method.fields, **names})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def is_synonym(data: Config) -> bool:
    """Whether the file is of a type that `as_plain` rewrites."""
    kind = data.get("peft_type")
    return any(issubclass(c, ReadsAsLora) and c.peft_synonym == kind for c in _deltas())


def as_plain(
    data: Config, tensors: Mapping[str, Tensor], file: Path
) -> tuple[Config, Mapping[str, Tensor]]:
    """Rewrite a file that a delta can read as an ordinary LORA; others are returned as they are.

    Raises:
        ValueError: a value or a tensor that is not of that type.
    """
    for choice in _deltas():
        if issubclass(choice, ReadsAsLora) and data.get("peft_type") == choice.peft_synonym:
            try:
                return choice.as_plain(data, tensors)
            except ValueError as error:
                raise ValueError(
                    f"{file}: not what a file with `peft_type` {choice.peft_synonym!r} holds:"
                    f" {error}. Save the adapter again with PEFT, or merge it there"
                ) from None
    return data, tensors


def left_out(data: Config) -> frozenset[str]:
    """Keys of tensors that all layers share and that the file leaves out: they are made anew."""
    form = _forms().get(str(data.get("peft_type")))
    if form is None or form.shared_in_file is None or data.get(form.shared_in_file, True):
        return frozenset()
    return frozenset(form.shared.values())


def suffixes(data: Config) -> tuple[str, ...]:
    """How the keys of an adapter's tensors go on after the module's path."""
    form = _forms().get(str(data.get("peft_type")))
    return (".lora_",) if form is None else tuple(f".{end}" for end in form.tensors.values())


def own_choice(data: Config) -> DeltaChoice | None:
    """The delta that computes what PEFT does under this configuration, where that is not LORA."""
    found = (c.from_peft(data) for c in _deltas())
    return next((choice for choice in found if choice is not None), None)


def flags() -> set[str]:
    """The switches of PEFT's under which it computes one of the combines."""
    return {flag for c in _choices("combine") for flag in c.peft_flags or {}}


def _choices(axis: str) -> Iterable[Any]:  # Any: the abstract class is another one for each axis
    return [find(name, axis) for name in names(axis)]


def _deltas() -> list[type[DeltaChoice]]:
    return [c for c in _choices("deltas") if issubclass(c, DeltaChoice)]


def _forms() -> dict[str, PeftForm]:
    """{type of PEFT's own: the form of one of the deltas that use it}."""
    forms = [c().peft_form() for c in _deltas()]
    return {form.peft_type: form for form in forms if form is not None}


def _first(axis: str, fits: Callable[[Any], bool]) -> str:  # Any: see `_choices`
    """The axis' default if it fits, else the first method that does."""
    found = [name for name in names(axis) if fits(find(name, axis))]
    usual = AXES[axis].default
    return usual if usual in found else found[0]


def _frozen_start(data: Config, file: Path) -> str | None:
    """Name of the init whose start PEFT takes out of the base as it loads this file."""
    start = data.get("init_lora_weights")
    if start is None or start in _STARTS:
        return None
    why = _LOST.get(str(start))
    for cls in _choices("inits"):
        frozen = cls.peft_frozen_start
        if frozen is not None and frozen == str(start).lower():
            return method_name(cls)
        if frozen is not None and str(start).startswith(f"{frozen}_"):  # and a count of iterations
            why = _RANDOM
    why = why or "this start is unknown, and so is what it did to the base"
    raise Unsupported(
        f"{file}: an adapter with `init_lora_weights={shorten(start)}` can't be read: {why};"
        f" {CONVERT}"
    )


def _complete(data: Config, wanted: set[str], file: Path) -> None:
    if missing := sorted(wanted - {k for k, v in data.items() if v}):
        raise ValueError(f"{file}: {missing} must be given; PEFT writes them always")


def _refuse_others(data: Config, known: set[str], file: Path) -> None:
    """Nothing else is switched on.

    Raises:
        Unsupported: naming the switches.
    """
    strange = {
        key: value
        for key, value in data.items()
        if key not in known and value and value != _DEFAULTS.get(key)
    }
    if strange:
        some = ", ".join(
            f"`{shorten(k)[1:-1]}={shorten(v)}`" for k, v in sorted(strange.items())[:8]
        )
        raise Unsupported(
            f"{file}: {some} changes what the adapter computes and is not implemented here. Merge"
            " the adapter with PEFT, or train it without"
        )
