"""Write an adapter for another program: PEFT's files, or merged weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorica.cli._outcome import Outcome, VerbOptions
from lorica.train.options import HINT, PATH, WHOLE, UsageError, choice


@dataclass(frozen=True, kw_only=True)
class Options(VerbOptions):
    """Write an adapter for another program.

    Args:
        adapter: a folder that `lorica train`, `lorica.save` or PEFT wrote.
        output_dir: where it goes.
        to: `peft` (an adapter), or `merged` (a whole model, as `lorica merge` writes it).
        model: the base. Default: the one that the adapter names.
        r: cut every layer to this rank, to the best approximation; its error is printed.
        portable: for servers that read one rank and one alpha and nothing else. Exact.
        dtype: of the adapter's tensors. Default: the one it was trained in.
        ignore_base_hash: take a base that is not the one it was trained on.
        overwrite: replace what is in `output_dir`.
    """

    adapter: Annotated[str, PATH, HINT]
    output_dir: Annotated[str, PATH, HINT]
    to: Annotated[str, choice("peft", "merged"), HINT] = "peft"
    model: Annotated[str | None, PATH, HINT] = None
    r: Annotated[int | None, WHOLE, HINT] = None
    portable: bool = False
    dtype: Annotated[str | None, choice("float32", "bfloat16", "float16"), HINT] = None
    ignore_base_hash: bool = False
    overwrite: bool = False


def run(options: Options) -> Outcome:
    from lorica import io
    from lorica.cli._model import quieten
    from lorica.io.folder import ADAPTER_MARKS, check_free
    from lorica.io.merged import MARKS
    from lorica.train.load import load_base

    merged = options.to == "merged"
    given = {"--r": options.r, "--dtype": options.dtype, "--portable": options.portable or None}
    if merged and (names := [name for name, value in given.items() if value is not None]):
        raise UsageError(
            f"`{names[0]}` is about an adapter's files, and `--to merged` writes a model; leave one"
            " of the two out"
        )
    if options.r is not None and options.r < 1:
        raise UsageError(f"`--r {options.r}`: the rank is a whole number of at least 1")
    out = Path(options.output_dir).expanduser()
    check_free(out, overwrite=options.overwrite, marks=MARKS if merged else ADAPTER_MARKS)
    quieten()
    model, tokenizer = load_base(options.adapter, options.model)
    more: dict[str, Any] = {"tokenizer": tokenizer} if merged else {}
    done: Any = io.export(
        options.adapter,
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
    if merged:
        return Outcome({"to": options.to, **done.as_dict()}, (str(done),))
    loss = "nothing is lost" if done.error == 0 else f"largest relative error {done.error:.2e}"
    each = [f"  {error:.2e}  {name}" for name, error in done.errors.items() if error]
    return Outcome(
        {"to": options.to, **done.as_dict()},
        (f"PEFT adapter of rank {done.r} in {done.path}; {loss}", *each),
    )
