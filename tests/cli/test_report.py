"""The page of a run: its figures are those of the run's files, it loads nothing, and making it
changes nothing of the training."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorica.cli import main
from lorica.run.report import page as pages
from lorica.run.report import samples
from lorica.run.report.chart import Chart, line
from lorica.run.report.page import Shown, figure
from lorica.run.report.read import Run
from lorica.text import CONTROL

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e \"'&"


def run_once(out: Path, *words: object) -> Path:
    status = main([str(w) for w in ("train", "--output-dir", out, "--json", *words)])
    assert status == 0
    return out


@pytest.fixture(scope="module")
def tiny(llama, text, bert, classes, tmp_path_factory) -> dict[str, Path]:
    """Folders of four runs: with a page, without one, of another rate, of a classifier."""
    home = tmp_path_factory.mktemp("runs")
    common = (
        "--model", llama, "--data", text, "--eval-fraction", 0.25, "--r", 2, "--lora-dropout", 0.2,
        "--max-steps", 6, "--per-device-train-batch-size", 4, "--logging-steps", 1,
    )  # fmt: skip
    return {
        "with": run_once(home / "with", *common),
        "without": run_once(home / "without", *common, "--no-report-html"),
        "slow": run_once(home / "slow", *common, "--learning-rate", 1e-5),
        "classes": run_once(
            home / "classes", "--model", bert, "--data", classes, "--eval-fraction", 0.5, "--r", 2,
            "--max-steps", 4, "--per-device-train-batch-size", 4,
        ),
    }  # fmt: skip


class Loads(HTMLParser):
    """What a page would fetch, and its text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.readings: list[list[dict]] = []
        self.text = ""
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._raw = tag in ("script", "style")
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                self.found.append((tag, value or ""))
            if name == "data-readings":
                self.readings.append(json.loads(value))

    def handle_data(self, data):
        self.text += "" if self._raw else data


def opened(folder: Path) -> Loads:
    return Loads((folder / "report.html").read_text(encoding="utf-8"))


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_page_changes_nothing_of_the_training(tiny):
    one, other = (read(tiny[n], "result.json") for n in ("with", "without"))
    assert one["adapter_sha256"] == other["adapter_sha256"]
    assert one["evaluation"] == other["evaluation"] and one["loss"] == other["loss"]
    names = [{p.name for p in tiny[n].iterdir()} for n in ("with", "without")]
    assert names[0] - names[1] == {"report.html", "samples.json"}


def test_asking_examples_leaves_the_statistics_of_activations_alone(llama, text, tmp_path):
    words = (
        "--model", llama, "--data", text, "--method", "prilora", "--r", 2, "--max-steps", 4,
        "--per-device-train-batch-size", 4,
    )  # fmt: skip
    one = run_once(tmp_path / "with", *words)
    other = run_once(tmp_path / "without", *words, "--no-report-html")
    assert (one / "samples.json").is_file()
    assert (
        read(one, "result.json")["adapter_sha256"] == read(other, "result.json")["adapter_sha256"]
    )


def test_every_figure_of_the_page_is_in_a_file(tiny):
    folder = tiny["with"]
    result, page = read(folder, "result.json"), opened(folder)
    for value in result["evaluation"].values():
        assert figure(value) in page.text
    for part in (f"{result['trainable']:,}", f"{result['tokens']:,}", result["model"]["sha256"]):
        assert part in page.text
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    drawn = {one["name"]: one["points"] for chart in page.readings for one in chart}
    told = {x["step"]: x for x in lines if "loss" in x}
    held = {x["step"]: x for x in lines if "eval_loss" in x}
    assert [int(p[2]) for p in drawn["training"]] == sorted(told)
    assert [int(p[2]) for p in drawn["evaluation"]] == sorted(held)
    for name, key in (
        ("training", "loss"), ("learning rate", "learning_rate"),
        ("tokens per second", "tokens_per_second"),
    ):  # fmt: skip
        for point in drawn[name]:
            value = told[int(point[2])][key]
            assert float(point[3].replace(",", "")) == pytest.approx(value, rel=0.01, abs=0.6)
    for row in read(folder, "samples.json")["rows"]:
        for key in ("prompt", "wanted", "before", "after"):
            assert row[key].strip() in page.text
    for pattern in ("model.layers.*.self_attn.q_proj", "2 layers of 16 × 16, rank 2"):
        assert pattern in page.text
    for option in ("learning_rate", "default of lora", "lora_dropout"):
        assert option in page.text


def test_the_classes_of_a_classifier_add_up(tiny):
    folder = tiny["classes"]
    result, page = read(folder, "result.json"), opened(folder)
    classes = Shown(Run.read(folder), "", 0).classes
    assert classes is not None and classes.names == ["bad", "good"]
    total = sum(map(sum, classes.table))
    assert total == result["eval_data"]["rows"] == sum(row["support"] for row in classes.rows)
    hits = sum(classes.table[i][i] for i in range(len(classes.table)))
    assert hits / total == pytest.approx(result["evaluation"]["eval_accuracy"])
    assert "Class by class" in page.text and "Confusion" in page.text
    assert {row["wanted"] for row in read(folder, "samples.json")["rows"]} <= {"bad", "good"}


def test_precision_recall_and_mistakes_are_those_of_the_counts():
    told = {"classes": ["a", "b", "c"], "counts": [[0, 0, 3], [0, 1, 1], [1, 0, 2], [1, 1, 4]]}
    found = pages.Classes.of(told)
    assert [row["name"] for row in found.rows] == ["a", "b"], "c does not occur"
    assert found.rows[0]["precision"] == 3 / 5 and found.rows[0]["recall"] == 3 / 4
    assert found.rows[0]["f1"] == pytest.approx(2 * 3 / (4 + 5))
    assert found.mistakes == [("b", "a", 2), ("a", "b", 1)]


def test_a_page_loads_nothing_and_is_small(tiny):
    for name in ("with", "slow", "classes"):
        text = (tiny[name] / "report.html").read_text(encoding="utf-8")
        assert opened(tiny[name]).found == [("link", "data:,")]
        assert not re.search(r"https?:|@import|url\(", text)
        assert len(text) < 120_000


def test_hostile_text_is_shown_and_not_obeyed(tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny["classes"], folder)
    result, told = read(folder, "result.json"), read(folder, "samples.json")
    result["confusion"]["classes"] = [HOSTILE, "fine"]
    result["data"]["name"] = result["model"]["name"] = HOSTILE
    result["layers"][0]["name"] = HOSTILE
    result["summary"]["left_out"] = {HOSTILE: HOSTILE}
    told["rows"][0] = dict.fromkeys(("prompt", "wanted", "before", "after"), HOSTILE)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples.json").write_text(json.dumps(told))
    assert main(["report", str(folder), "--json"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert Loads(text).tags.count("script") == 1, "the page's own"
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert not CONTROL.search(text) and r"\u001b[2J\u202e" in html.unescape(text)


def test_several_runs_stand_side_by_side(tiny, tmp_path, capsys, monkeypatch):
    file = tmp_path / "both.html"
    runs = [str(tiny["with"]), str(tiny["slow"])]
    assert main(["report", *runs, "--output", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(file)
    page = Loads(file.read_text(encoding="utf-8"))
    for folder in (tiny["with"], tiny["slow"]):
        for value in read(folder, "result.json")["evaluation"].values():
            assert figure(value) in page.text
    for part in ("2 runs, side by side", "learning_rate", "1e-05", "Their answers"):
        assert part in page.text
    assert "lora_dropout" not in page.text, "the same in both"
    assert all({one["name"] for one in chart} == {"with", "slow"} for chart in page.readings)
    monkeypatch.chdir(tmp_path)
    assert main(["report", *runs]) == 0 and (tmp_path / "report.html").is_file()


def test_report_refuses_what_is_no_run_and_what_is_no_page(tiny, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for words, told in (
        ([tmp_path], "holds no run"),
        ([tmp_path / "absent"], "holds no run"),
        ([tiny["with"], "--output", mine], "has not written"),
        ([tiny["with"], "--output", tmp_path], "is a folder"),
        ([tiny["with"], "--output", tmp_path / "no" / "page.html"], "there is no folder"),
    ):
        assert main(["report", *map(str, words)]) == 2
        assert told in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_stopped_run_has_a_page_of_its_steps(train, tmp_path, monkeypatch):
    from lorica.run.log import RunLog

    step_end = RunLog.on_step_end

    def die(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise RuntimeError("the power went")
        return step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunLog, "on_step_end", die)
    assert train("--r", 2, "--report-html").status == 1
    page = opened(tmp_path / "out")
    assert "stopped at step 3" in page.text and "--resume" in page.text


def test_a_page_that_fails_loses_no_run(train, tmp_path, monkeypatch):
    from lorica.run.report import page as module

    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(module, "page", fail)
    monkeypatch.setattr(samples.Continuations, "answers", fail)
    ran = train("--r", 2, "--report-html")
    assert ran.status == 0 and (tmp_path / "out" / "adapter").is_dir()
    assert "report.html was not written: RuntimeError: no ink" in ran.err
    assert "shows no examples, asking them failed: RuntimeError: no ink" in ran.err


def test_a_chart_keeps_its_ends_and_leaves_out_what_is_no_number():
    many = line("x", [(i, i) for i in range(10_000)])
    assert len(many.points) == 500 and many.points[0] == (0, 0) and many.points[-1] == (9999, 9999)
    holes = line("x", [(1, None), (2, float("nan")), (3, 2.0), (4, 200.0)])
    assert holes.points == ((3, 2.0), (4, 200.0))
    chart = Chart("t", "n", (holes,), str, last=4)
    assert chart.logarithmic and chart.readings
    for values in ([1.0], [0.0, 0.0], [-1.0, 1.0], [1e-8, 2e-8], [5e9, 5e9 + 1]):
        points = list(enumerate(values, 1))
        drawn = Chart("t", "n", (line("x", points),), str, last=len(values))
        for tick in drawn.y_ticks:
            assert -1 <= tick["top"] <= 101
        for point in json.loads(drawn.readings)[0]["points"]:
            assert -0.01 <= point[1] <= 1.01, (values, point)
