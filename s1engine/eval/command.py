"""``s1engine eval``: one task, one method, a sweep of budgets and waits, results in a folder."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from s1engine.errors import RequestError

TASKS = ("arithmetic",)
METHODS = ("budget-forcing",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine eval``."""
    parser.add_argument("model", nargs="?", help="directory or hub id; default: bundled s1-nano")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--method", default="budget-forcing", choices=METHODS)
    parser.add_argument(
        "--budgets",
        default="none",
        help="thinking tokens, comma-separated; 'none' is unbounded (default: none)",
    )
    parser.add_argument("--num-waits", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--limit", type=int, default=200, help="questions (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of questions and intervals")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")


def run(args: argparse.Namespace) -> int:
    """Runs the sweep, budgets within waits; prints a table, writes results.jsonl, summary.json and
    accuracy.png."""
    budgets = [_budget(text) for text in args.budgets.split(",")]
    waits = [_count("num_waits", text) for text in args.num_waits.split(",")]
    if args.limit < 1:
        raise RequestError("limit must be at least 1", param="limit")
    from s1engine.engine.llm import LLM
    from s1engine.eval.arithmetic import generate
    from s1engine.eval.runs import RunSettings, run_budget_forcing

    llm = LLM(args.model, progress=True)
    questions = generate(args.seed, args.limit)
    args.out.mkdir(parents=True, exist_ok=True)
    summaries = []
    with (args.out / "results.jsonl").open("w") as results:
        for num_waits, budget in itertools.product(waits, budgets):
            settings = RunSettings(args.method, budget, num_waits)
            finished = run_budget_forcing(llm, questions, settings, progress=True)
            results.writelines(json.dumps(row.to_json()) + "\n" for row in finished.rows)
            summaries.append(finished.summary(args.seed))
            print(_line(summaries[-1]), flush=True)
    summary = {"runs": summaries}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(summaries, args.out / "accuracy.png")
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _budget(text: str) -> int | None:
    return None if text.strip() == "none" else _count("budgets", text)


def _count(param: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise RequestError(f"{param}: {text!r} is no count of tokens or waits", param=param)
    return int(text)


def _line(summary: dict[str, Any]) -> str:
    settings = summary["settings"]
    budget = "none" if settings["budget"] is None else settings["budget"]
    low, high = summary["interval"]
    return (
        f"budget {budget:>5}  waits {settings['num_waits']}  "
        f"accuracy {summary['accuracy']:5.1f} % ({low:.1f} to {high:.1f})  "
        f"thinking {summary['thinking_tokens']:6.1f} tokens  "
        f"{summary['output_tokens_per_s']:,.0f} tokens/s"
    )


def draw(summaries: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against mean thinking tokens, a line for each number of waits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for num_waits in sorted({s["settings"]["num_waits"] for s in summaries}):
        runs = [s for s in summaries if s["settings"]["num_waits"] == num_waits]
        runs.sort(key=lambda s: s["thinking_tokens"])
        x = [run["thinking_tokens"] for run in runs]
        y = [run["accuracy"] for run in runs]
        errors = [[abs(run["accuracy"] - run["interval"][i]) for run in runs] for i in (0, 1)]
        axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=f"{num_waits} waits")
    axes.set_xlabel("mean thinking tokens")
    axes.set_ylabel("accuracy, % (95 % interval)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
