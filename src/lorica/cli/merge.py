"""Merge an adapter into its base and write a plain transformers model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.run.options import (
    HINT,
    PATH,
    TEXT,
    QuantizationOptions,
    RemoteCodeOptions,
    UsageError,
    choice,
)

_SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B", re.IGNORECASE)  # of transformers' shards


@dataclass(frozen=True, kw_only=True)
class Options(QuantizationOptions, RemoteCodeOptions, VerbOptions):
    """Merge an adapter into its base and write a plain transformers model.

    The weights are computed in float32 and rounded once to the base's dtype. The command measures
    and prints how much that changes the model's output. An adapter that was trained on a quantised
    base is merged into the unquantised weights where they can be had, otherwise into the values of
    the quantised ones.

    Args:
        adapter: adapter folder written by `lorica train`, `lorica.save` or PEFT.
        output_dir: folder to write the model to.
        model: the base. Default: the one that the adapter names.
        into: of an adapter on a quantised base: `published` (the unquantised weights),
            `dequantised` (the values of the quantised weights, with which it was trained) or
            `quantised` (the merged model, quantised again). Default: `published`, or `dequantised`
            where the base is stored quantised and `--published` isn't given.
        published: the unquantised model of a base that is stored quantised.
        accept_change: write the model also where its output changes by more than rounding explains.
        max_shard_size: maximum size of one file, e.g. `5GB`.
        approximate: for updates that depend on the input of other layers: fit one matrix per
            layer on a sample of token ids, and print the error of each layer.
        ignore_base_hash: use a base other than the one that the adapter was trained on.
        overwrite: replace the model in `output_dir`.
    """

    adapter: Annotated[str, PATH, HINT]
    output_dir: Annotated[str, PATH, HINT]
    model: Annotated[str | None, PATH, HINT] = None
    into: Annotated[str | None, choice("published", "dequantised", "quantised"), HINT] = None
    published: Annotated[str | None, PATH, HINT] = None
    accept_change: bool = False
    max_shard_size: Annotated[str, TEXT, HINT] = "5GB"
    approximate: bool = False
    ignore_base_hash: bool = False
    overwrite: bool = False


def run(options: Options) -> Outcome:
    from lorica import formats
    from lorica.cli._model import quieten
    from lorica.formats.atomic_folder import check_free, home
    from lorica.formats.merge import MARKS
    from lorica.formats.safe_files import locate
    from lorica.run import card
    from lorica.run.load_model import load_base
    from lorica.run.merging import Plan

    if not _SIZE.fullmatch(options.max_shard_size):
        raise UsageError(
            f"`--max-shard-size {options.max_shard_size}`: it is a number above 0 with one of the"
            " units KB, MB, GB and TB, e.g. `--max-shard-size 5GB`"
        )
    adapter, out = home(options.adapter), Path(home(options.output_dir))
    check_free(out, overwrite=options.overwrite, marks=MARKS)
    quieten()
    trust = {"trust_remote_code": options.trust_remote_code}
    plan = Plan.of(
        adapter,
        home(options.model),
        into=options.into,
        published=home(options.published),
        wanted=options.quantization_config(),
        check_base=not options.ignore_base_hash,
        **trust,
    )
    model, tokenizer = load_base(adapter, plan.base, quantization=plan.load_as, **trust)
    adapters = formats.load(
        model, adapter, check_base=not options.ignore_base_hash, trainable=False
    )
    published = None
    if plan.published is not None:
        other, _ = load_base(adapter, plan.published, **trust)
        published = formats.load(other, adapter, check_base=False, trainable=False)
    merged = formats.merge_to(
        adapters,
        out,
        published=published,
        quantization=plan.quantise_again,
        accept_change=options.accept_change,
        tokenizer=tokenizer,
        max_shard_size=options.max_shard_size,
        approximate=options.approximate,
        overwrite=options.overwrite,
    )
    card.write(out, card.of_adapter(out, locate(adapter), "merged model"))
    each = [f"  {error:.2e}  {name}" for name, error in merged.approximated.items()]
    return Outcome(merged.as_dict(), (str(merged), *each))
