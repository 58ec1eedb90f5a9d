"""Text from a model: prompts of any shape of data, in batches, greedy or sampled, streamed.

    ask = Prompter(tokenizer, language_task(model.config))
    answers = generate(model, tokenizer, ask.texts(["Once upon a time"]))
    print(answers[0][0].text)

A prompt is made of the very pieces that training made of it, so that an adapted model is asked what
it was taught. The model may be plain, adapted or merged; the tokenizer is never changed: batches
are padded on the left here.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lorica.data.chat import COMPLETION, Format, template_of
from lorica.data.encode import Added, Encoder, assembled
from lorica.data.fidelity import beyond
from lorica.data.lengths import longest
from lorica.data.samples import (
    ASSISTANT,
    USER,
    Chat,
    Document,
    Encoded,
    Exchange,
    Piece,
    Row,
    SourceTarget,
)
from lorica.data.shapes import Shape, best_of, detect, shapes
from lorica.data.tokenise import sample_of
from lorica.data.words import visible
from lorica.tensors.modules import evaluating, refuse_meta

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
_CONTEXT = 8  # tokens of the prompt that an answer is decoded behind, for the space between them


# -- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen, under transformers' names.

    The checkpoint's own generation settings are not used (but for its special tokens): the same
    options mean the same thing for every model. Left alone they are greedy.

    Args:
        max_new_tokens: at most so many tokens an answer. Default: 256. Fewer where the model's
            positions end before.
        do_sample: draw from the distribution; so does giving a temperature, top_k or top_p.
        temperature: divides the logits. Default: 1.
        top_k: draw from so many likeliest tokens; 0: from all. Default: 50, transformers' own.
        top_p: draw from the likeliest tokens of together this probability. Default: 1.
        repetition_penalty: logits of tokens that were there are divided by it. Default: 1.
        num_beams: width of the beam search.
        num_return_sequences: answers a prompt.
        stop_strings: an answer ends before the first of these.
        seed: of the draws.

    Raises:
        ValueError: a value out of range, or several greedy answers, which would all be the same.

    Example:
        >>> Decoding(top_p=0.9).samples, Decoding().samples
        (True, False)
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()
    seed: int = 42

    @property
    def samples(self) -> bool:
        return self.do_sample or any(
            value is not None for value in (self.temperature, self.top_k, self.top_p)
        )

    def __post_init__(self) -> None:
        def refuse(name: str, wanted: str) -> ValueError:
            return ValueError(f"`{name}` is {getattr(self, name)!r}: it must be {wanted}")

        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            if (getattr(self, name) or 0) < 1 and getattr(self, name) is not None:
                raise refuse(name, "a whole number of at least 1")
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise refuse(name, "a number above 0; for greedy answers leave it out")
        if self.temperature is not None and self.temperature < 1e-30:  # logits over it overflow
            raise refuse("temperature", "1e-30 at least; for greedy answers leave it out")
        if self.top_k is not None and self.top_k < 0:
            raise refuse("top_k", "a whole number of tokens, 0 for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise refuse("top_p", "a probability above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise refuse("seed", "a whole number from 0 to 4294967295")
        if "" in self.stop_strings:
            raise refuse("stop_strings", "texts of a character at least")
        if self.num_return_sequences > (1 << 62 if self.samples else self.num_beams):
            raise ValueError(
                f"`num_return_sequences` is {self.num_return_sequences}, and a greedy search has"
                f" {self.num_beams} to give: draw them with `do_sample`, or search with"
                f" `num_beams` of {self.num_return_sequences} at least"
            )

    def config(self, tokens: GenerationConfig, new: int, ends: Sequence[int], pad: int) -> Any:
        """For transformers, with the special tokens that `tokens` (the checkpoint's) declares."""
        drawn = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": 50 if self.top_k is None else self.top_k,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }
        return GenerationConfig(
            max_new_tokens=new,
            do_sample=self.samples,
            num_beams=self.num_beams,
            num_return_sequences=self.num_return_sequences,
            repetition_penalty=self.repetition_penalty or 1.0,
            use_cache=True,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            bos_token_id=tokens.bos_token_id,
            decoder_start_token_id=tokens.decoder_start_token_id,
            forced_bos_token_id=tokens.forced_bos_token_id,
            forced_eos_token_id=tokens.forced_eos_token_id,
            suppress_tokens=tokens.suppress_tokens,
            begin_suppress_tokens=tokens.begin_suppress_tokens,
            bad_words_ids=tokens.bad_words_ids,  # Marian's way to forbid padding
            **(drawn if self.samples else {}),
        )


# -- prompts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        ids: token ids, as training has them before the answer.
        text: the same as text, without what the tokenizer adds.
        reference: the data's own answer, if it has one.
        place: where it came from (`"train.jsonl, line 12"`), for messages.
        stops: what the chat template writes behind an answer: a model that was taught so stops
            there. A special token stands in `ends`.
    """

    ids: tuple[int, ...]
    text: str
    reference: str | None = None
    place: str = "the prompt"
    stops: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A sample's prompt before it is tokenised."""

    pieces: list[Piece]
    reference: str | None = None
    behind: str = ""  # what the template writes behind an answer


class Prompter:
    """Makes prompts for one tokenizer.

    Args:
        tokenizer: the model's.
        task: `causal-lm`, or `seq2seq-lm` for an encoder-decoder (see `language_task`).
        chat_template: as of `lorica.data.prepare`.

    Raises:
        ValueError: no such template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: str, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.encoder = Encoder(tokenizer)
        template = template_of(tokenizer, chat_template, starts=bool(self.encoder.start))
        self.form = Format(tokenizer, template, COMPLETION, self.encoder.start)

    def texts(self, texts: Sequence[str], places: Sequence[str] | None = None) -> list[Prompt]:
        """Texts as they are; a causal model goes on from them, an encoder reads them."""
        kind = {"causal-lm": Document, "seq2seq-lm": lambda text: SourceTarget(text, "")}[self.task]
        places = [f"prompt {i}" for i in range(1, len(texts) + 1)] if places is None else places
        rows = [Row({}, place) for place in places]
        return [self._prompt(row, kind(text)) for row, text in zip(rows, texts, strict=True)]

    def messages(self, messages: list[dict[str, Any]], place: str = "the conversation") -> Prompt:
        """A conversation under the chat template; the assistant's turn is next.

        Raises:
            ValueError: there is no template, it refuses the messages, or the model is an
                encoder-decoder.
        """
        if self.task != "causal-lm":
            raise ValueError(
                f"a conversation is asked of a causal model, and this one is for `{self.task}`:"
                " give it texts"
            )
        return self._prompt(Row({}, place), Chat(messages, trained_from=len(messages)))

    def rows(self, dataset: Dataset, shape: str | None = None) -> list[Prompt]:
        """The prompts of a data set; its answers become references, and may be absent.

        Args:
            dataset: as `lorica.data.read` returns it.
            shape: the shape's name, where the columns leave a choice.

        Raises:
            ValueError: columns or values that are of no shape with a prompt.
        """
        if not any(each.find(dataset.column_names) for each in self._serving()):
            dataset = self._answerless(dataset)
        chosen = detect(
            dataset.column_names, task=self.task, shape=shape, sample=sample_of(dataset)
        )
        reader = chosen.readers[self.task]
        return [self._prompt(row, reader(row)) for row in chosen.rows(dataset[:])]

    def _serving(self) -> list[Shape]:
        return [each for each in shapes() if self.task in each.readers]

    def _answerless(self, dataset: Dataset) -> Dataset:
        """With an empty answer, where nothing but the answers is absent (a shape's last column)."""
        have = visible(dataset.column_names)
        lacking = {
            each.name: answer
            for each in self._serving()
            if len(each.columns) > 1
            and each.find([*have, answer := list(each.columns)[-1]]) is not None
        }
        fitting = {
            best.name
            for answer in lacking.values()
            for best in best_of(self._serving(), [*have, answer])
        }
        lacking = {name: answer for name, answer in lacking.items() if name in fitting}
        if len(lacking) != 1:
            return dataset  # `detect` says what is missing
        [answer] = lacking.values()
        message = json.dumps([{"role": ASSISTANT, "content": ""}])
        asked = dataset[0].get("prompt")
        empty = message if isinstance(asked, list) or str(asked)[:1] == "\x1e" else ""
        return dataset.add_column(answer, [empty] * len(dataset))  # type: ignore[call-arg]

    def _prompt(self, row: Row, sample: Any) -> Prompt:
        try:
            asked = _ask(sample, self.form)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        if isinstance(sample, SourceTarget):
            source = Added.by(self.tokenizer).bare(sample.source)
            ids = list(self.tokenizer(source, verbose=False)["input_ids"])
        else:
            made = next(assembled([(row, sample, asked.pieces)], self.encoder))[2]
            ids = [] if made is None else made[0].tolist()
        text = "".join(piece.text or "" for piece in asked.pieces)
        if not ids:
            raise ValueError(
                f"{row.place}: the prompt is empty, and this tokenizer puts nothing before a text:"
                " a model needs a token at least. Write something"
            )
        if not text:
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        stop = asked.behind.strip()
        special = next((t for t in self.tokenizer.all_special_tokens if stop.startswith(t)), None)
        ends = () if special is None else (self.tokenizer.convert_tokens_to_ids(special),)
        stops = (stop,) if stop and special is None else ()
        answer = asked.reference if (asked.reference or "").strip() else None
        return Prompt(tuple(ids), text, answer, row.place, stops, ends)  # type: ignore[arg-type]


def language_task(config: PretrainedConfig) -> str:
    """`seq2seq-lm` for an encoder-decoder, else `causal-lm`."""
    return "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"


@singledispatch
def _ask(sample: Any, form: Format) -> _Asked:
    raise AssertionError(f"{type(sample).__name__} serves no language model")


@_ask.register
def _(sample: Document, form: Format) -> _Asked:
    return _Asked(Exchange(((USER, sample.text),)).pieces(form))


@_ask.register
def _(sample: SourceTarget, form: Format) -> _Asked:
    return _Asked([Piece(False, text=sample.source)], sample.target)


@_ask.register
def _(sample: Exchange, form: Format) -> _Asked:
    turns, answer = sample.turns, None
    if turns[-1][0] == ASSISTANT:
        turns, answer = turns[:-1], turns[-1][1]
    return _Asked(Exchange(turns).pieces(form), answer)


@_ask.register
def _(sample: Encoded, form: Format) -> _Asked:
    [piece] = sample.pieces(form)
    mask = piece.mask if sample.labels is not None else None
    assert piece.mask is not None
    end = len(piece.ids)
    if mask is not None and any(mask):
        end = len(mask) - mask[::-1].index(True)
        start = end - next((i for i, learn in enumerate(reversed(mask[:end])) if not learn), end)
        text = str(form.tokenizer.decode(list(piece.ids[start:end]), skip_special_tokens=True))
        return _Asked([Piece(False, ids=piece.ids[:start])], text)
    return _Asked([Piece(False, ids=piece.ids)])


@_ask.register
def _(sample: Chat, form: Format) -> _Asked:
    if form.template is None and sample.plain is not None:
        return _ask(sample.plain, form)
    if form.template is None:
        form.render(sample.messages, sample.tools, 0)  # says what is missing
    messages, answer = sample.messages, None
    index = sample.trained_from or len(messages) - (messages[-1]["role"] == ASSISTANT)
    if index < len(messages) and messages[index]["role"] == ASSISTANT:
        answer = messages[index]["content"]
    before = messages[:index]
    return _Asked(form.prompt(before, sample.tools), answer, form.behind(before, sample.tools))


# -- answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: as it follows the prompt, without special tokens and without what stopped it.
        ids: its tokens, without EOS.
        stopped: `eos`, `stop` (a stop string), `max_new_tokens`, or `positions` (the model's end).
    """

    text: str
    ids: tuple[int, ...]
    stopped: str

    @property
    def finished(self) -> bool:
        return self.stopped in ("eos", "stop")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
    *,
    batch_size: int = 8,
    on_text: Callable[[str], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[Answer]]:
    """Answers, `num_return_sequences` for each prompt, in the order of the prompts.

    Greedy answers don't depend on `batch_size`; drawn ones do, as a batch draws together.

    Args:
        model: plain, adapted or merged, on any device; it is in the mode it was afterwards.
        tokenizer: the model's.
        prompts: as `Prompter` makes them.
        decoding: Default: greedy.
        batch_size: prompts a batch.
        on_text: called with each new bit of text; for a single prompt and answer. Together the bits
            are the answer's text.
        on_batch: called with (prompts done, prompts) after each batch.

    Raises:
        ValueError: a prompt that leaves no room before the model's last position, or `on_text` for
            more than one answer; a token id that the model has no embedding for.
    """
    decoding = Decoding() if decoding is None else decoding
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}: it must be at least 1")
    if on_text is not None and (
        len(prompts) != 1 or decoding.num_return_sequences != 1 or decoding.num_beams != 1
    ):
        raise ValueError(
            f"`on_text` was given for {len(prompts)} prompt(s), {decoding.num_beams} beam(s) and"
            f" {decoding.num_return_sequences} answer(s) each: one greedy or drawn answer of one"
            " prompt can be streamed. Leave it out"
        )
    refuse_meta(model, "generate with")
    _check_ids(model, tokenizer, prompts)
    new = [room(model, tokenizer, prompt, decoding) for prompt in prompts]
    for prompt, tokens in zip(prompts, new, strict=True):
        if tokens < 1:
            raise ValueError(
                f"{prompt.place}: the prompt has {len(prompt.ids):,} tokens, and the model's"
                f" positions end at {longest(model.config, tokenizer):,}: there is no room for an"
                " answer. Shorten it"
            )
    order = sorted(
        range(len(prompts)), key=lambda i: (new[i], prompts[i].ends, len(prompts[i].ids))
    )
    answers: list[list[Answer]] = [[] for _ in prompts]
    done = 0
    with _ready(model, decoding.seed if decoding.samples else None) as settings:
        # A batch has one length of answer and one set of ends, whatever else is asked beside it.
        for (tokens, ends), group in groupby(order, key=lambda i: (new[i], prompts[i].ends)):
            alike = list(group)
            for at in range(0, len(alike), batch_size):
                chosen = alike[at : at + batch_size]
                batch = _Batch(
                    model,
                    tokenizer,
                    [prompts[i] for i in chosen],
                    decoding,
                    tokens,
                    frozenset({*_ends(tokenizer, settings), *ends}),
                )
                for i, made in zip(chosen, batch.answers(settings, on_text), strict=True):
                    answers[i] = made
                done += len(chosen)
                if on_batch is not None:
                    on_batch(done, len(prompts))
    return answers


def _check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Refuses what would end in an IndexError, or on a GPU in a failed kernel."""
    table: Any = model.get_input_embeddings()
    embeddings = int(table.weight.shape[0])
    for prompt in prompts:
        if (most := max(prompt.ids)) >= embeddings:
            raise ValueError(f"{prompt.place}: {beyond(most, tokenizer, embeddings)}")


def room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    decoding: Decoding,
) -> int:
    """How many tokens an answer to this prompt may have; below 1: it leaves no room.

    A decoder's prompt and answer share its positions; an encoder-decoder's don't.
    """
    wanted = MAX_NEW_TOKENS if decoding.max_new_tokens is None else decoding.max_new_tokens
    limit = longest(model.config, tokenizer)
    if limit is None:
        return wanted
    if model.config.is_encoder_decoder:
        return min(wanted, limit - 1) if len(prompt.ids) <= limit else 0
    return min(wanted, limit - len(prompt.ids))


@contextlib.contextmanager
def _ready(model: PreTrainedModel, seed: int | None) -> Iterator[GenerationConfig]:
    """In evaluation mode, without the checkpoint's generation settings (which are handed out), and
    with draws of our own."""
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} generates no text: a causal model or an encoder-decoder is"
            " needed, e.g. loaded with AutoModelForCausalLM"
        )
    settings: Any = model.generation_config
    device = model.device
    others = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        # transformers fills in what `Decoding` leaves open from here.
        model.generation_config = GenerationConfig()
        drawn = torch.random.fork_rng(others, enabled=seed is not None, device_type=kind)
        with evaluating(model), torch.no_grad(), drawn:
            if seed is not None:
                torch.manual_seed(seed)
            yield settings
    finally:
        model.generation_config = settings


def _ends(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> list[int]:
    """What ends an answer: the tokenizer's EOS, which training teaches, and the checkpoint's."""
    found = [tokenizer.eos_token_id, settings.eos_token_id]
    flat = [e for each in found for e in (each if isinstance(each, list) else [each])]
    return [e for e in flat if isinstance(e, int)]


@dataclass(frozen=True)
class _Batch:
    """Prompts that are answered together."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    decoding: Decoding
    new: int
    ends: frozenset[int]

    def answers(
        self, settings: GenerationConfig, on_text: Callable[[str], None] | None
    ) -> list[list[Answer]]:
        ids, mask = self._inputs()
        width = 1 if self._encodes else ids.shape[1]
        pad = self.tokenizer.pad_token_id
        pad = pad if isinstance(pad, int) else min(self.ends, default=0)
        stream = None if on_text is None else _Stream(self, on_text)
        ending = [_Stops(self, width)] if any(map(self.stops, self.prompts)) else []
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self.decoding.config(settings, self.new, sorted(self.ends), pad),
            stopping_criteria=StoppingCriteriaList(ending),
            streamer=stream,
        )
        rows = out[:, width:].tolist()
        each = len(rows) // len(self.prompts)
        made = [
            [self._answer(prompt, row) for row in rows[i * each : (i + 1) * each]]
            for i, prompt in enumerate(self.prompts)
        ]
        if stream is not None:
            stream.finish(made[0][0].text)
        return made

    @property
    def _encodes(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """ids and mask (batch, longest), padded on the left (an encoder's on the right)."""
        longest_ids = max(len(prompt.ids) for prompt in self.prompts)
        ids, mask = [], []
        for prompt in self.prompts:
            # Padding repeats a token of the prompt: a repetition penalty looks at masked ones too.
            fill, ones = [prompt.ids[0]] * (longest_ids - len(prompt.ids)), [1] * len(prompt.ids)
            zeros = [0] * len(fill)
            ids.append([*prompt.ids, *fill] if self._encodes else [*fill, *prompt.ids])
            mask.append([*ones, *zeros] if self._encodes else [*zeros, *ones])
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def stops(self, prompt: Prompt) -> tuple[str, ...]:
        return (*self.decoding.stop_strings, *prompt.stops)

    def text(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """The text that `ids` add to the prompt, up to the first stop."""
        text = self.behind(prompt, ids)
        return text[
            : min((at for s in self.stops(prompt) if (at := text.find(s)) >= 0), default=None)
        ]

    def behind(self, prompt: Prompt, ids: Sequence[int]) -> str:
        context = [] if self._encodes else list(prompt.ids[-_CONTEXT:])
        before, both = self._decode(context), self._decode([*context, *ids])
        return both[len(before) :] if both.startswith(before) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def stopped(self, prompt: Prompt, ids: Sequence[int]) -> bool:
        text = self.behind(prompt, ids)
        return any(stop in text for stop in self.stops(prompt))

    def _answer(self, prompt: Prompt, row: list[int]) -> Answer:
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        ids = row[:end]
        if self.stops(prompt) and self.stopped(prompt, ids):
            many = range(len(ids) + 1)
            count = bisect_left(many, True, key=lambda n: self.stopped(prompt, ids[:n]))
            return Answer(self.text(prompt, ids), tuple(ids[:count]), "stop")
        wanted = self.decoding.max_new_tokens or MAX_NEW_TOKENS
        cut = "max_new_tokens" if self.new == wanted else "positions"
        return Answer(self.text(prompt, ids), tuple(ids), cut if end is None else "eos")


class _Stops(StoppingCriteria):
    """A row is done once its text holds one of its prompt's stops, wherever tokens begin."""

    def __init__(self, batch: _Batch, width: int) -> None:
        self.batch = batch
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        batch = self.batch
        each = len(input_ids) // len(batch.prompts)
        rows = input_ids[:, self.width :].tolist()
        done = [batch.stopped(batch.prompts[i // each], row) for i, row in enumerate(rows)]
        return torch.tensor(done, device=input_ids.device)


class _Stream(BaseStreamer):
    """Hands on the text of one growing answer, as soon as nothing behind can change it."""

    def __init__(self, batch: _Batch, on_text: Callable[[str], None]) -> None:
        self.batch, self.on_text = batch, on_text
        self.ids: list[int] | None = None
        self.sent = ""

    def put(self, value: Tensor) -> None:
        if self.ids is None:
            self.ids = []  # transformers puts the prompt first
            return
        self.ids += [token for token in value.reshape(-1).tolist() if token not in self.batch.ends]
        [prompt] = self.batch.prompts
        text = self.batch.text(prompt, self.ids).rstrip("\ufffd")  # half a character
        for stop in self.batch.stops(prompt):  # what may become a stop waits
            held = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
            text = text[: len(text) - held]
        self._send(text)

    def end(self) -> None:
        pass

    def finish(self, text: str) -> None:
        self._send(text)

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent):
            self.on_text(text[len(self.sent) :])
            self.sent = text
