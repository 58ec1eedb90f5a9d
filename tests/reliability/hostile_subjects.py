"""What hostile inputs are made of: good adapters, run files, data, checkpoints and models, and who
reads each of them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from hostile_bytes import (
    PACKERS,
    blind,
    in_json,
    in_json_lines,
    in_packed,
    in_safetensors,
    in_table,
    in_text,
    in_torch,
    in_yaml,
)
from hostile_kinds import VALUES, call, columns, escape, pattern, template
from hostile_runs import Enough, Outcome, Step, command, forked

import lorica
import models
from lorica import formats

Change = Callable[[bytes, Random], tuple[str, bytes]]
WORDS = "the a cat dog bird sees likes hears red blue small big and not very good bad".split()


@dataclass(frozen=True)
class Subject:
    """A good folder, the files of it that may be changed, and who reads it.

    Attributes:
        folder: the good one; each input is a changed copy.
        files: path in the folder -> change of one thing in it.
        steps: the copy -> what reads it, each judged by itself.
        seconds: that all steps together may take.
        share: how often it is drawn, relative to the others.
        finish: see `forked`.
        signed: a file whose hashes follow the change, most of the time.
    """

    name: str
    folder: Path
    files: Mapping[str, Change]
    steps: Callable[[Path], list[Step]]
    seconds: float = 30.0
    share: float = 1.0
    finish: Callable[[], object] | None = None
    signed: str | None = None


@dataclass(frozen=True)
class Result:
    """One input and what came of it."""

    number: int
    subject: str
    file: str
    change: str
    aware: bool
    outcomes: list[Outcome] = field(default_factory=list)


def tokenizer(folder: Path) -> None:
    """A word-level one, written as transformers does."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


class Subjects:
    """All subjects, made below `root` from a fixed seed.

    Args:
        root: an empty folder.
        checkpoints: also those whose every input costs a resumed run.
    """

    def __init__(self, root: Path, *, checkpoints: bool = True) -> None:
        self.root = root
        self.canary = root / "canary"
        self.base = models.llama()
        self.bert = models.bert()
        self.every: list[Subject] = []
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._model()
        self._adapters()
        self._configs()
        self._data()
        self._kinds()
        if checkpoints:
            self._checkpoints()

    def add(self, name: str, folder: Path, files: Mapping[str, Change], steps: Any, **more: Any):
        self.every.append(Subject(name, folder, files, steps, **more))

    # -- models ------------------------------------------------------------------------------------

    def _model(self) -> None:
        folder = self.root / "model"
        over = {"vocab_size": len(WORDS) + 3, "hidden_size": 16, "intermediate_size": 24}
        small = models.llama(**over, bos_token_id=1, eos_token_id=2)
        small.save_pretrained(folder)
        tokenizer(folder)
        files = {
            "config.json": in_json, "generation_config.json": in_json,
            "tokenizer_config.json": in_json, "tokenizer.json": in_json,
            "model.safetensors": in_safetensors,
        }  # fmt: skip
        self.add("model", folder, {**files, "auto_map": self._own_code}, self._load_model, share=2)
        parts = self.root / "model-parts"
        small.save_pretrained(parts, max_shard_size="8KB")
        tokenizer(parts)
        part = next(p.name for p in sorted(parts.glob("model-*.safetensors")))
        index = {"model.safetensors.index.json": in_json, part: in_safetensors}
        index["weight_map"] = _elsewhere
        self.add("model-parts", parts, index, self._load_model)

    def _own_code(self, data: bytes, draw: Random) -> tuple[str, bytes]:
        """Code that a model folder brings; see `made` for where it goes."""
        return "model/code", f"import os\nos.system('touch {self.canary}')\n".encode()

    @staticmethod
    def _load_model(folder: Path) -> list[Step]:
        from lorica.run import load_model

        name = str(folder)
        how: dict[str, Any] = {"labels": None, "dtype": "auto", "widen": True}
        return [
            ("read_config", lambda: load_model.read_config(name)),
            ("load_tokenizer", lambda: load_model.load_tokenizer(name)),
            ("empty_model", lambda: load_model.empty_model(name)),
            ("load_model", lambda: load_model.load_model(name, "causal-lm", **how)),
        ]

    # -- adapters ----------------------------------------------------------------------------------

    def _adapters(self) -> None:
        wide: dict[str, Any] = {
            "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3},
        }  # fmt: skip
        made = {
            "lora": {}, "dora": {}, "olora": {}, "bone": {}, "miss(mini_r=4)": {}, "mora": {},
            "rslora": wide, "adalora": {},
        }  # fmt: skip
        for i, (method, fields) in enumerate(made.items()):
            model = copy.deepcopy(self.base)
            adapters = lorica.attach(model, method, r=4, verbose=False, **fields)
            models.perturb(adapters)
            own = self.root / f"native-{i}"
            formats.save(adapters, own)
            tensors = [p.name for p in sorted(own.glob("*.safetensors"))]
            files = {"lorica.json": in_json, **dict.fromkeys(tensors, in_safetensors)}
            self.add(
                f"native {method}", own, files, self._load_adapter, signed="lorica.json", share=0.7
            )
            if "adapter_model.safetensors" not in tensors:
                continue
            theirs = self.root / f"peft-{i}"
            shutil.copytree(own, theirs)
            (theirs / "lorica.json").unlink()
            if method == "olora":
                config = json.loads((theirs / "adapter_config.json").read_text())
                config["init_lora_weights"] = "olora"
                (theirs / "adapter_config.json").write_text(json.dumps(config, indent=2))
            files = {"adapter_config.json": in_json, "adapter_model.safetensors": in_safetensors}
            self.add(f"peft {method}", theirs, files, self._load_adapter, share=0.9)
        self._classifier()

    def _load_adapter(self, folder: Path) -> list[Step]:
        def load() -> None:
            model = copy.deepcopy(self.base)
            before = {n: t.clone() for n, t in model.state_dict().items()}
            try:
                lorica.load(model, folder)
            except ValueError:
                after = model.state_dict()
                same = before.keys() == after.keys() and all(
                    torch.equal(before[n], after[n]) for n in before
                )
                assert same, "an adapter that was refused has changed the model"
                raise

        return [
            ("inspect", lambda: formats.inspect(folder)),
            ("load", load),
            ("lorica inspect", lambda: command("inspect", folder, "--json")),
            ("lorica inspect, shown", lambda: command("inspect", folder)),
        ]

    def _classifier(self) -> None:
        base = self.root / "bert"
        self.bert.save_pretrained(base)
        folder = self.root / "classifier"
        adapters = lorica.attach(
            copy.deepcopy(self.bert), "lora", r=2, verbose=False, modules_to_save=["classifier"]
        )
        formats.save(adapters, folder)
        (folder / "labels.json").write_text('["bad", "fair", "good"]\n')
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        (folder / "lorica.json").unlink()
        files = {"labels.json": in_json, "adapter_model.safetensors": in_safetensors,
                 "adapter_config.json": in_json}  # fmt: skip

        def steps(copied: Path) -> list[Step]:
            from lorica.run import load_model

            bare = self.root / "bert-bare"
            return [
                ("load_base", lambda: load_model.load_base(str(copied), str(bare))),
                ("labels", lambda: load_model._labels(copied, 3)),
            ]

        bare = transformers.BertModel(self.bert.config)
        bare.save_pretrained(self.root / "bert-bare")
        self.add("classifier", folder, files, steps, share=0.7)

    # -- run files ---------------------------------------------------------------------------------

    def _rows(self, folder: Path, count: int = 12) -> Path:
        draw = Random(0)
        rows = [
            {"prompt": " ".join(draw.choices(WORDS, k=4)), "completion": " " + draw.choice(WORDS)}
            for _ in range(count)
        ]
        folder.mkdir(exist_ok=True)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def _configs(self) -> None:
        from lorica.run.options import TrainOptions, kinds

        folder = self.root / "config"
        data = self._rows(folder)
        (folder / "run.yaml").write_text(
            f"model: {self.root / 'model'}\ndata: {data}\nmethod: dora+rslora\nr: 2\nmax_steps: 2\n"
            "per_device_train_batch_size: 4\nlearning_rate: 1.0e-3\nlora_dropout: 0.1\n"
            "target_modules: [q_proj, v_proj]\noutput_dir: out\nuse_cpu: true\n"
        )
        further = (
            "weight_decay", "save_steps", "optim", "optim_args", "adam_beta1", "max_grad_norm",
            "logging_steps", "lr_scheduler_kwargs", "dataloader_num_workers", "deepspeed", "fsdp",
            "accelerator_config", "torch_compile", "metric_for_best_model", "warmup_steps",
            "label_smoothing_factor", "save_strategy", "parallelism_config", "debug", "tf32",
        )  # fmt: skip
        keys = (*kinds(TrainOptions), *further)
        files = {"run.yaml": partial(in_yaml, keys=keys, canary=self.canary)}

        def steps(copied: Path) -> list[Step]:
            def run() -> None:
                os.chdir(copied)
                command("train", "run.yaml")

            return [("lorica train", run)]

        self.add("config", folder, files, steps, share=7, seconds=60, finish=_stop_before_training)

    # -- data --------------------------------------------------------------------------------------

    def _data(self) -> None:
        folder = self.root / "data"
        rows = self._rows(folder)
        labelled = "".join(f"{WORDS[i]} {WORDS[-i]},{i % 2}\n" for i in range(12))
        plain = {
            "rows.jsonl": rows.read_bytes(),
            "rows.json": json.dumps([json.loads(x) for x in rows.read_text().splitlines()],
            indent=1).encode(),
            "chat.jsonl": b"".join(
                json.dumps({"messages": [{"role": "user", "content": "the cat"},
                                         {"role": "assistant", "content": w}]}).encode() + b"\n"
                for w in WORDS
            ),
            "ids.jsonl": b'{"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2]}\n' * 6,
            "tags.jsonl": b'{"tokens": ["the", "cat"], "ner_tags": ["O", "B"]}\n'
            b'{"tokens": ["a"], "ner_tags": ["O"]}\n' * 3,
            "labels.csv": b"text,label\n" + labelled.encode(),
            "labels.tsv": b"text\tlabel\n" + labelled.replace(",", "\t").encode(),
            "plain.txt": b"the cat sees\na dog\n\nthe bird hears\n",
        }  # fmt: skip
        changes: dict[str, Change] = {
            ".jsonl": in_json_lines, ".json": in_json, ".txt": in_text,
            ".csv": partial(in_table, delimiter=","), ".tsv": partial(in_table, delimiter="\t"),
        }  # fmt: skip
        for name, data in plain.items():
            one = self.root / f"data-{name}"
            one.mkdir()
            (one / name).write_bytes(data)
            change = changes[Path(name).suffix]
            self.add(f"data {name}", one, {name: change}, partial(self._read, name), share=0.9)
        for suffix, pack in PACKERS.items():
            one = self.root / f"data-packed{suffix}"
            one.mkdir()
            inside = plain["rows.jsonl"]
            name = f"rows.jsonl{suffix}"
            (one / name).write_bytes(pack(inside))
            change = partial(_packed, plain=inside, suffix=suffix)
            self.add(f"data {name}", one, {name: change}, partial(self._read, name))
        one = self.root / "data-parquet"
        one.mkdir()
        name = "rows.parquet"
        (one / name).write_bytes(parquet(Random(0), None))
        change = lambda data, draw: ("parquet/table", parquet(draw, draw))  # noqa: E731
        self.add("data rows.parquet", one, {name: change}, partial(self._read, name), share=2)

    def _read(self, name: str, folder: Path) -> list[Step]:
        from lorica.data import detect, prepare, read
        from lorica.run.load_model import load_tokenizer

        def run() -> None:
            rows = read(str(folder / name))
            shape = detect(rows.column_names)
            prepare(rows, self.words, max_length=16, task=shape.default_task)

        self.words = load_tokenizer(str(self.root / "model"))
        return [("read and prepare", run)]

    # -- certain kinds of values -------------------------------------------------------------------

    def _kinds(self) -> None:
        """Whatever a subject's other files are good for, one value of one kind is put in."""
        theirs = next(s for s in self.every if s.name == "peft rslora")
        own = next(s for s in self.every if s.name == "native rslora")
        for name, value, share in (("pattern", pattern, 1.0), ("escape", escape, 1.0)):
            change = partial(_planted, value=value)
            file = {"adapter_config.json": change}
            self.add(f"{name} peft", theirs.folder, file, self._load_adapter, share=share)
            self.add(
                f"{name} native", own.folder, {"lorica.json": change}, self._load_adapter,
                share=share / 2,
            )  # fmt: skip
        self.add("pattern typed", theirs.folder, {"adapter_config.json": _typed}, self._type)
        folder = self.root / "template"
        tokenizer(folder)
        good = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        (folder / "chat_template.jinja").write_text(good)
        change = lambda data, draw: (  # noqa: E731
            "template", template(draw).encode(errors="surrogatepass"),
        )  # fmt: skip
        self._chat(folder)[0][1]()  # what it imports is not what an input takes
        self.add("template", folder, {"chat_template.jinja": change}, self._chat, share=3)
        for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
            one = self.root / f"columns{suffix}"
            one.mkdir()
            (one / f"rows{suffix}").write_text(f"text{delimiter}x\nthe cat{delimiter}1\n" * 2)
            change = partial(_columns, delimiter=delimiter)
            self.add(f"columns {suffix}", one, {f"rows{suffix}": change},
                     partial(self._read, f"rows{suffix}"))  # fmt: skip
        one = self.root / "call"
        one.mkdir()
        (one / "call.json").write_text('{"call": "optimizer", "rule": "adamw", "given": {}}')
        self.add("call", one, {"call.json": call}, self._call, share=3)

    def _type(self, folder: Path) -> list[Step]:
        """A pattern on the command line."""
        try:
            found = json.loads(_ours(folder / "adapter_config.json"))["typed"]
        except (ValueError, KeyError, TypeError):
            return [("nothing typed", lambda: None)]
        model = self.root / "model"
        flags = ("--target-modules", "--exclude-modules")
        return [
            (f"lorica targets {flag}", partial(command, "targets", "--model", model, flag, found))
            for flag in flags
        ]

    def _chat(self, folder: Path) -> list[Step]:
        from lorica.data import prepare, read
        from lorica.run.load_model import load_tokenizer

        rows = read(str(self.root / "data-chat.jsonl" / "chat.jsonl"))

        def run() -> None:
            prepare(rows, load_tokenizer(str(folder)), max_length=16, task="causal-lm")

        return [("prepare", run)]

    def _call(self, folder: Path) -> list[Step]:
        try:
            told = json.loads(_ours(folder / "call.json"))
            what, rule, draw = told["call"], told["rule"], Random(told.get("draw", 0))
            given = {str(name): VALUES[value] for name, value in told["given"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return [("no call", lambda: None)]

        def adapters(r: int = 4) -> lorica.Adapters:
            base = copy.deepcopy(self.base)
            try:
                return lorica.attach(base, f"lora+{rule}", r=r, verbose=False)
            except ValueError:
                return lorica.attach(base, rule, r=r, verbose=False)

        def stepped(r: int = 4) -> tuple[lorica.Adapters, torch.optim.Optimizer]:
            made = adapters(r)
            optimizer = lorica.optimizer(made, lr=1e-3)
            for t in made.trained():
                t.parameter.grad = torch.ones_like(t.parameter)
            optimizer.step()
            return made, optimizer

        def run() -> None:
            if what == "attach":
                lorica.attach(copy.deepcopy(self.base), **{"verbose": False, **given})
            elif what == "optimizer":
                optimizer = lorica.optimizer(adapters(), **{"lr": 1e-3, **given})
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = torch.ones_like(p)
                optimizer.step()
            elif what == "rank":
                stepped(3)[1].load_state_dict(stepped(4)[1].state_dict())
            elif what == "adapters state":
                made, _ = stepped()
                made.load_state_dict(_spoiled(made.state_dict(), draw))
            elif what == "optimizer state":
                _, optimizer = stepped()
                state = optimizer.state_dict()
                i = draw.choice(list(state["state"]))
                state["state"][i] = _spoiled(state["state"][i], draw)
                optimizer.load_state_dict(state)
                optimizer.step()

        return [(str(what), run)]

    # -- checkpoints -------------------------------------------------------------------------------

    def _checkpoints(self) -> None:
        folder = self.root / "run"
        data = self._rows(self.root / "run-data")
        with _silent():
            command(
                "train", "--model", self.root / "model", "--data", data, "--output-dir", folder,
                "--max-steps", 3, "--save-steps", 2, "--per-device-train-batch-size", 4, "--r", 2,
                "--method", "relora(every=1)", "--use-cpu",
            )  # fmt: skip
        for path in ("checkpoint-3", "result.json", "adapter", "model"):
            with contextlib.suppress(FileNotFoundError):
                done = folder / path
                shutil.rmtree(done) if done.is_dir() else done.unlink()
        where = folder / "checkpoint-2"
        torch_files = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        change = partial(in_torch, canary=self.canary)
        files: dict[str, Change] = {
            f"checkpoint-2/{name}": change for name in torch_files if (where / name).exists()
        }
        for name in ("trainer_state.json", "lorica.json", "adapter_config.json"):
            if (where / name).exists():
                files[f"checkpoint-2/{name}"] = in_json
        for file in where.glob("*.safetensors"):
            files[f"checkpoint-2/{file.name}"] = in_safetensors
        from lorica.run.options import TrainOptions, kinds

        keys = tuple(kinds(TrainOptions))
        files["config.yaml"] = partial(in_yaml, keys=keys, canary=self.canary)

        def steps(copied: Path) -> list[Step]:
            def run() -> None:
                os.chdir(copied)
                command("train", "--resume", "--output-dir", ".")

            return [("lorica train --resume", run)]

        self.add("checkpoint", folder, files, steps, share=3, seconds=90)

    # -- inputs ------------------------------------------------------------------------------------

    def run(self, seed: int, number: int, only: str | None = None) -> Result:
        """Make input `number` of `seed`, hand it over, and say what came of it.

        Odd numbers are blind changes, even ones know the format.

        Args:
            only: part of the names of the subjects to draw from.
        """
        draw = Random(f"{seed}/{number}")
        subjects = [s for s in self.every if only is None or only in s.name]
        subject = draw.choices(subjects, [s.share for s in subjects])[0]
        aware = number % 2 == 0
        with tempfile.TemporaryDirectory(dir=self.root) as place:
            copied = Path(place) / "input"
            shutil.copytree(subject.folder, copied, symlinks=True)
            file, change = made(copied, subject, draw, aware)
            outcomes = forked(
                subject.steps(copied), seconds=subject.seconds, canary=self.canary,
                finish=subject.finish,
            )  # fmt: skip
        return Result(number, subject.name, file, change, aware, outcomes)


def made(folder: Path, subject: Subject, draw: Random, aware: bool) -> tuple[str, str]:
    """Change one file of the folder; (its name, what was done)."""
    name = draw.choice(list(subject.files))
    if name == "auto_map":
        _bring_code(folder, subject.files[name](b"", draw)[1])
        return "config.json", "model/code"
    if name == "weight_map":
        name = "model.safetensors.index.json"
        change = _elsewhere
    else:
        change = subject.files[name]
    path = folder / name
    data = path.read_bytes()
    if not aware:
        what, data = blind(data, draw)
    elif draw.random() < 0.06:
        return name, _odd(path, draw)
    else:
        what, data = change(data, draw)
    path.write_bytes(data)
    if subject.signed is not None and path.name != subject.signed and draw.random() < 0.8:
        own = folder / subject.signed
        told = json.loads(own.read_text())
        told["files"][path.name] = hashlib.sha256(data).hexdigest()
        own.write_text(json.dumps(told))
        what += ", signed"
    return name, what


def _ours(path: Path) -> bytes:
    """A file that this harness reads itself, outside of any limit: a pipe or a device may be there
    instead, which would be read for ever."""
    return path.read_bytes() if path.is_file() else b""


def _planted(data: bytes, draw: Random, value: Callable[[Random], str]) -> tuple[str, bytes]:
    """One value, or one key, anywhere in the JSON is replaced."""
    told = json.loads(data)
    wide = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "bias")
    fields = told["recipe"] if isinstance(told.get("recipe"), dict) else told
    name = draw.choice((*wide, "rank_pattern", "alpha_pattern", *fields))
    if name.endswith("_pattern") and name != "layers_pattern":
        fields[name] = {value(draw): draw.choice((1, 2, 4))}
    else:
        fields[name] = draw.choice((value(draw), [value(draw)]))
    return f"planted/{name}", json.dumps(told).encode()


def _typed(data: bytes, draw: Random) -> tuple[str, bytes]:
    return "typed", json.dumps({"typed": pattern(draw)}).encode()


def _columns(data: bytes, draw: Random, delimiter: str) -> tuple[str, bytes]:
    return "columns", columns(draw, delimiter)


def _spoiled(state: Mapping[str, Any], draw: Random) -> Any:
    """A state with one tensor of another shape, type or value, or that is none."""
    out = {name: value.clone() for name, value in state.items()}
    name = draw.choice(list(out))
    value = out[name]
    kinds: list[Callable[[], Any]] = [
        lambda: out.pop(name),
        lambda: out.update({name: value * float("nan")}),
        lambda: out.update({name: value + float("inf")}),
        lambda: out.update({name: value[..., None]}),
        lambda: out.update({name: value.new_zeros(0)}),
        lambda: out.update({name: value.long()}),
        lambda: out.update({name: value.to(torch.complex64)}),
        lambda: out.update({name: None}),
        lambda: out.update({name: "x" * 50_000}),
        lambda: out.update({"x" * 50_000: value}),
    ]
    draw.choice(kinds)()
    return out


def _odd(path: Path, draw: Random) -> str:
    """Something else than a file in its place."""
    what = draw.choice(
        ("missing", "folder", "fifo", "device", "loop", "dangling", "passwd", "link")
    )
    data = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        aside = path.with_name("target")
        aside.write_bytes(data)
        path.symlink_to(aside)
    elif what != "missing":
        targets = {
            "device": "/dev/zero",
            "loop": path.name,
            "dangling": "/nowhere",
            "passwd": "/etc/passwd",
        }
        path.symlink_to(targets[what])
    return f"odd/{what}"


def _elsewhere(data: bytes, draw: Random) -> tuple[str, bytes]:
    index = json.loads(data)
    name = draw.choice(list(index["weight_map"]))
    index["weight_map"][name] = draw.choice(
        (
            "../model/model.safetensors",
            "/etc/passwd",
            "../../x.safetensors",
            "/dev/zero",
            "",
            3,
            None,
        )
    )
    return "index/elsewhere", json.dumps(index).encode()


def _bring_code(folder: Path, code: bytes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    config["model_type"] = "own-kind"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_bytes(code)
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    words["tokenizer_class"] = "Own"
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def _packed(data: bytes, draw: Random, plain: bytes, suffix: str) -> tuple[str, bytes]:
    return in_packed(plain, suffix, draw)


def parquet(draw: Random, change: Random | None) -> bytes:
    """A table of texts as parquet; with `change` one thing about it is odd."""
    import io as memory

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [" ".join(draw.choices(WORDS, k=5)) for _ in range(12)]
    table = pa.table({"text": texts, "label": [i % 2 for i in range(12)]})
    kinds: dict[str, Callable[[], pa.Table]] = {
        "many": lambda: pa.table({"text": pa.DictionaryArray.from_arrays(
            pa.array([0], pa.int8()).take(pa.repeat(0, 6 * 10**6)), ["the cat"])}),
        "wide": lambda: pa.table({"text": pa.DictionaryArray.from_arrays(
            pa.array([0] * 3000, pa.int8()), ["a" * 200_000])}),
        "twice": lambda: pa.Table.from_arrays([table["text"], table["text"]], ["text", "text"]),
        "where": lambda: pa.table({"text": texts, "__where__": texts}),
        "none": lambda: pa.table({}),
        "rows": lambda: table.slice(0, 0),
        "nulls": lambda: pa.table({"text": pa.nulls(5)}),
        "binary": lambda: pa.table({"text": [b"\xff\x00", b"a"]}),
        "nested": lambda: pa.table({"text": [[["a"]], [["b", "c"]]]}),
        "struct": lambda: pa.table({"messages": [[{"role": "user"}], [{"role": "x"}]]}),
        "decimal": lambda: table.append_column("x", pa.array([None] * 12, pa.decimal128(38, 3))),
        "time": lambda: table.append_column("x", pa.array([2**62] * 12, pa.timestamp("ns"))),
        "half": lambda: pa.table({"input_ids": [[1, 2**40]], "labels": [[-100, 5]]}),
    }  # fmt: skip
    notes = (
        b"[", b"{}", b"null", b"3", b'{"info": 3}', b'{"info": {}}', b'{"info": {"features": []}}',
        b'{"info": {"features": {"text": 3}}}', b"\xff", b'{"info": {"features": {}}}',
        b'{"info": {"features": {"text": {"dtype": "int64", "_type": "Value"}}}}',
        b'{"info": {"features": {"text": {"dtype": "x", "_type": "Value"}}}}',
        b'{"info": {"features": {"text": {"_type": "Nothing"}, "label": {"_type": "Image"}}}}',
        b'{"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": '
        b'{"names": ["a"], "_type": "ClassLabel"}}}}', b"[" * 100_000,
    )  # fmt: skip
    if change is not None:
        if change.random() < 0.5:
            table = table.replace_schema_metadata({"huggingface": change.choice(notes)})
        else:
            table = kinds[change.choice(list(kinds))]()
    out = memory.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def _stop_before_training() -> None:
    """A run whose file was accepted goes as far as its first step."""

    def train(self: Any, *args: Any, **kwargs: Any) -> None:
        raise Enough

    transformers.Trainer.train = train  # type: ignore[method-assign]


@contextlib.contextmanager
def _silent() -> Any:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):  # noqa: SIM117
        with contextlib.redirect_stderr(null):
            yield
