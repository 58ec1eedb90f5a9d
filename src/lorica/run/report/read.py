"""A run as its folder tells it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.run import config
from lorica.run.folder import SAMPLES, RunFolder
from lorica.run.options import UsageError
from lorica.text import parse_json, to_path

Values = dict[str, Any]  # of a JSON or YAML file


@dataclass(frozen=True)
class Run:
    """What the files of a run's folder hold.

    Attributes:
        folder: where it is.
        name: of the run among others.
        config: config.yaml.
        defaults: {option: its value, and what chose it}, of those that were not given.
        lines: of metrics.jsonl.
        result: result.json; None: the run did not come to its end.
        samples: samples.json; None: there are none.
    """

    folder: Path
    name: str
    config: Values
    defaults: config.Defaults
    lines: list[Values]
    result: Values | None
    samples: Values | None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run's folder.

        Raises:
            UsageError: no run is in it, or one that took no step.
        """
        path = to_path(folder)
        told = config.read(path) if path.is_dir() else None
        if told is None:
            raise UsageError(
                f"`{folder}` holds no run: a folder that `lorica train` or `lorica pretrain` has"
                " written is wanted, with its config.yaml"
            )
        run = cls(
            folder=path,
            name=path.resolve().name,
            config=told,
            defaults=config.read_defaults(path),
            lines=RunFolder(path).lines(),
            result=_mapping(path / "result.json"),
            samples=_mapping(path / SAMPLES),
        )
        if run.result is None and not run.lines:
            raise UsageError(
                f"the run in `{folder}` has logged no step yet, so there is nothing to show; wait"
                " for its first step, or continue it with `--resume`"
            )
        return run

    @property
    def training(self) -> list[Values]:
        """The lines of training steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[Values]:
        """The lines of evaluations, the last one of each step."""
        found = {line["step"]: line for line in self.lines if "eval_loss" in line}
        return [found[step] for step in sorted(found)]

    @property
    def steps(self) -> int:
        """The last step."""
        taken = max((int(line["step"]) for line in self.lines), default=0)
        return max(taken, int((self.result or {}).get("steps") or 0))

    @property
    def verb(self) -> str:
        """The command that made it."""
        return "pretrain" if "model_config" in self.config else "train"

    @property
    def output(self) -> Path | None:
        """The folder of what was trained, beside this run's other files."""
        name = Path(str((self.result or {}).get("output") or "-")).name
        place = self.folder / name
        return place if name in ("adapter", "model") and place.is_dir() else None

    @property
    def output_bytes(self) -> int | None:
        """Size of its tensors."""
        if self.output is None:
            return None
        return sum(file.stat().st_size for file in self.output.glob("*.safetensors"))


def _mapping(file: Path) -> Values | None:
    with contextlib.suppress(OSError, ValueError):
        told = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else None
        return told if isinstance(told, dict) else None
    return None
