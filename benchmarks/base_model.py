"""Trains the base model that the package embeds, from nothing, on the old tasks of its task world.

    python benchmarks/base_model.py --out DIR [--seed 0] [--steps 2400] [--threads 1]

DIR gets what `src/lorica/world/base/` holds: weights in half precision, configuration, tokenizer,
and PROVENANCE.md with the exact match of every task on inputs that were never trained on.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lorica import embedded

SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)
BATCH, MICRO_BATCH = 128, 64  # examples
WARMUP, DECAY = 0.02, 0.4  # shares of the run; between them the rate stands still
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-3, (0.9, 0.98), 0.05, 1.0
EVALUATED = 500  # test examples a task in PROVENANCE.md


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte behind three special ones; every text is opened by `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        padding_side="left",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def micro_batches(examples, tokenizer):
    """Input ids and labels, a few short rows apart from a few long ones to spare padding."""
    rows = []
    for example in examples:
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"] + [EOS]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    rows.sort(key=lambda row: len(row[0]))
    for start in range(0, len(rows), MICRO_BATCH):
        part = rows[start : start + MICRO_BATCH]
        width = len(part[-1][0])
        # Padding stands on the right, where a causal model cannot see it: no mask is needed.
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in part])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in part])
        yield ids, labels


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: up, flat, and down to nothing as 1 - sqrt."""
    done = step / steps
    if done < WARMUP:
        return (step + 1) / (WARMUP * steps)
    return 1 - max(0.0, (done - (1 - DECAY)) / DECAY) ** 0.5


def two_optimizers(model) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embedding, head and norms.

    With batches of 192 and seed 0, the loss after 200 steps was 0.64 with Muon at 4e-3, 1.54 and
    1.74 with AdamW alone at 2e-3 and 4e-3. Muon is in torch from 2.9 on.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adjust_lr_fn="match_rms_adamw",  # so that one rate serves both
    )
    return muon, torch.optim.AdamW(others, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)


@torch.no_grad()
def exact_match(model, tokenizer, examples) -> dict[str, float]:
    """The share of prompts that greedy generation completes exactly, a task."""
    hits = defaultdict(list)
    for start in range(0, len(examples), 256):
        part = examples[start : start + 256]
        inputs = tokenizer([e["prompt"] for e in part], padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        texts = tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for example, text in zip(part, texts, strict=True):
            hits[example["task"]].append(text == example["completion"])
    return {task: sum(marks) / len(marks) for task, marks in sorted(hits.items())}


def mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def train(model, tokenizer, *, steps: int, seed: int) -> int:
    """Trains in place; returns the number of tokens seen, padding left out."""
    optimizers = two_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
        for optimizer in optimizers
    ]
    # Progress is watched on inputs of the training side drawn for it alone; the test side waits.
    watched = embedded.generate("old", 50 * len(embedded.tasks("old")), seed=seed + 1)
    seen, running, start = 0, 0.0, time.perf_counter()
    pool: list[dict[str, str]] = []
    for step in range(steps):
        if len(pool) < BATCH:
            pool = embedded.generate("old", 400 * BATCH, seed=1_000_003 * (seed + 1) + step)
        examples, pool = pool[:BATCH], pool[BATCH:]
        batches = list(micro_batches(examples, tokenizer))
        answers = sum(int((labels >= 0).sum()) for _, labels in batches)
        for ids, labels in batches:
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / answers).backward()
            running += loss.item() / answers / 100
            seen += int((ids != PAD).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - start
            print(
                f"step {step + 1} loss {running:.4f} tokens {seen} {spent:.0f} s", file=sys.stderr
            )
            running = 0.0
        if (step + 1) % 600 == 0:
            scores = exact_match(model, tokenizer, watched)
            print(f"step {step + 1} mean {mean(scores):.3f} {scores}", file=sys.stderr)
    return seen


def store(model, tokenizer, folder: Path) -> None:
    """Half precision on disk, single precision by default when read: `dtype` says so."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rewrite(folder / "config.json", dtype="float32")
    # The class's name that every version of transformers knows.
    rewrite(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for path in folder.iterdir():
        path.chmod(0o644)


def rewrite(path: Path, **fields: str) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def provenance(folder: Path, options, tokens: int, seconds: float) -> str:
    """What was run and what the stored files, read back, answer on the test side."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    tables = []
    for kind in ("old", "new"):
        examples = embedded.generate(
            kind, EVALUATED * len(embedded.tasks(kind)), seed=0, side="test"
        )
        scores = exact_match(model, tokenizer, examples)
        rows = "\n".join(f"| {task} | {100 * score:.1f} |" for task, score in scores.items())
        tables.append(
            f"### {kind} tasks (n = {EVALUATED} a task)\n\n| task | exact match, % |\n|---|---|\n"
            f"{rows}\n| **mean** | **{100 * mean(scores):.1f}** |\n"
        )
    return f"""# Where this model comes from

A Llama of {parameters:,} parameters, trained from random weights by this project on text that it
generates itself (`lorica.embedded`, the training side of the old tasks). No other data and no other
model went into it. The weights are stored as float16; `config.json` asks for float32.

- command: `python benchmarks/base_model.py --out DIR --seed {options.seed} \
--steps {options.steps} --threads {options.threads}`
- {options.steps:,} steps of {BATCH} examples, {tokens:,} tokens, each example drawn afresh
- Muon on the layers' matrices (weight decay {WEIGHT_DECAY}), AdamW {BETAS} on the rest, both at
  rate {LEARNING_RATE}, gradient clipped to {CLIP}; the rate rises over the first {WARMUP:.0%} and
  falls over the last {DECAY:.0%}; the loss is on the completion's bytes and the end token
- {seconds / 60:.0f} minutes on {options.threads} CPU threads; Python {platform.python_version()}, \
torch {torch.__version__}, transformers {transformers.__version__}, \
tokenizers {tokenizers.__version__}

A text is `<s>` prompt completion `</s>`; the tokenizer writes the first, training adds the last.

## Exact match

Greedy generation by the files as stored, read as float32, on inputs of the test side
(`generate(kind, n, seed=0, side="test")`).

{tables[0]}
{tables[1]}"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrain the embedded base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = byte_tokenizer()
    model = new_model(len(tokenizer))
    start = time.perf_counter()
    tokens = train(model, tokenizer, steps=options.steps, seed=options.seed)
    seconds = time.perf_counter() - start

    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    store(model, tokenizer, partial)
    (partial / "PROVENANCE.md").write_text(provenance(partial, options, tokens, seconds))
    partial.rename(options.out)


if __name__ == "__main__":
    main()
