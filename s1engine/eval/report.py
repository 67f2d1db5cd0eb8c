"""report.html: a sweep on one page that needs no network, with its figures as PNG files beside it.

Writes the sections; ``charts`` draws and lays out. Escapes all text of questions and models.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from s1engine.charts.figure import Figure
from s1engine.charts.html_page import figure_card, number_cell, render_page, table_card
from s1engine.charts.png import save_png
from s1engine.charts.svg import COLORS
from s1engine.eval.backend import Segment
from s1engine.eval.figures import run_label, series_name, sweep_figures
from s1engine.eval.methods import ONE_TRACE

Run = dict[str, Any]
Row = dict[str, Any]
Column = tuple[str, str, str | None]  # key of a run, heading, format (None: three digits)

OPTIONAL: tuple[Column, ...] = (
    ("coverage", "any sample right", "{:.1f} %"),
    ("accepted", "accepted", "{:.1f} %"),
    ("tries", "tries", "{:.2f}"),
    ("joules_per_question", "joules", None),
    ("dollars_per_question", "dollars", None),
)
"""Columns that the table has only if a run has the figure."""
MAX_CHARS = 60_000  # of one trace; a longer one loses its middle


def write_report(
    folder: Path, summary: dict[str, Any], rows: Sequence[Row], identity: dict[str, Any]
) -> None:
    """Writes report.html and a PNG for each of its figures into ``folder``. ``identity`` names
    task, model, number of questions and seed."""
    figures = sweep_figures(summary["runs"])
    for figure in figures:
        save_png(figure, folder / f"{figure.name}.png")
    title = f"{identity['task']}, {_model_name(identity)}"
    text = render_page(title, _body(summary, rows, identity, figures))
    (folder / "report.html").write_text(text, encoding="utf-8")


def _model_name(identity: dict[str, Any]) -> str:
    return Path(str(identity["model"])).name


def _body(
    summary: dict[str, Any],
    rows: Sequence[Row],
    identity: dict[str, Any],
    figures: Sequence[Figure],
) -> Iterator[str]:
    yield from _head(summary["runs"], identity)
    sizes = {"accuracy": (920, 420), "control": (450, 400)}
    cards = {f.name: figure_card(f, *sizes.get(f.name, (450, 330))) for f in figures}
    yield f"<section>{cards.get('accuracy', '')}</section>"
    yield f'<section class="pair">{cards.get("seconds", "")}{cards.get("throughput", "")}</section>'
    methods = _methods_table(summary["methods"])
    yield f'<section class="pair">{cards.get("control", "")}{methods}</section>'
    yield f"<section>{_runs_table(summary['runs'])}</section>"
    yield _traces(rows)
    yield _foot(identity)


# --- the head: what was measured, and its best figures ---


def _head(runs: Sequence[Run], identity: dict[str, Any]) -> Iterator[str]:
    questions = identity["questions"]
    yield '<p class="eyebrow">Test-time scaling</p>'
    yield f"<h1>{escape(_model_name(identity))} on {escape(identity['task'])}</h1>"
    yield (
        f'<p class="lede">{len(runs)} run{"s" * (len(runs) != 1)} over {questions:,} '
        f"question{'s' * (questions != 1)}: what thinking costs, and what it buys.</p>"
    )
    if runs:
        yield f'<dl class="stats">{"".join(_stats(runs))}</dl>'


def _stats(runs: Sequence[Run]) -> Iterator[str]:
    best = max(runs, key=lambda run: (run["accuracy"], -run["thinking_tokens"]))
    low, high = best["interval"]
    yield _stat(
        "best accuracy",
        f"{best['accuracy']:.1f} <small>%</small>",
        f"{low:.1f} to {high:.1f}; {best['settings']['method']}, {run_label(best['settings'])}",
    )
    yield _stat(
        "its thinking", f"{best['thinking_tokens']:,.0f} <small>tokens</small>", "mean a question"
    )
    fastest = max(runs, key=lambda run: run["output_tokens_per_s"])
    yield _stat(
        "highest throughput",
        f"{fastest['output_tokens_per_s']:,.0f} <small>tokens/s</small>",
        f"{fastest['settings']['method']}, {run_label(fastest['settings'])}",
    )
    failed = sum(run["failed"] for run in runs)
    note = f"{failed} failed" if failed else "all runs"
    yield _stat("time of the sweep", _duration(sweep_seconds(runs)), note)


def sweep_seconds(runs: Sequence[Run]) -> float:
    """Wall time of all runs. Runs that come from one trace share its time."""
    passes: dict[tuple[object, ...], float] = {}
    for i, run in enumerate(runs):
        settings = run["settings"]
        shared = settings["method"] == ONE_TRACE
        key = (settings["num_waits"],) if shared else ("alone", i)
        passes[key] = max(passes.get(key, 0.0), run["wall_s"])
    return sum(passes.values())


def _stat(name: str, value: str, note: str) -> str:
    """``value`` is HTML; the others are text."""
    return f"<div><dt>{name}</dt><dd>{value}</dd><p>{escape(note)}</p></div>"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} <small>s</small>"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} <small>h</small> {minutes:02} <small>min</small>"
    return f"{minutes} <small>min</small> {rest:02} <small>s</small>"


def _foot(identity: dict[str, Any]) -> str:
    facts = {
        "model": identity["model"],
        "server": identity["base_url"],
        "seed": identity["seed"],
        "questions": f"{identity['questions']}, SHA-256 {identity['questions_sha256'][:16]}",
    }
    words = "; ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    return f"<footer>{escape(words)}. All rows are in results.jsonl.</footer>"


# --- tables: the methods, and every run ---


def _methods_table(methods: dict[str, dict[str, float | None]]) -> str:
    """Control, Scaling and Performance of each method."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{number_cell(m['control'], '{:.0f} %')}"
        f"{number_cell(m['scaling'], '{:+.1f}')}{number_cell(m['performance'], '{:.1f} %')}</tr>"
        for name, m in methods.items()
    )
    return table_card(
        "methods",
        "How well each method scales",
        "Control: share of runs within their limits. Scaling: accuracy gained per doubling of "
        "thinking, mean over all pairs of runs. Performance: the best accuracy.",
        ("method", "control", "scaling", "performance"),
        rows,
    )


def _runs_table(runs: Sequence[Run]) -> str:
    """A row for each run, in the order asked."""
    optional = [column for column in OPTIONAL if any(column[0] in run for run in runs)]
    names = list(dict.fromkeys(series_name(run["settings"]) for run in runs))
    best = max((run["accuracy"] for run in runs), default=0)
    headings = ["run", "accuracy, 95 % interval", "against first", "asked", "thinking", "answer"]
    headings += ["tokens/s", "seconds", *(heading for _, heading, _ in optional)]
    if any(run["failed"] for run in runs):
        headings.append("failed")
    note = "Tokens, seconds and costs are means a question. Differences to the first run are "
    note += "paired over the questions."
    rows = "".join(_run_row(run, names, best, optional, "failed" in headings) for run in runs)
    return table_card("runs", "Every run", note, headings, rows)


def _run_row(
    run: Run, names: list[str], best: float, optional: Sequence[Column], failed: bool
) -> str:
    settings = run["settings"]
    color = f"s{names.index(series_name(settings)) % COLORS}"
    cells = [
        f'<td class="{color}"><i class="key"></i>{escape(settings["method"])} '
        f"<small>{escape(run_label(settings))}</small></td>",
        _accuracy_cell(run, color, run["accuracy"] == best),
        _difference_cell(run),
        number_cell(run["limit"], "{:,.0f}"),
        number_cell(run["thinking_tokens"], "{:,.1f}"),
        number_cell(run["answer_tokens"], "{:,.1f}"),
        number_cell(run["output_tokens_per_s"], "{:,.0f}"),
        number_cell(run["seconds_per_question"]),
        *(number_cell(run.get(key), layout) for key, _, layout in optional),
    ]
    if failed:
        count = run["failed"]
        cells.append(f'<td class="bad">{count}</td>' if count else "<td>0</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _accuracy_cell(run: Run, color: str, best: bool) -> str:
    """The number, its interval, and both on a strip from 0 to 100."""
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


def _difference_cell(run: Run) -> str:
    difference = run.get("difference_to_first")
    if difference is None:
        return "<td><small>first</small></td>"
    low, high = difference["interval"]
    return f"<td>{difference['accuracy']:+.1f} <small>{low:+.1f} to {high:+.1f}</small></td>"


# --- traces: what the model wrote, injected text highlighted ---


def _traces(rows: Sequence[Row]) -> str:
    """The questions with a kept trace, each with its runs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "trace" in row:
            groups.setdefault(row["id"], []).append(row)
    if not groups:
        return ""
    questions = "".join(_question(group) for group in groups.values())
    return (
        '<section id="traces"><h2>Single questions</h2><p class="note">The model\'s output in each '
        "run. <mark>Highlighted</mark>: injected by the engine, not sampled: waits, the end of "
        f"thinking, the opening of a forced answer.</p>{questions}</section>"
    )


def _question(rows: Sequence[Row]) -> str:
    first = rows[0]
    runs = "".join(_trace(row, opened=row is first) for row in rows)
    return (
        f'<div class="card question"><p>{escape(first["question"])}</p>'
        f"<p><code>{escape(first['id'])}</code> &nbsp; expected answer "
        f"<b>{escape(first['answer'])}</b></p>{runs}</div>"
    )


def _trace(row: Row, *, opened: bool) -> str:
    verdict = "right" if row["correct"] else "wrong"
    facts = [f"{row['thinking_tokens']:,} thinking tokens", f"answered {row['extracted']!s:.60}"]
    if row["waits_used"]:
        facts.append(f"{row['waits_used']} waits used")
    if row["end_reason"]:
        facts.append(f"ended: {row['end_reason']}")
    spans = "".join(f'<span class="fact">{escape(fact)}</span>' for fact in facts)
    settings = row["settings"]
    name = escape(f"{settings['method']}, {run_label(settings)}")
    segments = shortened([(text, bool(forced)) for text, forced in row["trace"]])
    text = "".join(
        f"<mark>{escape(text)}</mark>" if forced else escape(text) for text, forced in segments
    )
    return (
        f'<details{" open" * opened}><summary><span class="what">{name}</span>'
        f'<span class="verdict {verdict}">{verdict}</span>{spans}</summary>'
        f"<pre>{text}</pre></details>"
    )


def shortened(segments: Sequence[Segment], limit: int = MAX_CHARS) -> list[Segment]:
    """The segments, with at most ``limit`` of their characters: their beginning and their end."""
    total = sum(len(text) for text, _ in segments)
    if total <= limit:
        return list(segments)
    head = limit // 2
    tail = total - (limit - head)
    kept: list[Segment] = []
    at = 0
    for text, forced in segments:
        before = text[: max(head - at, 0)]
        after = text[max(tail - at, 0) :]
        if before:
            kept.append((before, forced))
        if at < tail <= at + len(text):
            kept.append((f"\n[… {total - limit:,} characters …]\n", False))
        if after:
            kept.append((after, forced))
        at += len(text)
    return kept
