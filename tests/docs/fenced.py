"""Fenced blocks of a Markdown page, and how a page's commands are run here.

What a block's language means:

* `python`: executed; the blocks of a page share their names.
* `bash`: its `lorica` commands run in this process, in order, in one temporary folder for each
  page. Lines that begin with one of `OTHER_COMMANDS` are not run. Anything else is an error.
* any language below `<!-- file: NAME -->`: written to the folder under that name.
* below `<!-- needs the hub -->`: the options are parsed and checked, and nothing is run.

What is replaced in a command, and nothing else:

* the hub models in `HUB_MODELS` are tiny random models of the same family, made by `make_world`;
* `lorica train` gets `--max-steps 2` where the command neither says how long it runs nor reads a
  file that does, in place of a longer `--max-steps`, and `--max-samples 24` on the embedded data;
  `lorica pretrain` gets `--max-steps 2` in the same way. A checkpoint that a command names is
  then the one of step 2.
* `lorica doctor` gets `--no-self-test`: its status tells of the machine.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OTHER_COMMANDS = {"make", ".", "pip", "tensorboard", "git", "python", "torchrun"}
LENGTHS = {"--num-train-epochs", "--max-tokens", "--resume", "--dry-run"}
HUB_MODELS = {
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
    "google-t5/t5-small": "t5",
}

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>needs the hub|file: (?P<file>\S+)) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    file: str | None
    needs_hub: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("language")) + 1,
            language=match["language"],
            text=match["text"],
            file=match["file"],
            needs_hub=match["mark"] == "needs the hub",
        )
        for match in _FENCE.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """The words after `lorica` of each of the block's commands."""
    found = []
    lines = re.sub(r"\\\n\s*", " ", block.text)
    for words in _split(lines):
        if words[0] == "lorica":
            found.append(words[1:])
        elif words[0] not in OTHER_COMMANDS:
            raise AssertionError(f"{block.place}: `{words[0]}` is neither run nor known")
    return found


def _split(text: str) -> list[list[str]]:
    """Lines as a shell splits them; a quoted text may go over several."""
    out, held = [], ""
    for line in text.splitlines():
        held += line
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # a quote is open
            held += "\n"
            continue
        held = ""
        if words:
            out.append(words)
    assert not held, f"an open quote: {held!r}"
    return out


def without_hub(text: str, folder: Path) -> str:
    """The tiny models' folders in place of the hub's names."""
    for name, made in HUB_MODELS.items():
        text = text.replace(name, str(folder / made))
    return text


def shortened(words: list[str], folder: Path) -> list[str]:
    """The command as it is run here."""
    words = [without_hub(word, folder) for word in words]
    words = [re.sub(r"(?<=/checkpoint-)\d+$", "2", word) for word in words]
    if words[0] == "doctor":
        return [*words, "--no-self-test"]
    if words[0] not in ("train", "pretrain"):
        return words
    if "--max-steps" in words:
        words[words.index("--max-steps") + 1] = "2"
    elif not LENGTHS & set(words) and words[1].startswith("--"):
        words += ["--max-steps", "2"]
    if (
        words[0] == "train"
        and not {"--data", "--resume"} & set(words)
        and words[1].startswith("--")
    ):
        words += ["--max-samples", "24"]
    return words


def make_world(folder: Path) -> None:
    """The data that the pages speak of, and tiny models for those of the hub."""
    from transformers import AutoTokenizer

    import models
    from lorica import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.base_path(), model_max_length=2048)
    sizes = {"vocab_size": len(tokenizer)}
    marks = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    long = {"max_position_embeddings": 2048}
    for name, model in {
        "llama": models.llama(**sizes, **long, **marks),
        "bert": models.bert_masked(**sizes, **long),
        "t5": models.t5(**sizes, **{**marks, "decoder_start_token_id": tokenizer.pad_token_id}),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    story = [f"Day {i}.\nThe cat sat on mat {i} and the dog saw it." for i in range(12)]
    (folder / "story.txt").write_text("\n\n".join(story) + "\n", encoding="utf-8")
    (folder / "novels").mkdir()
    for name in ("train", "valid"):
        pages = (f"{line.replace('Day', name)} And so on." for line in story * 40)
        (folder / "novels" / f"{name}.txt").write_text("\n\n".join(pages), encoding="utf-8")
    (folder / "CoLA").mkdir()
    for name in ("train", "dev"):
        rows = [f"s{i}\t{i % 2}\t{'' if i % 2 else '*'}\tSentence {i}." for i in range(12)]
        (folder / "CoLA" / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    reviews = ["review,stars", *(f'"Good, or bad {i}.",{i % 3}' for i in range(9))]
    (folder / "reviews.csv").write_text("\n".join(reviews) + "\n", encoding="utf-8")
