"""How often the chosen order of a layer's products is the fastest one, or as good as it.

    python benchmarks/orders.py [--threads 2] [--rounds 7] [--out DIR]

One adapted layer alone, float32, forward and backward of every lawful order, interleaved, over a
grid of sizes, tokens and ranks. The choice is made by counting multiplies
(`lorica.methods.kernels.base.choose`); here its time is compared with that of the fastest order. A
shape counts as met where the chosen one is within 3 % of it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
from pathlib import Path

import torch
from optimizers import processor

from lorica.methods.kernels._measured import fastest, seconds
from lorica.methods.kernels.base import Call, Order, choose

NEAR = 1.03


def grid() -> list[Call]:
    return [
        Call(tokens=tokens, in_features=m, out_features=n, r=r)
        for width in (256, 512, 1024)
        for m, n in ((width, width), (width, 8 * width // 3), (8 * width // 3, width))
        for tokens in (64, 256, 1024, 2048)
        for r in (8, 16, 64)
    ]


def name(order: Order) -> str:
    forward = "sum" if order.forward_sum else "factors"
    back = "sum" if order.input_sum else "factors"
    return f"{forward}, {back} {'outer' if order.outer else 'small'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder; write the table there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, slower, plain = [], [], []
    for call in grid():
        times = seconds(call, options.rounds)
        best, chosen = fastest(times), choose(call)

        def total(order: Order, times: dict[Order, tuple[float, float]] = times) -> float:
            return min(t[0] for o, t in times.items() if o.forward_sum == order.forward_sum) + min(
                t[1] for o, t in times.items()
                if (o.input_sum, o.outer) == (order.input_sum, order.outer)
            )  # fmt: skip

        slower.append(total(chosen) / total(best))
        plain.append(total(Order()) / total(chosen))
        rows.append(
            f"| {call.tokens} | {call.in_features} x {call.out_features} | {call.r} |"
            f" {name(chosen)} | {total(chosen) * 1e3:.2f} | {name(best)} | {slower[-1]:.3f} |"
            f" {plain[-1]:.3f} |"
        )
    met = sum(ratio <= NEAR for ratio in slower)
    lines = [
        "# Orders of a layer's products",
        "",
        f"{datetime.date.today()}, {processor()}, {options.threads} thread(s), torch"
        f" {torch.__version__}, float32, the fastest of {options.rounds} rounds."
        " `python benchmarks/orders.py`",
        "",
        f"Within 3 % of the fastest order: {met} of {len(slower)} shapes ({met / len(slower):.0%})."
        f" Chosen over fastest: median {statistics.median(slower):.3f}, worst {max(slower):.3f}."
        f" The factors' own order costs {statistics.median(plain):.3f} of the chosen one (median),"
        f" {max(plain):.3f} at most.",
        "",
        "| tokens | in x out | r | chosen | ms | fastest | chosen / fastest | factors / chosen |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Load at the end: {os.getloadavg()[0]:.1f}.",
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        page = options.out / f"orders-{datetime.date.today()}.md"
        page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
