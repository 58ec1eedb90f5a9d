"""A few examples, asked before and after training, beside the right answer.

They cost little (a handful of rows, short greedy answers) and leave the run as it was: nothing is
drawn, the model's mode is put back, and what hooks collect they collect in training mode alone.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorica.inference.generate import Decoding, Prompt, Prompter, generate, room
from lorica.run.folder import SAMPLES
from lorica.run.plan import RunPlan
from lorica.tensors.modules import evaluating

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from lorica.data import Prepared

logger = logging.getLogger("lorica")

COUNT = 6  # examples
CANDIDATES = 24  # rows that are looked at for examples that are short enough
NEW_TOKENS = 48  # of an answer, at most
LONGEST = 512  # tokens of a prompt, at most
OPENING = 24  # tokens of a plain text that are given, for the model to continue
LETTERS = 600  # of a text on the page, at most


class AbstractQuestions(abc.ABC):
    """Examples to ask a model.

    Attributes:
        asked: (prompt, right answer) of each.
        how: one sentence about the answers, for the page.
        exact: whether there is one right answer, so that another one is a mistake; otherwise it is
            one of many (a text's own continuation, a figure).
    """

    asked: list[tuple[str, str]]
    how: str
    exact: bool

    @abc.abstractmethod
    def answers(self, model: Any) -> list[str]:
        """The model's answer to each."""


class Continuations(AbstractQuestions):
    """Prompts that a language model answers, or texts that it continues.

    Args:
        prompts: as the model is asked; those without a reference are texts, of which the model gets
            the beginning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
        self.tokenizer = tokenizer
        short = [p for p in prompts if len(p.ids) <= LONGEST or p.reference is None]
        self.prompts = [self._opening(p) for p in short[:COUNT]]
        self.prompts = [p for p in self.prompts if p.ids and p.reference]
        wanted = [len(tokenizer(p.reference, verbose=False)["input_ids"]) for p in self.prompts]
        most = min(NEW_TOKENS, max(wanted, default=1) + 8)
        self.decoding = Decoding(max_new_tokens=most)
        self.asked = [(cut(p.text), cut(p.reference or "")) for p in self.prompts]
        self.exact = any(p.reference is not None for p in short)
        self.how = f"Greedy answers of at most {most} tokens."

    def _opening(self, prompt: Prompt) -> Prompt:
        if prompt.reference is not None:
            return prompt
        ids = prompt.ids[: OPENING + NEW_TOKENS]
        given = min(OPENING, len(ids) // 2)
        text, rest = (self._text(part) for part in (ids[:given], ids[given:]))
        return Prompt(ids[:given], text, rest, prompt.place)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def answers(self, model: Any) -> list[str]:
        if not self.prompts:
            return []
        fits = [room(model, self.tokenizer, p, self.decoding) > 0 for p in self.prompts]
        asked = [p for p, fit in zip(self.prompts, fits, strict=True) if fit]
        made = iter(generate(model, self.tokenizer, asked, self.decoding, batch_size=COUNT))
        return [self._shown(next(made)[0]) if fit else "(no room for an answer)" for fit in fits]

    def _shown(self, answer: Any) -> str:
        return cut(answer.text) + ("" if answer.finished else " …")


class Predictions(AbstractQuestions):
    """Rows that a classifier or a regression labels.

    Args:
        prepared: evenly spaced rows of it are asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> None:
        assert prepared.labels is not None
        self.names = prepared.labels.names
        self.collate = prepared.collator()
        rows: Any = prepared.dataset
        self.rows = [rows[i] for i in spaced(len(rows), COUNT)]
        texts = [tokenizer.decode(r["input_ids"], skip_special_tokens=True) for r in self.rows]
        wanted = [self._label(np.asarray(r["labels"]), np.asarray(r["labels"])) for r in self.rows]
        self.asked = [(cut(str(t)), w) for t, w in zip(texts, wanted, strict=True)]
        self.exact = bool(self.names)
        self.how = "The likeliest class of each." if self.names else "The model's figure for each."

    def _label(self, label: Any, wanted: Any) -> str:
        """One class, one figure, or the tags of those tokens that have one."""
        if not self.names:
            return f"{float(label.reshape(-1)[0]):.3g}"
        if wanted.ndim == 0:
            return self.names[int(label)]
        kept = wanted != -100
        return cut(" ".join(self.names[i] for i in label[: len(wanted)][kept]))

    def answers(self, model: Any) -> list[str]:
        with evaluating(model), torch.no_grad():
            batch = {k: v.to(model.device) for k, v in self.collate(self.rows).items()}
            labels = batch.pop("labels").cpu().numpy()
            logits = model(**batch).logits.float().cpu()
        found = (logits.argmax(-1) if self.names else logits).numpy()
        return [self._label(one, wanted) for one, wanted in zip(found, labels, strict=True)]


def from_rows(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Dataset,
    *,
    chat_template: str | None = None,
    shape: str | None = None,
) -> Continuations:
    """Questions of a language model: evenly spaced rows of a data set of prompts or texts."""
    few = rows.select(spaced(len(rows), CANDIDATES))
    prompts = Prompter(tokenizer, task, chat_template).rows(few, shape)
    order = spaced(len(prompts), COUNT)  # then the others, in place of any that fail
    order += [i for i in range(len(prompts)) if i not in order]
    return Continuations(tokenizer, [prompts[i] for i in order])


def from_ids(tokenizer: PreTrainedTokenizerBase, rows: Any) -> Continuations:
    """Questions of running text: the beginnings of evenly spaced rows of token ids."""
    kept = [[int(token) for token in rows[i]] for i in spaced(len(rows), COUNT)]
    return Continuations(tokenizer, [Prompt(tuple(ids), "") for ids in kept])


class Samples:
    """The examples of a run: asked before its first step, and again at its end.

    If the model fails on an example, the run goes on: a warning says why, and the page has no
    examples.

    Args:
        questions: a function that makes them.
        of: where they are from, for the page, e.g. `evaluation data`.
    """

    def __init__(self, plan: RunPlan[Any, Any], questions: Any, of: str) -> None:
        self.plan, self.of = plan, of
        # Sharded weights answer on all processes together, and only one asks.
        self.wanted = plan.main and plan.options.report_html and not plan.arguments.training.fsdp
        self.questions: AbstractQuestions | None = None
        self.before: list[str] = []
        with self._guarded():
            if self.wanted:
                asking: AbstractQuestions = questions()
                self.before = asking.answers(plan.model)
                self.questions = asking

    def finish(self) -> None:
        """Ask the trained model, and write samples.json."""
        import lorica

        with self._guarded():
            if not self.wanted or self.questions is None or not self.questions.asked:
                return
            after = self.questions.answers(self.plan.model)
            rows = [
                {"prompt": prompt, "wanted": wanted, "before": first, "after": last}
                for (prompt, wanted), first, last in zip(
                    self.questions.asked, self.before, after, strict=True
                )
            ]
            told = {
                "lorica": lorica.__version__,
                "of": f"{self.of}, evenly spaced",
                "how": self.questions.how,
                "exact": self.questions.exact,
                "rows": rows,
            }
            text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
            self.plan.folder.write(SAMPLES, text)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with _undisturbed(self.plan.device):
                yield
        except Exception as error:
            self.wanted = False
            why = " ".join(str(error).split())
            logger.warning(
                f"the run's page shows no examples, asking them failed: {type(error).__name__}:"
                f" {why}"
            )


def spaced(rows: int, count: int) -> list[int]:
    """Indices of at most `count` evenly spaced rows, the first among them.

    Example:
        >>> spaced(10, 4), spaced(2, 4)
        ([0, 2, 5, 7], [0, 1])
    """
    count = min(rows, count)
    return [i * rows // count for i in range(count)]


def cut(text: str) -> str:
    """A text as the page shows it."""
    return text if len(text) <= LETTERS else text[: LETTERS - 2] + " …"


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within is not missing afterwards."""
    kept = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
