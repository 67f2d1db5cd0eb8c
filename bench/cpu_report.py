"""Rows of ``bench cpu``, gathered over many calls and made readable: a file, a table, a figure."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s1engine.bench.cpu_cases import CASES, headline

Row = dict[str, Any]
KEY = ("shape", "precision", "case", "engine")
TITLES = {
    "1": "decode tokens/s of one request (GB/s, share of read)",
    "16": "tokens/s out, 16 requests",
    "64": "tokens/s out, 64 requests",
    "prefill": "prefill tokens/s, 2,048 tokens",
}
NOTE = """
`s1engine bench cpu --into FILE`: every engine is a process with {threads} threads, on the same
random weights; prompts are random, decoding is greedy and of a fixed length, caches of prefixes are
off, activations and KV caches have 16 bits. Engines of one call take turns, the others stopped;
figures are medians of rounds. 16 and 64 requests have prompts of 64 to 512 tokens and say 128
each, prefill included in their time. "(x 1.50)": s1engine does 1.50 times as much in the same call.
Memory is the largest of all cases, mapped weights included; the start ends with a first token and
is that of the case with one request. A read test
of memory, a sum over 1 GiB on huge pages, runs right before and after every turn of every engine,
for what the machine gives changes with its other guests; it reached {read} GB/s. Shares are of the
two around a turn, and the median of turns.
"""


def gather(path: Path, found: Sequence[Row], about: dict[str, Any]) -> None:
    """Puts rows in place of those of the same section and engine in file ``path``, and writes table
    (.md) and figure (.png) beside it. ``about``: where they were measured, with ``threads``."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = [{**row, "commit": about["commit"]} for row in found]
    replaced = {_key(row) for row in new}
    rows = sorted([*(row for row in old if _key(row) not in replaced), *new], key=_order)
    kept = {"bench": "cpu", "rows": rows, "where": about}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    path.with_suffix(".md").write_text(_page(rows, about))
    draw(rows, path.with_suffix(".png"))


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in KEY)


def _order(row: Row) -> tuple[Any, ...]:
    return (row["shape"], row["precision"], list(CASES).index(row["case"]), row["engine"])


def _page(rows: Sequence[Row], about: dict[str, Any]) -> str:
    note = NOTE.format(threads=about["threads"], read=_span(rows))
    versions = sorted({f"{row['engine']} {row['version']}" for row in rows})
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    foot = f"{about['cpu']}, {about['cores']} cores; {', '.join(versions)}; commit {commits}."
    return f"# On a CPU, beside others\n{note}\n{table(rows)}\n{foot}\n"


def _span(rows: Sequence[Row]) -> str:
    found = [row["read_test_gb_per_s"] for row in rows]
    return f"{min(found):.1f} to {max(found):.1f}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each shape and precision, engines down and cases across."""
    return "\n".join(line for place, own in _groups(rows) for line in _lines(place, own))


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    places = dict.fromkeys((row["shape"], row["precision"]) for row in rows)
    for shape, precision in places:
        own = [row for row in rows if (row["shape"], row["precision"]) == (shape, precision)]
        yield f"{shape} shape, {precision}", own


def _lines(place: str, rows: list[Row]) -> Iterator[str]:
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    heads = [TITLES[case] for case in cases]
    yield f"## {place}\n"
    yield "| engine | " + " | ".join([*heads, "peak MiB", "start, s"]) + " |"
    yield "|---" * (len(heads) + 3) + "|"
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = {row["case"]: row for row in rows if row["engine"] == engine}
        cells = [_cell(own.get(case)) for case in cases]
        cells.append(f"{max(row['peak_mib'] for row in own.values()):,}")
        cells.append(f"{own[min(own, key=cases.index)]['start_s']:.1f}")
        yield f"| {engine} | " + " | ".join(cells) + " |"
    yield ""


def _cell(row: Row | None) -> str:
    rate = headline(row) if row else None
    if row is None or rate is None:
        return "-"
    text = f"{rate:,.0f}" if rate >= 100 else f"{rate:,.1f}"
    if "read_gb_per_s" in row:
        text += f" ({row['read_gb_per_s']:.1f}, {row['share_of_read']:.0%})"
    is_other = row["engine"] != "s1engine" and row["ours_to_it"] is not None
    return text + (f" (x {row['ours_to_it']:.2f})" if is_other else "")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG: bars of each case, as shares of the fastest engine in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(_groups(rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, grid = pyplot.subplots(len(groups), 1, figsize=(8, 2.4 * len(groups)), squeeze=False)
    for axes, (place, own) in zip(grid[:, 0], groups, strict=True):
        cases = [case for case in CASES if any(row["case"] == case for row in own)]
        best = {case: max(headline(r) or 0.0 for r in own if r["case"] == case) for case in cases}
        for i, engine in enumerate(engines):
            mine = {row["case"]: headline(row) or 0.0 for row in own if row["engine"] == engine}
            shares = [mine.get(case, 0.0) / (best[case] or 1.0) for case in cases]
            places = [x + 0.8 * (i / len(engines) - 0.5) for x in range(len(cases))]
            bars = axes.bar(places, shares, 0.8 / len(engines), align="edge", label=engine)
            texts = [f"{mine[case]:,.0f}" if case in mine else "" for case in cases]
            axes.bar_label(bars, texts, fontsize=6)
        axes.set(title=place, xticks=range(len(cases)), ylim=(0, 1.15), yticks=[])
        axes.set_xticklabels([TITLES[case].split(" (")[0] for case in cases], fontsize=7)
    grid[0, 0].legend(fontsize=7, ncols=len(engines), loc="upper center")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
