"""Show what an adapter folder holds: method, layers, norms, base, problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lorica.cli._outcome import Outcome, VerbOptions, cell
from lorica.run.options import HINT, PATH
from lorica.text import cut, human, one_line

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Options(VerbOptions):
    """Show what an adapter folder holds, without loading the base.

    Args:
        adapter: adapter folder written by `lorica train`, `lorica.save` or PEFT, or a
            compressed model.
    """

    adapter: tyro.conf.Positional[Annotated[str, PATH, HINT]]


def run(options: Options) -> Outcome:
    # Here, as below: torch and transformers would slow `--help`.
    from lorica import formats
    from lorica.formats.atomic_folder import home
    from lorica.formats.compressed import is_packed, read_info

    adapter = home(options.adapter)
    if is_packed(adapter):
        info = read_info(adapter)
        data = {"path": adapter, "type": "compressed", **info}
        return Outcome(data, (*map(one_line, _small(data)), _ranks(info["ranks"])))
    data = formats.inspect(adapter)
    said = map(one_line, _head(data))  # a file's free text may hold line breaks
    return Outcome(data, (*said, _table(data), *_problems(data)))


def _head(data: dict[str, Any]) -> list[str]:  # Any: what `formats.inspect` returns
    from lorica.model.token_rows import shown

    base, versions = data["base"], data["versions"]
    lines = [
        f"{data['path']} ({data['type']})",
        f"  method      {data['method']}, r={data['r']}, lora_alpha={data['lora_alpha']}",
        f"  parameters  {data['parameters']:,} in {human(data['bytes'])}"
        f" ({', '.join(data['dtypes'])})",
        f"  base        {base.get('name') or 'not named'}"
        + (f", in {base['dtype']}" if base.get("dtype") else "")
        + (f", sha256 {base['sha256'][:16]}..." if base.get("sha256") else ", no hash"),
        "  written by  " + (", ".join(f"{k} {v}" for k, v in versions.items()) or "not said"),
    ]
    if data["saved"]:
        lines.append(f"  in full     {', '.join(data['saved'])}")
    if data["tokens"]:
        tables = data["tokens"] if isinstance(data["tokens"], dict) else {"": data["tokens"]}
        each = [f"{name} {shown(ids)}".strip() for name, ids in tables.items()]
        lines.append(f"  tokens      {'; '.join(each)}")
    if data["why_not_peft"]:
        lines.append(f"  not PEFT's  {data['why_not_peft']}")
    return lines


def _table(data: dict[str, Any]) -> Table:
    from rich.table import Table  # its import would slow the start of every verb

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "out x in", "r", "scale", "norm of ΔW"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for path, layer in data["layers"].items():
        norm = "" if layer["norm"] is None else f"{layer['norm']:.4g}"
        shape = " x ".join(map(str, layer["shape"]))  # of a stack, the experts first
        table.add_row(cell(path), shape, str(layer["r"]), f"{layer['scale']:g}", norm)
    return table


def _small(data: dict[str, Any]) -> list[str]:
    whole, parts = human(data["bytes_before"]), data["parameters_before"]
    return [
        f"{data['path']} (compressed {data['class']})",
        f"  method      {data['method']}",
        f"  parameters  {data['parameters']:,} of {parts:,}, {human(data['bytes'])} of {whole}",
        f"  base        {data['base'] or 'not named'}",
        f"  written by  lorica {data['lorica']}",
    ]


def _ranks(ranks: dict[str, int]) -> Table:
    from rich.table import Table  # as above

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("r", justify="right")
    for path, r in ranks.items():
        table.add_row(cell(path), str(r))
    return table


def _problems(data: dict[str, Any]) -> list[str]:
    return [f"PROBLEM: {cut(problem)}" for problem in data["problems"]]
