"""`python -m lorica.methods.kernels FILE`: measure the orders here, for `measured(FILE)`."""

from __future__ import annotations

import sys

import torch

from lorica.methods.kernels._measured import tabulate, usual


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m lorica.methods.kernels FILE")
    table = tabulate(usual("cuda" if torch.cuda.is_available() else "cpu"))
    table.write(arguments[0])
    print(f"{len(table.entries)} calls measured into {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
