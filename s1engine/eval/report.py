"""report.html: a sweep on one page that needs no network, and its figures as PNG files beside it.

Puts the page together; ``svg`` draws, ``tables`` and ``traces`` write their sections. Everything
that came from questions or models is escaped.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from s1engine.charts import png
from s1engine.charts.figure import Figure
from s1engine.charts.html_page import card, page
from s1engine.eval import tables
from s1engine.eval.figures import figures, run_label
from s1engine.eval.methods import ONE_TRACE

Run = dict[str, Any]
Row = dict[str, Any]


def write_report(
    folder: Path, summary: dict[str, Any], rows: Sequence[Row], identity: dict[str, Any]
) -> None:
    """Writes report.html and a PNG for each of its figures into ``folder``. ``identity`` says what
    was measured: task, model, number of questions, seed."""
    drawn = figures(summary["runs"])
    for figure in drawn:
        png.save(figure, folder / f"{figure.name}.png")
    text = page(f"{identity['task']}, {_model(identity)}", _body(summary, rows, identity, drawn))
    (folder / "report.html").write_text(text, encoding="utf-8")


def _model(identity: dict[str, Any]) -> str:
    return Path(str(identity["model"])).name


def _body(
    summary: dict[str, Any],
    rows: Sequence[Row],
    identity: dict[str, Any],
    drawn: Sequence[Figure],
) -> Iterator[str]:
    yield from _head(summary["runs"], identity)
    by_name = {figure.name: figure for figure in drawn}
    yield (
        f"<section>{card(by_name['accuracy'], 920, 420)}</section>" if "accuracy" in by_name else ""
    )
    yield '<section class="pair">'
    for name in ("seconds", "throughput"):
        if name in by_name:
            yield card(by_name[name], 450, 330)
    yield "</section>"
    yield '<section class="pair">'
    if "control" in by_name:
        yield card(by_name["control"], 450, 400)
    yield tables.methods(summary["methods"])
    yield "</section>"
    yield tables.runs(summary["runs"])
    yield _traces_section(rows)
    yield from _foot(identity)


def _head(runs: Sequence[Run], identity: dict[str, Any]) -> Iterator[str]:
    questions = identity["questions"]
    yield '<p class="eyebrow">Test-time scaling</p>'
    yield f"<h1>{escape(_model(identity))} on {escape(identity['task'])}</h1>"
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
    total = _sweep_seconds(runs)
    failed = sum(run["failed"] for run in runs)
    yield _stat("time of the sweep", _duration(total), f"{failed} failed" if failed else "all runs")


def _sweep_seconds(runs: Sequence[dict[str, Any]]) -> float:
    """Wall time of all runs; those that come from one trace took it together."""
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


def _foot(identity: dict[str, Any]) -> Iterator[str]:
    said = {
        "model": identity["model"],
        "server": identity["base_url"],
        "seed": identity["seed"],
        "questions": f"{identity['questions']}, SHA-256 {identity['questions_sha256'][:16]}",
    }
    words = "; ".join(f"{key} {value}" for key, value in said.items() if value is not None)
    yield f"<footer>{escape(words)}. Every row stands in results.jsonl.</footer>"


MAX_CHARS = 60_000  # of one trace; a middle part is left out of longer ones
Segment = tuple[str, bool]


def _traces_section(rows: Sequence[Row]) -> str:
    """The questions whose text was kept, each with the runs over it."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "trace" in row:
            groups.setdefault(row["id"], []).append(row)
    if not groups:
        return ""
    questions = "".join(_question(group) for group in groups.values())
    return (
        '<section id="traces"><h2>Single questions</h2><p class="note">What the model wrote, run '
        "by run. <mark>Highlighted</mark>: injected by the engine, not sampled: waits, the end of "
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
    told = "".join(f'<span class="fact">{escape(fact)}</span>' for fact in facts)
    settings = row["settings"]
    what = escape(f"{settings['method']}, {run_label(settings)}")
    return (
        f'<details{" open" * opened}><summary><span class="what">{what}</span>'
        f'<span class="verdict {verdict}">{verdict}</span>{told}</summary>'
        f"<pre>{_marked(shortened([(text, bool(forced)) for text, forced in row['trace']]))}</pre>"
        "</details>"
    )


def _marked(segments: Sequence[Segment]) -> str:
    return "".join(
        f"<mark>{escape(text)}</mark>" if forced else escape(text) for text, forced in segments
    )


def shortened(segments: Sequence[Segment], limit: int = MAX_CHARS) -> list[Segment]:
    """The segments with at most ``limit`` characters of them: beginning and end are kept."""
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
