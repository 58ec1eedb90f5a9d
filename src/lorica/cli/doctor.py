"""Check the installation: versions, devices, optional packages, and a 20-step training run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorica.cli._outcome import Outcome, VerbOptions


@dataclass(frozen=True, kw_only=True)
class Options(VerbOptions):
    """Check the installation, and print a block to paste into a bug report.

    Lists versions, devices, free disk and memory, and which optional packages are there. Then
    trains the embedded model for 20 steps and checks that the loss falls, that the saved adapter
    gives the same logits, and that a resumed run ends in the same adapter. Nothing is downloaded or
    sent. User names and home folders are left out. The exit status is 1 if there is a problem.

    Args:
        self_test: train for 20 steps.
    """

    self_test: bool = True


def run(options: Options) -> Outcome:
    from lorica.run.doctor import examine

    facts = examine(self_test=options.self_test)
    report = ["```text", *_report(facts), "```"]
    if problems := facts["problems"]:
        end = [f"{len(problems)} problem(s):", *(f"- {problem}" for problem in problems)]
    else:
        end = ["no problems found"]
    lines = ["paste this into a bug report:", "", *report, "", *end]
    return Outcome(facts, tuple(lines), status=1 if problems else 0)


def _report(facts: dict[str, Any]) -> Iterator[str]:  # Any: what `examine` returns
    for part, lines in (
        ("versions", _versions),
        ("devices", _devices),
        ("resources", _resources),
        ("optional", _optional),
        ("self_test", _self_test),
    ):
        about = facts[part]
        if about is None:
            continue
        yield f"{part.replace('_', '-')}:"
        told = [f"FAILED: {about['error']}"] if "error" in about else lines(about)
        yield from (f"  {line}" for line in told)


def _versions(about: dict[str, Any]) -> list[str]:
    return [f"{name:<20}{version or 'NOT INSTALLED'}" for name, version in about.items()]


def _devices(about: dict[str, Any]) -> list[str]:
    from lorica.model.summary import human

    cpu = about["cpu"]
    lines = [f"{'cpu':<20}{cpu['cores']} cores, {cpu['threads']} threads"]
    for index, gpu in enumerate(about["cuda"]):
        free = f"{human(gpu['free'])} of {human(gpu['memory'])} free"
        lines.append(f"{f'cuda:{index}':<20}{gpu['name']}, {free}, CUDA {about['cuda_version']}")
    return [*lines, *([f"{'mps':<20}available"] if about["mps"] else [])]


def _resources(about: dict[str, Any]) -> list[str]:
    from lorica.model.summary import human

    return [f"{name.replace('_', ' '):<20}{human(size)}" for name, size in about.items()]


def _optional(about: dict[str, Any]) -> list[str]:
    lines = []
    for name, package in about.items():
        state = {"installed": package["version"] or "installed", "missing": "not installed"}.get(
            package["state"], f"BROKEN ({package.get('error')})"
        )
        lines.append(f"{name:<20}{state:<16}for {package['needed_by']}")
    return lines


def _self_test(about: dict[str, Any]) -> list[str]:
    loss = about["loss"]
    told = {True: "yes", False: "NO"}
    return [
        f"{about['steps']} steps on {about['device']} in {about['seconds']} s,"
        f" {about['tokens_per_second']:,.0f} tokens/s",
        f"{'loss falls':<28}{told[about['loss_falls']]} ({loss['first']:.3f} to"
        f" {loss['last']:.3f})",
        f"{'saved equals live':<28}{told[about['saved_equals_live']]}",
        f"{'resumed equals straight':<28}{told[about['resumed_equals_straight']]}",
    ]
