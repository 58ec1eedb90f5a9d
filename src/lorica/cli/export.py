"""Write an adapter for another program: PEFT files, merged weights, or a compressed model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.run.options import HINT, PATH, WHOLE, RemoteCodeOptions, UsageError, choice


@dataclass(frozen=True, kw_only=True)
class Options(RemoteCodeOptions, VerbOptions):
    """Write an adapter for another program.

    Args:
        adapter: adapter folder written by `lorica train`, `lorica.save` or PEFT.
        output_dir: folder to write.
        to: `peft` (an adapter), `merged` (a whole model, as `lorica merge` writes it), or
            `compressed` (a smaller model with two thin layers in place of each adapted layer,
            for methods that remove the base; `lorica generate` and `lorica eval` read it).
        model: the base. Default: the one that the adapter names.
        r: reduce every layer to this rank, by the best approximation. Prints the error of each
            layer and the effect on the logits.
        portable: write one rank and one alpha for all layers, for servers that read nothing
            else. Exact.
        dtype: dtype of the adapter's tensors. Default: the one it was trained in.
        ignore_base_hash: use a base other than the one that the adapter was trained on.
        overwrite: replace the contents of `output_dir`.
    """

    adapter: Annotated[str, PATH, HINT]
    output_dir: Annotated[str, PATH, HINT]
    to: Annotated[str, choice("peft", "merged", "compressed"), HINT] = "peft"
    model: Annotated[str | None, PATH, HINT] = None
    r: Annotated[int | None, WHOLE, HINT] = None
    portable: bool = False
    dtype: Annotated[str | None, choice("float32", "bfloat16", "float16"), HINT] = None
    ignore_base_hash: bool = False
    overwrite: bool = False


def run(options: Options) -> Outcome:
    from lorica import formats
    from lorica.cli._model import quieten
    from lorica.formats.atomic_folder import check_free, home
    from lorica.formats.export import marks
    from lorica.formats.safe_files import locate
    from lorica.run import card
    from lorica.run.load_model import load_base

    whole = options.to != "peft"
    given = {"--r": options.r, "--dtype": options.dtype, "--portable": options.portable or None}
    if whole and (names := [name for name, value in given.items() if value is not None]):
        raise UsageError(
            f"`{names[0]}` is about an adapter's files, and `--to {options.to}` writes a model;"
            " leave one of the two out"
        )
    if options.r is not None and options.r < 1:
        raise UsageError(f"`--r {options.r}`: the rank is a whole number of at least 1")
    adapter, out = home(options.adapter), Path(home(options.output_dir))
    check_free(out, overwrite=options.overwrite, marks=marks(options.to))
    quieten()
    model, tokenizer = load_base(
        adapter, home(options.model), trust_remote_code=options.trust_remote_code
    )
    more: dict[str, Any] = {"tokenizer": tokenizer} if whole else {}
    done: Any = formats.export(
        adapter,
        out,
        to=options.to,
        model=model,
        dtype=options.dtype,
        portable=options.portable,
        r=options.r,
        check_base=not options.ignore_base_hash,
        overwrite=options.overwrite,
        **more,
    )
    what = {"peft": "adapter", "merged": "merged model"}.get(options.to, f"{options.to} model")
    card.write(out, card.of_adapter(out, locate(adapter), what))
    if whole:
        return Outcome({"to": options.to, **done.as_dict()}, (str(done),))
    return Outcome({"to": options.to, **done.as_dict()}, tuple(_lost(done)))


def _lost(done: Any) -> Iterator[str]:
    """What was written, and what is lost: by layer, and of the logits."""
    loss = "nothing is lost" if done.error == 0 else f"largest relative error {done.error:.2e}"
    yield f"PEFT adapter of rank {done.r} in {done.path}; {loss}"
    if done.errors:
        yield f"of each layer's ΔW, ‖ΔW − ΔW'‖/‖ΔW‖ by cutting to rank {done.r}:"
        yield from (f"  {error:.2e}  {name}" for name, error in done.errors.items())
    if done.approximated:
        yield "before that, of each update's output, which depends on other layers, by a matrix:"
        yield from (f"  {error:.2e}  {name}" for name, error in done.approximated.items())
    if (logits := done.logits) is not None:
        yield (
            f"logits on a sample of token ids changed by {logits.max_change:.2e} at most,"
            f" {logits.relative_change:.2e} of their size"
        )
    elif done.not_measured is not None:
        yield f"the change of the logits was not measured: {done.not_measured}"
