"""What the pages show runs: every python block, and every command (see `fenced`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from fenced import PAGES, ROOT, blocks, commands, make_world, shortened, without_hub

from lorica.cli import main
from lorica.cli._parse import parse

SHOWN = [page for page in PAGES if any(b.language in ("python", "bash") for b in blocks(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    torch.set_num_threads(1)
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# PEFT asks for an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# PEFT compares the vocabulary with that of the base, which it looks for on the Hub.
@pytest.mark.filterwarnings("ignore:Could not find a config file in lorica.base:UserWarning")
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_everything_shown_runs(page, folder, capsys):
    names: dict = {}
    for block in blocks(page):
        if block.file is not None:
            text = without_hub(block.text, folder)
            (folder / block.file).write_text(text, encoding="utf-8")
        elif block.language == "python":
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, names)
        elif block.language == "bash" and not block.needs_hub:
            for words in commands(block):
                words = shortened(words, folder)
                capsys.readouterr()
                status = main(words)
                assert status == 0, f"{block.place}: {words}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_of_commands_that_need_the_hub_are_right(page):
    import importlib

    for block in blocks(page):
        if block.needs_hub:
            for verb, *words in commands(block):
                options = importlib.import_module(f"lorica.cli.{verb}").Options
                made = parse(options, words, prog=f"lorica {verb}")
                getattr(made, "check", lambda: None)()


def test_every_bash_block_is_marked_or_run():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "bash", "text", "mermaid") or block.file, (
                block.place
            )
            if block.language == "bash":
                commands(block)  # raises where a line is neither run nor known
    assert ROOT / "README.md" in SHOWN
