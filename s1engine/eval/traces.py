"""The report's traces: what a model wrote for single questions, injected text highlighted."""

from collections.abc import Sequence
from html import escape
from typing import Any

from s1engine.eval.figures import run_label

Row = dict[str, Any]
MAX_CHARS = 60_000  # of one trace; a middle part is left out of longer ones
Segment = tuple[str, bool]


def section(rows: Sequence[Row]) -> str:
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
