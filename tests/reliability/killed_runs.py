"""The tiny runs that are killed: every method there is, under settings that together cover what a
run keeps between steps."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from covering import spelt
from killing import Count, Nursery, Snapshot, Timeline, chain
from walk import every

from lorica import Recipe
from lorica.methods.optional import StartsFromUnquantised

WORDS = "the a cat dog bird sees likes hears red blue small big and not very good bad".split()
IN_A_ROW = 4  # kills of one run at most
# Pairs of schedules, starts, forms and rules whose states meet.
COMBINED = (
    "relora(every=2, rewarm=1, lr_scheduler_type='jagged_cosine')+dora+olora",
    "adalora(deltaT=2)+dora", "switchlora(interval=2)+vectoradamw", "cola(every=2)+pissa+loraplus",
    "lorarite+dora+rslora",
)  # fmt: skip

# Fine-tuning: steps and passes; packed and padded; early stopping; lines of the log that fall
# between checkpoints and on them; dropout in all of them.
TUNING: tuple[tuple[object, ...], ...] = (
    ("--max-steps", 9, "--save-steps", 2, "--eval-steps", 2, "--logging-steps", 3,
     "--packing", "best_fit", "--gradient-accumulation-steps", 2, "--save-total-limit", 3),
    ("--num-train-epochs", 4, "--early-stopping-patience", 1, "--learning-rate", 0.5,
     "--logging-steps", 2, "--max-samples", 24),
    ("--max-steps", 8, "--save-steps", 3, "--eval-steps", 3, "--logging-steps", 2,
     "--packing", "wrapped", "--bf16", "--save-total-limit", 1, "--gradient-checkpointing"),
    ("--max-steps", 10, "--save-steps", 4, "--eval-steps", 2, "--logging-steps", 1,
     "--eval-on-start", "--warmup-ratio", 0.3),
)  # fmt: skip
# Pre-training: in memory, and streamed.
SCRATCH: tuple[tuple[object, ...], ...] = (
    ("--max-steps", 9, "--save-steps", 2, "--eval-fraction", 0.1, "--eval-steps", 4,
     "--logging-steps", 1),
    ("--max-steps", 8, "--save-steps", 3, "--logging-steps", 2, "--streaming", "--vocab-size", 300),
    ("--num-train-epochs", 2, "--save-steps", 5, "--eval-fraction", 0.1, "--eval-steps", 5,
     "--gradient-accumulation-steps", 2),
)  # fmt: skip


@dataclass(frozen=True)
class Subjects:
    """The files that the runs read.

    Args:
        folder: where they are written.
    """

    folder: Path

    def make(self) -> Subjects:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        self.folder.mkdir(parents=True, exist_ok=True)
        vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.save_pretrained(self.folder / "llama")
        shape = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.1,
        }  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(
            self.folder / "llama"
        )
        small = {"model_type": "llama", "vocab_size": 300, **shape}
        (self.folder / "shape.json").write_text(json.dumps(small))
        draw = random.Random(0)
        text = lambda n: " ".join(draw.choices(WORDS, k=n))  # noqa: E731
        rows = [
            {"prompt": text(draw.randint(2, 9)), "completion": " " + text(draw.randint(2, 9))}
            for _ in range(64)
        ]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        texts = [{"text": text(draw.randint(4, 30))} for _ in range(40)]
        (self.folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
        (self.folder / "book.txt").write_text("\n\n".join(text(40) for _ in range(24)) + "\n")
        shards = self.folder / "shards"
        shards.mkdir(exist_ok=True)
        for i in range(3):
            lines = (json.dumps({"text": text(draw.randint(20, 60))}) for _ in range(30))
            (shards / f"part-{i}.jsonl").write_text("\n".join(lines) + "\n")
        for path in self.folder.rglob("*"):  # safetensors makes its files private
            path.chmod(0o755 if path.is_dir() else 0o644)
        return self

    def words(self, verb: str, method: str, setting: int) -> list[object]:
        """The command that trains by this method under this setting."""
        settings = TUNING if verb == "train" else SCRATCH
        chosen = settings[setting % len(settings)]
        out: list[object] = [verb, "--method", method, *chosen]
        plain = Recipe.parse(method)
        fixed = any(choice.only_r is not None for choice in plain.choices)
        if "r" in plain.takes and not fixed:
            out += ["--r", 4]
        if verb == "train" and "lora_dropout" in plain.takes:
            out += ["--lora-dropout", 0.1]
        if verb == "train":
            files: list[object] = ["--model", self.folder / "llama", "--eval-fraction", 0.2]
            data = "texts.jsonl" if "wrapped" in chosen else "rows.jsonl"
            files += ["--data", self.folder / data, "--max-length", 24]
        else:
            data = self.folder / ("shards" if "--streaming" in chosen else "book.txt")
            files = ["--model-config", self.folder / "shape.json", "--data", data]
            files += ["--max-length", 16]
        return [*out, *files, "--per-device-train-batch-size", 4]


def methods() -> list[str]:
    """Every word there is, with events at every second step, once where two mean the same; and some
    that meet. Those that need a quantised base are left out: both verbs refuse them here."""
    seen: dict[str, str] = {}
    for _, word in every():
        method = spelt(word)
        made = Recipe.parse(method)
        if not isinstance(made.init, StartsFromUnquantised):
            seen.setdefault(made.text(), method)
    return [*seen.values(), *COMBINED]


def tortured(
    nursery: Nursery, subjects: Subjects, method: str, place: int, kills: int, out: Path
) -> tuple[Count, list[str]]:
    """So many kills of runs by one method; returns them, and the verbs that refuse the method.

    Args:
        place: in the list of methods; settings go round with it, and it seeds the moments.
        out: a folder for the runs; what is there is removed.
    """
    count, refused, lawful = Count(), [], {}
    draw = random.Random(f"{method} {place}")
    shutil.rmtree(out, ignore_errors=True)
    for verb, settings in (("train", TUNING), ("pretrain", SCRATCH)):
        words = subjects.words(verb, method, place % len(settings))
        straight = nursery.run([*words, "--output-dir", out / verb])
        if straight.status == 2:
            refused.append(verb)
        elif straight.status != 0:
            count.differences.append(f"{verb}: status {straight.status}: {straight.said[-600:]}")
        else:
            lawful[verb] = words, Snapshot.of(out / verb), Timeline.of(straight)
    for i, (verb, (words, snapshot, timeline)) in enumerate(lawful.items()):
        wanted = kills * (i + 1) // len(lawful) - count.kills
        before, runs = count.kills, 0
        while (left := wanted - (count.kills - before)) > 0 and runs < 4 * wanted:
            folder, aims = out / f"{verb}-{runs}", timeline.aims(draw)
            found = chain(nursery, words, folder, snapshot, min(IN_A_ROW, left), aims)
            found.differences = [
                f"{' '.join(map(str, words))}: {text}" for text in found.differences
            ]
            count.add(found)
            shutil.rmtree(folder, ignore_errors=True)
            runs += 1
    return count, refused
