"""`lorica doctor`: what it finds, and that a broken part is told and hides no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_repo import project

from lorica.run import doctor


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch):
    """Few steps, and no import of large packages."""
    monkeypatch.setattr(doctor, "STEPS", 4)
    monkeypatch.setattr(doctor, "CUT", 2)
    monkeypatch.setattr(doctor, "OPTIONAL", {"a_broken_one": "--broken", "not_there": "--nothing"})


def test_the_self_test_passes_and_a_broken_package_is_told(lorica, tmp_path, monkeypatch):
    (tmp_path / "a_broken_one.py").write_text(f"raise RuntimeError('no {Path.home()}/lib.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = lorica("doctor", "--json")
    assert ran.status == 1
    told = ran.json
    test = told["self_test"]
    assert test["loss_falls"] and test["saved_equals_live"] and test["resumed_equals_straight"]
    assert told["versions"]["torch"] and told["resources"]["disk_free"] > 0
    assert told["optional"]["not_there"]["state"] == "missing"
    (problem,) = told["problems"]
    assert "a_broken_one is installed and can't be imported (RuntimeError: no ~/lib.so)" in problem
    assert "--broken" in problem and str(Path.home()) not in ran.out


def test_a_part_that_fails_hides_no_other(lorica, monkeypatch):
    def fails(*args, **kwargs):
        raise ImportError("libcudart.so is not there")

    monkeypatch.setattr(doctor, "train_a_little", fails)
    monkeypatch.setattr(doctor, "devices", fails)
    ran = lorica("doctor")
    assert ran.status == 1
    for line in (
        "  FAILED: ImportError: libcudart.so is not there",
        "self-test failed: ImportError: libcudart.so is not there",
        "  not_there           not installed   for --nothing",
        "2 problem(s):",
    ):
        assert line in ran.out
    sound = {"self_test": None, "devices": {}, "resources": {}, "optional": {}}
    versions = dict.fromkeys(doctor.REQUIRED, "1.0")
    assert doctor.problems({**sound, "versions": versions}) == []
    (missing,) = doctor.problems({**sound, "versions": {**versions, "tyro": None}})
    assert missing.startswith("tyro is not installed")


def test_the_packages_are_those_of_the_metadata():
    assert sorted(doctor.REQUIRED) == [r.split(">=")[0] for r in project()["dependencies"]]
