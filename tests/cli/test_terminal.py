"""What leaves for a terminal: nothing in it is obeyed there, and nothing is endless."""

from __future__ import annotations

import json
import logging

import pytest

import lorica
import models
from lorica import formats
from lorica.cli import main
from lorica.cli._outcome import Outcome, as_json, cell, write
from lorica.data.words import excerpt, listing
from lorica.text import CONTROL, Styled, cut, one_line, printable

EVIL = "a\x1b]0;owned\x07\x9b2J\u202egpj\u2066\u2028\x85\r\ud800z"


def harmless(text: str) -> bool:
    return CONTROL.search(text) is None


@pytest.mark.parametrize("said", [printable, one_line, cut, excerpt, lambda t: listing([t])])
def test_every_way_to_quote_is_harmless(said):
    assert harmless(said(EVIL)) and "owned" in said(EVIL)
    assert said("naïve 名前 שלום 👩‍🚀") == said("naïve 名前 שלום 👩‍🚀").encode().decode()
    assert "naïve 名前 שלום 👩‍🚀" in said("naïve 名前 שלום 👩‍🚀")


def test_messages_have_an_end():
    assert len(cut("word " * 100_000)) <= 4000 and len(cut("\x1b " * 50_000)) <= 4000
    assert cut("word " * 100_000 + "Type less").endswith("Type less")
    assert len(listing(map(str, range(10**6)))) < 500 and len(excerpt(["x"] * 10**5)) == 60
    assert (
        one_line("a\nb\tc" + "d" * 9000).startswith("a\\nb\\tc")
        and len(one_line("d" * 9000)) == 500
    )


def test_outcomes_and_json(capsys):
    from rich.table import Table

    table = Table("name")
    table.add_row(cell("[/b] " + EVIL + "\n[red]"))
    write(Outcome({"name": EVIL}, (EVIL, table)), json=False)
    shown = capsys.readouterr().out
    assert harmless(shown) and "[/b] a" in shown and "[red]" in shown
    write(Outcome({"name": EVIL}), json=True)
    line = capsys.readouterr().out
    assert harmless(line) and json.loads(line) == {"name": EVIL}
    assert json.loads(as_json({"x": "\x9b"})) == {"x": "\x9b"}


def test_messages_of_a_verb(capsys, monkeypatch, tmp_path):
    def say(options):
        logging.getLogger("lorica").info("label %s", EVIL)
        logging.getLogger("lorica").info(Styled("\x1b[2mdim\x1b[0m"))
        raise ValueError(f"it says {EVIL}. " + "x " * 200_000 + "Take another")

    monkeypatch.setattr("lorica.cli.inspect.run", say)
    assert main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "\x1b[2mdim\x1b[0m" in error and harmless(error.replace("\x1b[2mdim\x1b[0m", ""))
    assert len(error) < 5000 and error.endswith("Take another\n")


def test_an_adapters_free_text_stays_in_its_line(tmp_path, capsys):
    adapters = lorica.attach(models.llama(), "lora", r=2, verbose=False)
    out = formats.save(adapters, tmp_path / "out")
    (out / "lorica.json").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "good/base\nPROBLEM: none\n  base  other"
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert main(["inspect", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "PROBLEM" in line] == [
        "  base        good/base\\nPROBLEM: none\\n  base  other, no hash"
    ]
