"""The miniature's findings as a table and a figure."""

import json
from pathlib import Path

from s1engine.training import rows


def table(found: rows.Json) -> str:
    """Markdown: a row for each way of asking, a column for each model."""
    names = list(found["results"])
    lines = ["| asked with | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for index, first in enumerate(found["results"][names[0]]):
        cells = []
        for name in names:
            row = found["results"][name][index]
            low, high = row["interval"]
            cells.append(
                f"{row['accuracy']:.1f} % ({low:.0f} to {high:.0f}), {row['thinking_tokens']:.0f}"
            )
        lines.append(f"| {first['run']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(found: rows.Json, path: Path) -> None:
    """Accuracy against mean thinking tokens, a line a model over the budgets, waits as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    for name, all_runs in found["results"].items():
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


def write(found: rows.Json, folder: Path) -> None:
    """Writes miniature.json, miniature.md and miniature.png."""
    (folder / "miniature.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "miniature.md").write_text(table(found))
    draw(found, folder / "miniature.png")
