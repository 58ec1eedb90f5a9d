"""A run that is killed at any moment, and resumed, is the run that nobody killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from killed_runs import TUNING, Subjects, methods, tortured
from killing import Aim, Nursery, Snapshot, chain

METHODS = methods()
KILLS = 4  # of each method in the slow part; benchmarks/kills.py has more


def check(nursery: Nursery, subjects: Subjects, method: str, kills: int, out: Path) -> None:
    count, refused = tortured(nursery, subjects, method, METHODS.index(method), kills, out)
    assert not count.differences, "\n".join(dict.fromkeys(count.differences))
    assert count.lost == 0
    assert count.kills == count.survived >= kills - 1  # a run can be done before the kill comes
    assert len(refused) < 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_is_straight(method, nursery, subjects, tmp_path):
    check(nursery, subjects, method, KILLS, tmp_path / "runs")


@pytest.mark.parametrize("aim", [
    Aim("step", 1, 0.0), Aim("evaluation", 3, 0.0), Aim("checkpoint", 2, 0.02),
    Aim("checkpoint", 5, 0.0), Aim("end", 1, 0.02),
], ids=lambda aim: f"{aim.phase} {aim.nth}")  # fmt: skip
def test_a_kill_at(aim, nursery, subjects, straight, tmp_path):
    words = straight_words(straight)
    count = chain(nursery, words, tmp_path / "out", straight[1], 1, iter([aim]))
    assert not count.differences, "\n".join(count.differences)
    assert (count.kills, count.survived, count.lost) == (1, 1, 0)


@pytest.mark.parametrize("setting", range(len(TUNING)))
def test_no_line_is_written_twice(setting, nursery, subjects, tmp_path):
    """The last pass's end, and the last step's, evaluate once; so does a start that evaluates."""
    words = [*subjects.words("train", "lora", setting), "--output-dir", tmp_path / "out"]
    child = nursery.run(words)
    assert child.status == 0, child.said
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    kinds = [(line["step"], "loss" in line) for line in lines]
    assert len(kinds) == len(set(kinds)) and kinds == sorted(kinds, key=lambda kind: kind[0])


def test_the_best_evaluation_has_a_checkpoint(nursery, subjects, tmp_path):
    """Else other weights would be kept than those whose figures are told."""
    words = subjects.words("train", "lora", 3)
    child = nursery.run([*words, "--load-best-model-at-end", "--output-dir", tmp_path / "out"])
    assert child.status == 2 and "not every evaluation has a checkpoint" in child.said
    child = nursery.run([*words, "--output-dir", tmp_path / "out"])
    assert child.status == 0, child.said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["best_step"] is None


def test_a_comparison_finds_a_flipped_bit(straight, tmp_path):
    """The differences that the other tests count can be found at all."""
    shutil.copytree(straight[0], tmp_path / "out")
    file = next((tmp_path / "out" / "model").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    log = tmp_path / "out" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    found = straight[1].differences(Snapshot.of(tmp_path / "out"))
    names = {text.split(":")[0] for text in found}
    assert f"model/{file.name}" in names and "metrics.jsonl, lines" in names


def straight_words(straight) -> list[object]:
    """The words of the straight run, without its folder."""
    return straight[2].words[:-2]
