"""The report's tables: the methods' three figures, and every run."""

from collections.abc import Sequence
from html import escape
from typing import Any

from s1engine.charts.svg import COLORS
from s1engine.eval.figures import run_label, series_name

Run = dict[str, Any]
OPTIONAL = (
    ("coverage", "any sample right", "{:.1f} %"),
    ("accepted", "accepted", "{:.1f} %"),
    ("tries", "tries", "{:.2f}"),
    ("joules_per_question", "joules", None),
    ("dollars_per_question", "dollars", None),
)
"""Columns that stand only where a run has the figure: key, heading, format (None: three digits)."""


def methods(found: dict[str, dict[str, float | None]]) -> str:
    """Control, Scaling and Performance of each method."""
    body = "".join(
        f"<tr><td>{escape(name)}</td>{_number(m['control'], '{:.0f} %')}"
        f"{_number(m['scaling'], '{:+.1f}')}{_number(m['performance'], '{:.1f} %')}</tr>"
        for name, m in found.items()
    )
    return (
        '<div class="card"><h2>How well each method scales</h2><p class="note">Control: runs that '
        "kept to what they were asked. Scaling: accuracy gained per doubling of thinking, mean "
        "over all pairs of runs. Performance: the best accuracy.</p>"
        '<div class="scroll"><table id="methods"><thead><tr><th>method</th><th>control</th>'
        f"<th>scaling</th><th>performance</th></tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def runs(found: Sequence[Run]) -> str:
    """A row a run, in the order asked."""
    extra = [column for column in OPTIONAL if any(column[0] in run for run in found)]
    names = list(dict.fromkeys(series_name(run["settings"]) for run in found))
    best = max((run["accuracy"] for run in found), default=0)
    headings = ["run", "accuracy, 95 % interval", "against first", "asked", "thinking", "answer"]
    headings += ["tokens/s", "seconds", *(heading for _, heading, _ in extra)]
    if any(run["failed"] for run in found):
        headings.append("failed")
    body = "".join(_run(run, names, best, extra, "failed" in headings) for run in found)
    return (
        '<section><div class="card"><h2>Every run</h2><p class="note">Tokens, seconds and '
        "costs are means a question. Differences to the first run are paired over the "
        "questions.</p>"
        '<div class="scroll"><table id="runs"><thead><tr>'
        f"{''.join(f'<th>{escape(h)}</th>' for h in headings)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></div></section>"
    )


def _run(
    run: Run,
    names: list[str],
    best: float,
    extra: Sequence[tuple[str, str, str | None]],
    failed: bool,
) -> str:
    settings = run["settings"]
    color = f"s{names.index(series_name(settings)) % COLORS}"
    cells = [
        f'<td class="{color}"><i class="key"></i>{escape(settings["method"])} '
        f"<small>{escape(run_label(settings))}</small></td>",
        _accuracy(run, color, run["accuracy"] == best),
        _difference(run),
        _number(run["limit"], "{:,.0f}"),
        _number(run["thinking_tokens"], "{:,.1f}"),
        _number(run["answer_tokens"], "{:,.1f}"),
        _number(run["output_tokens_per_s"], "{:,.0f}"),
        _number(run["seconds_per_question"]),
        *(_number(run.get(key), layout) for key, _, layout in extra),
    ]
    if failed:
        count = run["failed"]
        cells.append(f'<td class="bad">{count}</td>' if count else "<td>0</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _accuracy(run: Run, color: str, best: bool) -> str:
    """The number, its interval in words, and both on a strip from 0 to 100."""
    low, high = run["interval"]
    strip = (
        f'<span class="span {color}"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<b style="left:{run["accuracy"]:.1f}%"></b></span>'
    )
    kind = ' class="best"' if best else ""
    return (
        f"<td><span{kind}>{run['accuracy']:.1f} %</span> <small>{low:.1f} to {high:.1f}</small>"
        f"{strip}</td>"
    )


def _difference(run: Run) -> str:
    found = run.get("difference_to_first")
    if found is None:
        return "<td><small>first</small></td>"
    low, high = found["interval"]
    return f"<td>{found['accuracy']:+.1f} <small>{low:+.1f} to {high:+.1f}</small></td>"


def _number(value: float | None, layout: str | None = None) -> str:
    """A cell; without a layout three digits, more only before the point: 0.0115, 2.02, 1,410."""
    if value is None:
        return "<td><small>none</small></td>"
    chosen = layout or ("{:,.0f}" if value >= 100 else "{:.3g}")
    return f"<td>{chosen.format(value)}</td>"
