"""report.html, made of what a run's folder holds: one run, or several side by side."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.run.folder import REPORT_HEAD
from lorica.run.report.chart import Chart, Line, line, smoothed
from lorica.run.report.read import Run
from lorica.text import by_pattern, clock, human, printable

if TYPE_CHECKING:
    from jinja2 import Environment

COLOURS = 6  # of lines, on the page
# Figures of an evaluation that lie between -1 and 1, and may share an axis.
_SHARES = ("accuracy", "f1", "f1_macro", "precision", "recall", "matthews", "pearson", "spearman")
MOST_CELLS = 30  # classes of which the whole table of confusion is drawn

Values = Mapping[str, Any]  # of a JSON file


def page(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side; a demonstration's says what it taught."""
    named = _named(runs)
    head = f"{REPORT_HEAD} -->"
    if len(named) == 1 and "demo" in named[0].result:
        head = head.replace(" -->", " demo -->")
        return environment().get_template("demo/page.html").render(head=head, run=named[0])
    if len(named) == 1:
        return environment().get_template("report/page.html").render(head=head, run=named[0])
    return (
        environment()
        .get_template("report/several.html")
        .render(
            head=head,
            runs=named,
            results=results(named),
            charts=charts(named),
            differences=differences(named),
            samples=answers(named),
            exact=all(run.samples and run.samples["exact"] for run in named),
        )
    )


@functools.cache
def environment() -> Environment:
    """Jinja over the templates of this package: every value is escaped, and what a terminal or a
    browser would obey is spelled out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and type(value) is not Markup else value

    made = Environment(
        loader=PackageLoader("lorica", "run"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def code(text: str) -> Markup:
        """With what is between back-ticks as code."""
        parts = enumerate(printable(text).split("`"))
        return Markup("").join(
            Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in parts
        )

    made.filters |= {
        "code": code, "difference": difference, "figure": figure, "human": human, "number": number,
        "percent": percent,
    }  # fmt: skip
    return made


# -- what the templates show -----------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A run, as the templates ask for its parts.

    Attributes:
        run: its files.
        name: among the others.
        colour: of its lines.
    """

    run: Run
    name: str
    colour: int

    @property
    def result(self) -> Values:
        return self.run.result or {}

    @property
    def config(self) -> Values:
        return self.run.config

    @property
    def finished(self) -> bool:
        return self.run.result is not None

    @property
    def model(self) -> str:
        told = self.result.get("model", {}).get("name") or self.config.get("model")
        return short(told or self.config.get("model_config") or "lorica:base")

    @property
    def data(self) -> str:
        told = self.result.get("data", {}).get("name") or self.config.get("data") or "embedded text"
        names = told if isinstance(told, list) else str(told).split(", ")
        return ", ".join(short(name) for name in names)

    @property
    def method(self) -> str:
        return str(self.result.get("method") or self.config.get("method") or "adapter")

    @property
    def base_parameters(self) -> int:
        """Of the model without the update."""
        return base_size(self.result)

    @property
    def tiles(self) -> list[tuple[str, str, str]]:
        """(name, figure, a few words) of the figures on top."""
        result = self.result
        tiles = [*self._evaluated()]
        if self.finished:
            share = result["trainable"] / max(self.base_parameters, 1)
            tiles.append(
                (
                    "Parameters trained",
                    f"{result['trainable']:,}",
                    f"{percent(share)} of the model’s {self.base_parameters:,}",
                )
            )
            tiles.append(
                (
                    "Time",
                    clock(result["seconds"]),
                    f"{clock(result['seconds_with_loading'])} with loading, on {result['device']}",
                )
            )
        if memory := max((x.get("peak_memory") or 0 for x in self.run.lines), default=0):
            where = "of the accelerator" if result.get("device") == "cuda" else "of the process"
            tiles.append(("Peak memory", human(memory), where))
        if self.run.output is not None and (size := self.run.output_bytes):
            tiles.append((self.run.output.name.capitalize(), human(size), "its weights on disk"))
        return tiles

    def _evaluated(self) -> list[tuple[str, str, str]]:
        """The evaluation of the weights that are kept; else the last loss."""
        figures = self.evaluation
        if figures:
            step = self.result.get("best_step")
            where = f"at step {step:,}, the best" if step else "at the last evaluation"
            chosen = [n for n in _SHARES if n in figures][:2]
            chosen += [n for n in ("loss", "perplexity") if n in figures]
            return [(f"Evaluation {_title(n)}", figure(figures[n]), where) for n in chosen[:2]]
        lines = self.run.training
        if not lines:
            return []
        last = lines[-1]
        return [("Training loss", figure(last["loss"]), f"at step {last['step']:,}")]

    @property
    def evaluation(self) -> dict[str, Any]:
        """Figures by their short names."""
        told = self.result.get("evaluation")
        if told is None and self.run.evaluations:
            told = self.run.evaluations[-1]
        return {k[5:]: v for k, v in (told or {}).items() if k.startswith("eval_")}

    @property
    def charts(self) -> list[Chart]:
        return charts([self])

    @property
    def evaluations(self) -> tuple[list[str], Sequence[Values]]:
        """Names of the figures, and the lines of the evaluations."""
        lines = self.run.evaluations
        names = [k for k in (lines[0] if lines else {}) if k.startswith("eval_")]
        return names, lines

    @property
    def samples(self) -> Values | None:
        told = self.run.samples
        return told if told and told.get("rows") else None

    @property
    def classes(self) -> Classes | None:
        told = self.result.get("confusion")
        return Classes.of(told) if told else None

    @property
    def trained(self) -> list[dict[str, Any]]:
        """Adapted layers, by pattern of their names."""
        layers = {layer["name"]: layer for layer in self.result.get("layers") or ()}
        rows = []
        for pattern, names in by_pattern(layers).items():
            group = [layers[name] for name in names]
            norms = [g["norm"] for g in group if g["norm"] is not None]
            rows.append(
                {
                    "pattern": pattern,
                    "count": len(group),
                    "shape": _same(map(_shape, group)),
                    "rank": _range(
                        [g["r"] if g["live"] is None else g["live"] for g in group if g["r"]]
                    ),
                    "parameters": sum(g["parameters"] for g in group),
                    "norms": [(g["name"], g["norm"]) for g in group if g["norm"] is not None],
                    "norm": _range(norms),
                }
            )
        return rows

    @property
    def largest_norm(self) -> float:
        norms = [g["norm"] or 0.0 for g in self.result.get("layers") or ()]
        return max(norms, default=0.0) or 1.0

    @property
    def beside(self) -> list[tuple[str, str]]:
        """(what else trains, or doesn't; why or how much)."""
        summary: Values = self.result.get("summary") or {}
        rows = [
            (name, f"trains in full{_reason(summary['heads'].get(name))}")
            for name in summary.get("saved", ())
        ]
        rows += [(n, f"{len(ids):,} rows train") for n, ids in summary.get("tokens", {}).items()]
        for pattern, names in by_pattern(summary.get("left_out", {})).items():
            count = f"{len(names):,} layers " if len(names) > 1 else ""
            rows.append((pattern, f"{count}not adapted: {summary['left_out'][names[0]]}"))
        unadapted: Values = summary.get("unadapted", {})
        groups = {p: sum(unadapted[n] for n in ns) for p, ns in by_pattern(unadapted).items()}
        for pattern, share in sorted(groups.items(), key=lambda item: -item[1]):
            rows.append((pattern, f"not adapted, {percent(share)} of all parameters"))
        return rows

    @property
    def settings(self) -> list[tuple[str, str, str]]:
        """(option, value, what chose it) of config.yaml."""
        return [
            (name, _value(value), _origin(self.run, name)) for name, value in self.config.items()
        ]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What identifies the run."""
        result = self.result
        facts = [("folder", str(self.run.folder.resolve()))]
        if not self.finished:
            return facts
        data, model = result["data"], result["model"]
        facts.append(("model", f"{self.model}, {model['class']} in {model['dtype']}"))
        for key in ("sha256", "initial_sha256"):
            if model.get(key):
                facts.append((f"model {key.replace('_', ' ')}", model[key]))
        rows = data.get("rows")
        facts.append(("data", self.data + (f", {rows:,} rows" if rows else "")))
        if data.get("sha256"):
            facts.append(("data sha256", data["sha256"]))
        facts.append(("tokens trained on", f"{result['tokens']:,}"))
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in result["versions"].items())))
        return facts

    @property
    def commands(self) -> list[tuple[str, str]]:
        """(what for, what to type)."""
        run, place = self.run, str(self.run.folder.resolve())
        again = ["lorica", run.verb, f"{place}/config.yaml", "--output-dir", "again"]
        resume = ["lorica", run.verb, "--output-dir", place, "--resume"]
        if not self.finished:
            out = [("Continue it", resume), ("Repeat it", again)]
            return [(what, shlex.join(words)) for what, words in out]
        out = []
        if run.output is not None:
            kept = f"{place}/{run.output.name}"
            adapter = run.output.name == "adapter"
            which = ["--adapter" if adapter else "--model", kept]
            if run.verb == "train":
                out.append(("Evaluate it", ["lorica", "eval", *which, *self._evaluation_data()]))
            if self.result.get("task") in ("causal-lm", "seq2seq-lm", "pretraining"):
                rows = self.samples["rows"] if self.samples else []
                prompt = min((row["prompt"] for row in rows), key=len, default="...")
                words = ["lorica", "generate", *which, "--prompt", prompt[:200]]
                out.append(("Ask it something", words))
            if adapter:
                merge = ["lorica", "merge", *which, "--output-dir", "merged"]
                out.append(("Merge it into the model", merge))
            out.append(("Share it", ["lorica", "push", kept, "OWNER/NAME"]))
            if run.verb == "train":
                more = ["lorica", "train", *which, "--output-dir", "more"]
                out.append(("Train it further, from a new optimizer", more))
        if any(run.folder.glob("checkpoint-*")):
            out.append(("Resume it: a finished run writes its results again", resume))
        out.append(("Repeat the run", again))
        return [(what, shlex.join(words)) for what, words in out]

    def _evaluation_data(self) -> list[str]:
        """The options of `lorica eval` that name what this run was evaluated on, or trained on."""
        words: list[str] = []
        data = self.config.get("eval_data") or self.config.get("data")
        for name, value in (
            ("data", data),
            ("split", self.config.get("eval_split")),
            ("header", self.config.get("header")),
            ("columns", self.config.get("columns")),
        ):
            if isinstance(value, Mapping):
                value = [f"{key}={column}" for key, column in value.items()]
            if value:
                words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [value])]
        return words


@dataclass(frozen=True)
class Classes:
    """The confusion of an evaluation.

    Attributes:
        rows: of each class that occurs: name, support, precision, recall, f1 (None: undefined).
        names: classes in the order of `table`.
        table: [label][prediction] counts; empty where there are too many classes.
        mistakes: (label, prediction, count), the most frequent first.
    """

    rows: list[dict[str, Any]]
    names: list[str]
    table: list[list[int]]
    mistakes: list[tuple[str, str, int]]

    @classmethod
    def of(cls, told: Values) -> Classes:
        names, cells = told["classes"], told["counts"]
        hits = {i: n for i, j, n in cells if i == j}
        true: dict[int, int] = {}
        said: dict[int, int] = {}
        for i, j, n in cells:
            true[i], said[j] = true.get(i, 0) + n, said.get(j, 0) + n
        there = sorted({*true, *said})
        rows = []
        for i in there:
            right, of, all_said = hits.get(i, 0), true.get(i, 0), said.get(i, 0)
            rows.append(
                {
                    "name": names[i],
                    "support": of,
                    "precision": right / all_said if all_said else None,
                    "recall": right / of if of else None,
                    "f1": 2 * right / (of + all_said),
                }
            )
        counts = {(i, j): n for i, j, n in cells}
        table = [[counts.get((i, j), 0) for j in there] for i in there]
        wrong = sorted((c for c in cells if c[0] != c[1]), key=lambda c: -c[2])[:10]
        return cls(
            rows,
            [names[i] for i in there],
            table if len(there) <= MOST_CELLS else [],
            [(names[i], names[j], n) for i, j, n in wrong],
        )


# -- charts ----------------------------------------------------------------------------------------


def charts(runs: Sequence[Shown]) -> list[Chart]:
    """Loss, figures of the evaluations, rate, pace and memory over the steps; what has no line is
    left out."""
    last = float(max(run.run.steps for run in runs))
    alone = len(runs) == 1
    chart = functools.partial(Chart, last=last)

    def lines(key: str, of: str, name: str, **how: bool) -> list[Line]:
        made = []
        for run in runs:
            found = getattr(run.run, of)
            one = line(
                name if alone else run.name,
                [(x["step"], x.get(key)) for x in found],
                run.colour,
                **how,
            )
            made += [one] if one.points else []
        return made

    out: list[Chart] = []
    loss, held = lines("loss", "training", "training"), lines("eval_loss", "evaluations", "held")
    if alone:
        held = [Line("evaluation", x.points, 1, dots=True) for x in held]
        both = [part for x in loss for part in smoothed(x)] + held
        if both:
            note = "Mean over the label tokens or labels, in nats"
            out.append(chart("Loss", note, tuple(both), _plain, wide=True))
    else:
        means = [Line(x.name, smoothed(x)[-1].points, x.colour) for x in loss]
        dotted = [Line(x.name, x.points, x.colour, dots=True) for x in held]
        note = "Mean over the label tokens or labels, in nats"
        if means:
            about = f"{note}; of many points their running mean"
            out.append(chart("Training loss", about, tuple(means), _plain, wide=True))
        if dotted:
            out.append(chart("Evaluation loss", note, tuple(dotted), _plain, wide=True))
    for part in _figure_charts(runs, lines, chart, alone):
        out.append(part)
    small: list[tuple[str, str, str, Callable[[float], str], dict[str, Any]]] = [
        (
            "learning_rate",
            "Learning rate",
            "Of the first group of parameters",
            _tiny,
            {"floor": 0.0},
        ),
        ("tokens_per_second", "Tokens per second", "Without evaluations", _whole, {"floor": 0.0}),
        ("peak_memory", "Peak memory", "So far", human, {"floor": 0.0, "bytes": True}),
        ("grad_norm", "Gradient norm", "Before clipping", _plain, {}),
    ]
    for key, title, note, form, how in small:
        found = lines(key, "training", title.lower())
        if key == "grad_norm" and alone:
            found = [part for x in found for part in smoothed(x)]
        if found:
            out.append(chart(title, note, tuple(found), form, **how))
    return out


def _figure_charts(
    runs: Sequence[Shown],
    lines: Callable[..., list[Line]],
    chart: Callable[..., Chart],
    alone: bool,
) -> list[Chart]:
    """Accuracy, F1 and the like: together where there is one run, else a chart for each."""
    names = [n for n in _SHARES if any(f"eval_{n}" in x for r in runs for x in r.run.evaluations)]
    found = {n: lines(f"eval_{n}", "evaluations", _title(n), dots=True) for n in names}
    note = "On the evaluation data"
    if alone:
        drawn = [
            Line(x.name, x.points, colour, dots=True)
            for colour, each in enumerate(found.values())
            for x in each
        ]
        return [chart("Evaluation", note, tuple(drawn), _plain, wide=True)] if drawn else []
    return [
        chart(_title(n).capitalize(), note, tuple(each), _plain)
        for n, each in found.items()
        if each
    ]


# -- side by side ----------------------------------------------------------------------------------


def results(runs: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """(figure, its value in each run); those that no run has are left out."""
    names = dict.fromkeys(n for run in runs for n in run.evaluation)
    rows: list[tuple[str, list[Any]]] = [
        (f"evaluation {_title(n)}", [r.evaluation.get(n) for r in runs]) for n in names
    ]
    out = [(name, [figure(v) for v in values]) for name, values in rows]
    forms: dict[str, tuple[str, Callable[[Any], str]]] = {
        "best step": ("best_step", _whole),
        "training loss, mean": ("train_loss", figure),
        "steps": ("steps", _whole),
        "tokens": ("tokens", _whole),
        "parameters trained": ("trainable", _whole),
        "time": ("seconds", clock),
        "tokens per second": ("tokens_per_second", _whole),
        "peak memory": ("peak_memory", human),
    }
    for name, (key, form) in forms.items():
        values = [r.result.get(key) for r in runs]
        if any(v is not None for v in values):
            out.append((name, ["–" if v is None else form(v) for v in values]))
    sizes = [r.run.output_bytes for r in runs]
    out.append(("what was trained", ["–" if not s else human(s) for s in sizes]))
    out.append(("state", ["finished" if r.finished else f"at step {r.run.steps:,}" for r in runs]))
    return out


def differences(runs: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """Options that are not the same in every run, without the folder."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = []
    for name in names:
        values = [_value(run.config[name]) if name in run.config else "–" for run in runs]
        if len(set(values)) > 1 and name != "output_dir":
            rows.append((name, values))
    return rows


def answers(runs: Sequence[Shown]) -> list[tuple[Values, list[tuple[str, str]]]]:
    """(example, (run, its answer after training) of each) of the examples that all were asked."""
    told = [run.samples for run in runs]
    if not all(told):
        return []
    rows = [{(row["prompt"], row["wanted"]): row for row in t["rows"]} for t in told if t]
    asked = [key for key in rows[0] if all(key in other for other in rows)]
    return [
        (
            rows[0][key],
            [(run.name, other[key]["after"]) for run, other in zip(runs, rows, strict=True)],
        )
        for key in asked
    ]


def _named(runs: Sequence[Run]) -> list[Shown]:
    """With names that tell them apart."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return [Shown(run, n, i % COLOURS) for i, (run, n) in enumerate(zip(runs, names, strict=True))]


# -- words and numbers -----------------------------------------------------------------------------


def figure(value: Any) -> str:
    """A figure of an evaluation, with four digits.

    Example:
        >>> figure(0.98765), figure(1671.83), figure(None)
        ('0.9877', '1,672', '–')
    """
    if not isinstance(value, (int, float)):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def difference(row: Values) -> str:
    """The largest difference of a logit between two programs, next to the largest logit."""
    gap = row["max_logit_difference"]
    return "0 (to the bit)" if gap == 0 else f"{gap:.1e} (of up to {row['largest_logit']:.0f})"


def number(count: int) -> str:
    """A count that begins a sentence.

    Example:
        >>> number(5), number(12)
        ('Five', '12')
    """
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[count] if count < len(words) else f"{count:,}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def short(name: Any) -> str:
    """The last part of a path; names of a hub or of the embedded data as they are."""
    text = str(name)
    return Path(text).name if Path(text).is_absolute() else text


def base_size(result: Values) -> int:
    """Parameters of the model without the update."""
    frozen = result.get("summary", {}).get("frozen", {})
    return frozen["base"]["elements"] if "base" in frozen else result.get("parameters", 0)


def _title(name: str) -> str:
    return {"f1": "F1", "f1_macro": "macro F1"}.get(name, name.replace("_", " "))


def _plain(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _tiny(value: float) -> str:
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _origin(run: Run, name: str) -> str:
    default = run.defaults.get(name)
    if default is None or default["value"] != run.config.get(name):
        return ""
    return f"default of {default['from']}"


def _reason(why: str | None) -> str:
    return "" if why is None else f": {why}"


def _shape(layer: Values) -> str:
    shape = f"{layer['out']:,} × {layer['in']:,}"
    return f"{layer['experts']:,} experts × {shape}" if layer["experts"] else shape


def _same(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))


def _range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    if low == high:
        return f"{low:.3g}"
    return f"{low:.3g} to {high:.3g}"
