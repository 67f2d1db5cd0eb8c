"""The miniature's results as a table and a figure."""

import json
from pathlib import Path

from s1engine.training.rows import Json


def format_table(report: Json) -> str:
    """Markdown: one row per run, one column per model."""
    names = list(report["results"])
    lines = ["| asked with | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for index, first in enumerate(report["results"][names[0]]):
        cells = []
        for name in names:
            row = report["results"][name][index]
            low, high = row["interval"]
            cells.append(
                f"{row['accuracy']:.1f} % ({low:.0f} to {high:.0f}), {row['thinking_tokens']:.0f}"
            )
        lines.append(f"| {first['run']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_accuracy(report: Json, path: Path) -> None:
    """Accuracy against mean thinking tokens: a line per model over budgets, waits as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    for name, all_runs in report["results"].items():
        forced = [row for row in all_runs if row["run"].startswith(("budget", "no limit"))]
        line = axes.plot(
            [row["thinking_tokens"] for row in forced], [row["accuracy"] for row in forced],
            marker="o", ms=4, lw=1.5, label=name,
        )  # fmt: skip
        waits = [row for row in all_runs if "wait" in row["run"]]
        axes.plot(
            [row["thinking_tokens"] for row in waits], [row["accuracy"] for row in waits],
            ls="", marker="x", ms=6, color=line[0].get_color(),
        )  # fmt: skip
    axes.set_xlabel("mean thinking tokens")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 103)
    axes.grid(color="#d8dce1", lw=0.6)
    axes.legend(frameon=False, title="fine-tuned on")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=160)
    pyplot.close(canvas)


def write_report(report: Json, folder: Path) -> None:
    """Writes miniature.json, miniature.md and miniature.png."""
    (folder / "miniature.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "miniature.md").write_text(format_table(report))
    plot_accuracy(report, folder / "miniature.png")
