"""The result as one page: no script, no network, nothing beside the file.

Figures are drawn as inline SVG; the page follows the reader's light or dark setting and prints.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorica.model.summary import human
from lorica.text import printable

_STYLE = """
:root {
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2530; --soft: #5c6876; --line: #e3e1dc;
  --grid: #ecebe7; --was: #9aa4b1; --new: #0a8f6f; --old: #4a63c9; --bad: #c2413a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1b2128; --ink: #e8ebef; --soft: #9aa6b4; --line: #2e3742;
    --grid: #262e37; --was: #717d8b; --new: #35c39d; --old: #8ea2ff; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1000px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0; }
.mark { font-weight: 600; color: var(--soft); letter-spacing: 0.02em; margin-bottom: 18px; }
.lead, .note { color: var(--soft); }
.lead { font-size: 16px; max-width: 46em; }
.note { font-size: 13px; margin-bottom: 16px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 22px 24px; margin-top: 20px; overflow-x: auto;
}
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 14px;
  margin-top: 28px;
}
.figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px;
}
.figure .name { color: var(--soft); font-size: 13px; }
.figure .value { font-size: 27px; font-weight: 650; letter-spacing: -0.01em; white-space: nowrap; }
.figure .from { color: var(--soft); font-weight: 500; font-size: 17px; }
.figure .more { color: var(--soft); font-size: 12.5px; }
.figure.new .value b { color: var(--new); } .figure.old .value b { color: var(--old); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); text-align: left; }
th, td { padding: 4px 14px 4px 0; vertical-align: middle; }
td.n, th.n { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr + tr td { border-top: 1px solid var(--grid); }
td.task { font-weight: 550; white-space: nowrap; }
td.plot, th.plot { width: 38%; padding-top: 0; padding-bottom: 0; }
th.plot svg { display: block; width: 100%; height: 20px; }
th.plot text { fill: var(--soft); font-size: 11.5px; font-weight: 400; }
td.about { color: var(--soft); font-size: 13px; }
td.about code { font-size: 12px; white-space: nowrap; }
@media (max-width: 720px) { .about { display: none; } .plot { min-width: 120px; } }
td.plot { position: relative; height: 30px; }
td.plot svg { position: absolute; inset: 0; width: calc(100% - 14px); height: 100%; }
.plot svg { overflow: visible; }
tr.group td { padding-top: 14px; border-top: 0; font-weight: 650; }
tr.mean td { font-weight: 650; }
.new td.after, tr.group.new td { color: var(--new); }
.old td.after, tr.group.old td { color: var(--old); }
td.before { color: var(--soft); }
code, .text { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.text { overflow-wrap: anywhere; }
.wrong { color: var(--bad); }
.key { display: inline-flex; align-items: center; gap: 6px; margin-right: 18px; }
.key i { width: 10px; height: 10px; border-radius: 50%; display: inline-block; }
summary { cursor: pointer; color: var(--soft); margin-top: 12px; }
.loss svg { display: block; width: 100%; height: auto; }
.loss text { fill: var(--soft); font-size: 12px; font-family: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 8px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
@media print { section, .figure { break-inside: avoid; } }
"""


def escape(text: str) -> str:
    """Data as the page shows it: what HTML would read, or what turns text around, is spelt out."""
    return html.escape(printable(text))


def page(result: Mapping[str, Any]) -> str:
    """The page of a result, as `lorica.run.demo.run.demo` returns it."""
    body = [
        _head(result),
        _figures(result),
        _tasks(result["demo"]),
        _loss(result),
        _answers(result["demo"]["samples"]),
        _reread(result["demo"]),
        _facts(result),
    ]
    return _frame("\n".join(body))


def waiting() -> str:
    """The page while the demonstration runs; it looks again by itself."""
    said = "The demonstration is running. This page turns into its result."
    return _frame(_plain("One moment", said), refresh=True)


def stopped() -> str:
    """The page after a failure."""
    said = "The demonstration ended before its end. Run <code>lorica demo</code> again."
    return _frame(_plain("No result", said))


def _frame(body: str, *, refresh: bool = False) -> str:
    again = '<meta http-equiv="refresh" content="5">\n' if refresh else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon of its own keeps a browser from asking a server for one.
        f'{again}<link rel="icon" href="data:,">\n<title>Lorica demo</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _plain(title: str, said: str) -> str:
    return f'<div class="mark">Lorica demo</div><h1>{title}</h1><p class="lead">{said}</p>'


# -- parts -----------------------------------------------------------------------------------------


def _head(result: Mapping[str, Any]) -> str:
    demo = result["demo"]
    new = [row["task"] for row in demo["tasks"] if row["kind"] == "new"]
    old = len(demo["tasks"]) - len(new)
    return (
        '<div class="mark">Lorica demo</div>'
        f"<h1>{_number(len(new))} new tasks, learnt with {escape(result['method'])}</h1>"
        f'<p class="lead">A language model of {base_size(result):,} parameters, which comes with'
        f" Lorica, knew {old} small text tasks and none of {escape(', '.join(new))}. It was trained"
        f" for {result['steps']:,} steps of {demo['batch']} examples, half of them of old tasks."
        " Exact match is measured on inputs that were never trained on.</p>"
    )


def _figures(result: Mapping[str, Any]) -> str:
    demo = result["demo"]
    share = result["trainable"] / base_size(result)

    def change(kind: str) -> str:
        scores = demo[kind]
        return f'<span class="from">{percent(scores["before"])} →</span> <b>' + (
            f"{percent(scores['after'])}</b>"
        )

    cells = [
        ("new", "New tasks, exact match", change("new"), "what was learnt"),
        ("old", "Old tasks, exact match", change("old"), "what was kept"),
        (
            "",
            "Parameters trained",
            f"{result['trainable']:,}",
            f"{share:.1%} of the model’s {base_size(result):,}",
        ),
        (
            "",
            "Adapter",
            human(demo["adapter"]["bytes"]),
            escape(", ".join(demo["adapter"]["files"])),
        ),
        ("", "Training", f"{result['seconds']:.0f} s", f"{demo['seconds']:.0f} s in all"),
        ("", "Peak memory", human(result["peak_memory"]), "of the whole process"),
    ]
    return (
        '<div class="figures">'
        + "".join(
            f'<div class="figure {kind}"><div class="name">{name}</div>'
            f'<div class="value">{value}</div><div class="more">{more}</div></div>'
            for kind, name, value, more in cells
        )
        + "</div>"
    )


def _tasks(demo: Mapping[str, Any]) -> str:
    rows = []
    for kind, title in (("new", "New tasks"), ("old", "Old tasks")):
        rows.append(f'<tr class="group {kind}"><td colspan="5">{title}</td></tr>')
        rows += [_task(row) for row in demo["tasks"] if row["kind"] == kind]
        mean = {"task": "mean", "kind": kind, "description": "", **demo[kind]}
        rows.append(_task(mean, extra=" mean"))
    each = sorted({row["examples"] for row in demo["tasks"]})
    counts = " or ".join(f"{n:,}" for n in each)
    return (
        "<section><h2>What was learnt, and what was forgotten</h2>"
        f'<p class="note">Greedy answers that are right to the letter, {counts} prompts a task.'
        ' <span class="key"><i style="background:var(--was)"></i>before</span>'
        '<span class="key"><i style="background:var(--new)"></i>after, new</span>'
        '<span class="key"><i style="background:var(--old)"></i>after, old</span></p>'
        '<table><thead><tr><th>task</th><th class="about"></th><th class="plot">'
        + _axis()
        + "</th>"
        '<th class="n">before</th>'
        f'<th class="n">after</th></tr></thead><tbody>{"".join(rows)}</tbody></table></section>'
    )


def _task(row: Mapping[str, Any], extra: str = "") -> str:
    return (
        f'<tr class="{row["kind"]}{extra}"><td class="task">{escape(row["task"])}</td>'
        f'<td class="about">{_with_code(row["description"])}</td>'
        f'<td class="plot">{_dumbbell(row)}</td>'
        f'<td class="n before">{percent(row["before"])}</td>'
        f'<td class="n after">{percent(row["after"])}</td></tr>'
    )


def _with_code(text: str) -> str:
    """What stands between back-ticks, as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _x(share: float) -> str:
    """Where a share stands in a plot's width; the dots keep their half at both ends."""
    return f"{3 + 94 * share:.2f}%"


def _axis() -> str:
    labels = "".join(
        f'<text x="{_x(at)}" y="14" text-anchor="middle">{round(100 * at)}%</text>'
        for at in (0, 0.5, 1)
    )
    return f"<svg>{labels}</svg>"


def _dumbbell(row: Mapping[str, Any]) -> str:
    """From before to after on a scale from 0 to 100 %."""
    before, after, colour = row["before"], row["after"], f"var(--{row['kind']})"
    lines = "".join(
        f'<line x1="{_x(at)}" x2="{_x(at)}" y1="0" y2="100%" stroke="var(--grid)"/>'
        for at in (0, 0.25, 0.5, 0.75, 1)
    )
    label = f"{row['task']}: {percent(before)} before, {percent(after)} after"
    return (
        f'<svg role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>{lines}'
        f'<line x1="{_x(before)}" x2="{_x(after)}" y1="50%" y2="50%" stroke="{colour}"'
        ' stroke-width="3" stroke-opacity="0.45"/>'
        f'<circle cx="{_x(before)}" cy="50%" r="5" fill="var(--was)"/>'
        f'<circle cx="{_x(after)}" cy="50%" r="5.5" fill="{colour}"/></svg>'
    )


def _loss(result: Mapping[str, Any]) -> str:
    points = [(p["step"], p["loss"]) for p in result["demo"]["loss"] if p["loss"]]
    if not points:
        return ""
    width, height, left, top, bottom = 940, 250, 48, 12, 34
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    ticks = [k * 10.0**e for e in range(-4, 3) for k in (1, 2, 5)]
    floor = max((t for t in ticks if t <= lowest), default=lowest)
    roof = min((t for t in ticks if t >= highest), default=highest)
    span = math.log(roof / floor) or 1.0

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 12) * step / result["steps"]
        return x, top + (height - top - bottom) * math.log(roof / loss) / span

    grid = ""
    for tick in (t for t in ticks if floor <= t <= roof):
        y = at(0, tick)[1]
        grid += (
            f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>'
        )
        grid += f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for step in _steps(result["steps"]):
        x = at(step, floor)[0]
        grid += f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{step:,}</text>'
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--new)"><title>step {step}: '
        f"{loss:.4f}</title></circle>"
        for (step, loss), (x, y) in ((point, at(*point)) for point in points)
    )
    return (
        '<section class="loss"><h2>Loss</h2><p class="note">Of the answers’ tokens, in nats, on a'
        " logarithmic scale; each point is the mean since the one before it. From"
        f" {points[0][1]:.3f} to {points[-1][1]:.3f}.</p>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss by step">{grid}'
        f'<polyline points="{line}" fill="none" stroke="var(--new)" stroke-width="2"'
        f' stroke-linejoin="round"/>{dots}</svg></section>'
    )


def _steps(last: int) -> list[int]:
    """A handful of round numbers from 0 to `last`."""
    rough = max(1.0, last / 6)
    unit = 10 ** math.floor(math.log10(rough))
    every = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    return list(range(0, last + 1, every))


def _answers(samples: Sequence[Mapping[str, str]]) -> str:
    new = [row for row in samples if row["kind"] == "new"]
    old = [row for row in samples if row["kind"] == "old"]
    return (
        '<section><h2>In its own words</h2><p class="note">The first prompts of each task, whatever'
        f" came.</p>{_answer_table(new)}<details><summary>Old tasks</summary>{_answer_table(old)}"
        "</details></section>"
    )


def _answer_table(samples: Sequence[Mapping[str, str]]) -> str:
    def cell(row: Mapping[str, str], when: str) -> str:
        right = row[when] == row["wanted"]
        sign = "✓" if right else "✗"
        return f'<td class="text{"" if right else " wrong"}">{sign} {escape(shown(row[when]))}</td>'

    rows = "".join(
        f'<tr><td class="text">{escape(row["prompt"])}</td>{cell(row, "before")}'
        f'{cell(row, "after")}<td class="text">{escape(row["wanted"])}</td></tr>'
        for row in samples
    )
    return (
        "<table><thead><tr><th>prompt</th><th>before</th><th>after</th><th>right</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _reread(demo: Mapping[str, Any]) -> str:
    rows = ""
    for row in demo["reread"]:
        if "skipped" in row:
            rows += (
                f'<tr><td class="task">{escape(row["name"])}</td><td colspan="2" class="before">'
            )
            rows += f"{escape(row['skipped'])}</td></tr>"
        else:
            rows += f'<tr><td class="task">{escape(row["name"])}</td>'
            rows += f'<td class="n">{difference(row)}</td>'
            rows += f'<td class="n">{row["same_answers"]:,} of {row["answers"]:,}</td></tr>'
    return (
        '<section><h2>Read again</h2><p class="note">Fresh processes read the saved files and are'
        " compared with the model that training left in memory: every logit of"
        f" {demo['reread'][0]['texts']:,} texts, and every answer.</p><table><thead><tr>"
        '<th>read by</th><th class="n">largest difference of a logit</th>'
        f'<th class="n">same answers</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _facts(result: Mapping[str, Any]) -> str:
    demo, recipe = result["demo"], result["recipe"]
    facts = {
        "method": f"{result['method']}, r={recipe['r']}, lora_alpha={recipe['lora_alpha']}",
        "training": f"{result['steps']:,} steps of {demo['batch']} examples, peak learning rate"
        f" {result['learning_rate']:g}, {result['tokens']:,} tokens,"
        f" {result['tokens_per_second']:,.0f} tokens/s on {demo['threads']} threads",
        "files": demo["adapter"]["path"],
        "base": f"{result['model']['class']}, SHA-256 {result['model']['sha256'][:16]}…",
        "versions": ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<section><h2>How</h2><dl>{rows}</dl></section>{_foot(demo['adapter']['path'])}"


def _foot(kept: str) -> str:
    """What to type next."""
    ask = f"lorica generate --adapter {kept} --prompt $'flip: lorica\\n'"
    return (
        "<footer>The training again: <code>lorica train config.yaml --output-dir ANOTHER</code>."
        f" The model in person: <code>{escape(ask)}</code>.</footer>"
    )


# -- words and numbers, for the terminal too -------------------------------------------------------


def base_size(result: Mapping[str, Any]) -> int:
    """Parameters of the model without the update."""
    frozen = result["summary"]["frozen"]
    return frozen["base"]["elements"] if "base" in frozen else result["parameters"]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def difference(row: Mapping[str, Any]) -> str:
    """The largest difference of a logit, next to the largest logit."""
    gap = row["max_logit_difference"]
    return "0 (to the bit)" if gap == 0 else f"{gap:.1e} (of up to {row['largest_logit']:.0f})"


def shown(answer: str) -> str:
    """An answer on one line."""
    return answer.replace("\n", "↵") or "(nothing)"


def _number(count: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[count] if count < len(words) else f"{count:,}"
