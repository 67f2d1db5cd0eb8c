"""Rows of ``bench cpu`` from many calls, as a file, a table and a figure."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s1engine.bench.cpu_cases import CASES, headline
from s1engine.bench.result import write_result

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
random weights. Prompts are random, decoding is greedy with a fixed length, prefix caches are off,
activations and KV caches have 16 bits. The engines of one call take turns while the others are
stopped; figures are medians of rounds. 16 and 64 requests have prompts of 64 to 512 tokens and
generate 128 each; their time includes prefill. "(x 1.50)": s1engine is 1.50 times as fast in the
same call. Memory is the peak over all cases, mapped weights included. The start ends with the first
token, in the case with one request. A memory read test (a sum over 1 GiB on huge pages) runs before
and after each turn, because a shared machine's bandwidth varies; it reached {read} GB/s. A share
relates to the two tests around its turn; the median of turns is shown.
"""


def merge_rows(path: Path, added: Sequence[Row], about: dict[str, Any]) -> None:
    """Add rows to file ``path``, in place of those of the same section and engine, and write a
    table (.md) and a figure (.png) beside it. ``about``: where they were measured, with
    ``threads``."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = [{**row, "commit": about["commit"]} for row in added]
    replaced = {_key(row) for row in new}
    rows = sorted([*(row for row in old if _key(row) not in replaced), *new], key=_order)
    write_result(path, {"bench": "cpu", "rows": rows, "where": about})
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
    rates = [row["read_test_gb_per_s"] for row in rows]
    return f"{min(rates):.1f} to {max(rates):.1f}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each shape and precision, one row for each engine and one column for each
    case."""
    return "\n".join(line for title, own in _groups(rows) for line in _lines(title, own))


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    groups = dict.fromkeys((row["shape"], row["precision"]) for row in rows)
    for shape, precision in groups:
        own = [row for row in rows if (row["shape"], row["precision"]) == (shape, precision)]
        yield f"{shape} shape, {precision}", own


def _lines(title: str, rows: list[Row]) -> Iterator[str]:
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    heads = [TITLES[case] for case in cases]
    yield f"## {title}\n"
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
    """Write a PNG: bars of each case, relative to its fastest engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(_groups(rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, grid = pyplot.subplots(len(groups), 1, figsize=(8, 2.4 * len(groups)), squeeze=False)
    for axes, (title, own) in zip(grid[:, 0], groups, strict=True):
        cases = [case for case in CASES if any(row["case"] == case for row in own)]
        best = {case: max(headline(r) or 0.0 for r in own if r["case"] == case) for case in cases}
        for i, engine in enumerate(engines):
            mine = {row["case"]: headline(row) or 0.0 for row in own if row["engine"] == engine}
            shares = [mine.get(case, 0.0) / (best[case] or 1.0) for case in cases]
            positions = [x + 0.8 * (i / len(engines) - 0.5) for x in range(len(cases))]
            bars = axes.bar(positions, shares, 0.8 / len(engines), align="edge", label=engine)
            texts = [f"{mine[case]:,.0f}" if case in mine else "" for case in cases]
            axes.bar_label(bars, texts, fontsize=6)
        axes.set(title=title, xticks=range(len(cases)), ylim=(0, 1.15), yticks=[])
        axes.set_xticklabels([TITLES[case].split(" (")[0] for case in cases], fontsize=7)
    grid[0, 0].legend(fontsize=7, ncols=len(engines), loc="upper center")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
