"""The summary of a sweep: figures of each run, and of each method over its runs.

Pure: rows in, the content of summary.json out. A failed question counts as wrong and in ``failed``.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from s1engine.eval.method_registry import BASELINES
from s1engine.eval.methods import RunSettings
from s1engine.eval.metrics import Point, bootstrap_interval, method_metrics, paired_interval

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Power and prices, if given."""

    watts: float | None = None
    """Power during a run."""
    dollars_per_hour: float | None = None
    dollars_per_million_tokens: float | None = None
    """Price of generated tokens."""


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows of one run, in the order of the questions."""

    settings: RunSettings
    rows: list[Row]

    @property
    def wall_s(self) -> float:
        """Seconds of the run, over all starts of the sweep."""
        last: dict[int, float] = {}
        for row in self.rows:
            last[row["session"]] = max(last.get(row["session"], 0.0), row["finished_s"])
        return sum(last.values())

    @property
    def correct(self) -> list[bool]:
        return [row["correct"] for row in self.rows]

    @property
    def accuracy(self) -> Fraction:
        """Exact, in percent."""
        return Fraction(100 * sum(self.correct), len(self.rows))

    @property
    def thinking_tokens(self) -> float:
        """Mean over the questions."""
        return float(statistics.mean(row["thinking_tokens"] for row in self.rows))


def summarize(runs: Sequence[RunRows], *, seed: int, prices: Prices) -> dict[str, Any]:
    """The content of summary.json: runs in the order given, and the methods among them."""
    runs = [run for run in runs if run.rows]
    entries = [_run_figures(run, runs[0], seed, prices) | _limits(run, runs) for run in runs]
    names = dict.fromkeys(run.settings.method for run in runs)
    return {"runs": entries, "methods": {name: _method_metrics(name, runs) for name in names}}


def _run_figures(run: RunRows, first: RunRows, seed: int, prices: Prices) -> dict[str, Any]:
    rows, wall_s = run.rows, run.wall_s
    generated = sum(row["generated_tokens"] for row in rows)
    return {
        "settings": run.settings.to_json(),
        "questions": len(rows),
        "failed": sum("error" in row for row in rows),
        "accuracy": float(run.accuracy),
        "interval": bootstrap_interval(run.correct, seed),
        "thinking_tokens": run.thinking_tokens,
        "answer_tokens": statistics.mean(row["answer_tokens"] for row in rows),
        "output_tokens_per_s": generated / wall_s if wall_s else 0.0,
        "wall_s": wall_s,
        "seconds_per_question": wall_s / len(rows),
        "latency_s": statistics.mean(row["seconds"] for row in rows),
        **_difference_to_first(run, first, seed),
        **_cost(run, generated, prices),
        **_optional_figures(rows),
    }


def _difference_to_first(run: RunRows, first: RunRows, seed: int) -> dict[str, Any]:
    """The difference to the first run, over the questions of both."""
    if run is first:
        return {}
    by_id = {row["id"]: row["correct"] for row in first.rows}
    pairs = [(by_id[row["id"]], row["correct"]) for row in run.rows if row["id"] in by_id]
    if not pairs:
        return {}
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    value = 100 * (sum(after) - sum(before)) / len(pairs)
    interval = paired_interval(before, after, seed)
    return {"difference_to_first": {"accuracy": value, "interval": interval}}


def _cost(run: RunRows, generated: int, prices: Prices) -> dict[str, float]:
    n, wall_s = len(run.rows), run.wall_s
    costs: dict[str, float] = {}
    if prices.watts is not None:
        costs["joules_per_question"] = prices.watts * wall_s / n
    dollars = []
    if prices.dollars_per_hour is not None:
        dollars.append(prices.dollars_per_hour * wall_s / 3600)
    if prices.dollars_per_million_tokens is not None:
        dollars.append(prices.dollars_per_million_tokens * generated / 1e6)
    if dollars:
        costs["dollars_per_question"] = sum(dollars) / n
    return costs


def _optional_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Figures of some methods only: coverage of the samples, tries, acceptance."""
    figures: dict[str, float] = {}
    if any("covered" in row for row in rows):
        figures["coverage"] = 100 * sum(row.get("covered", False) for row in rows) / len(rows)
    if any("tries" in row for row in rows):
        figures["tries"] = statistics.mean(row.get("tries", 1) for row in rows)
        figures["accepted"] = 100 * sum(row.get("accepted", False) for row in rows) / len(rows)
    if any(row.get("thinking_estimated") for row in rows):
        figures["thinking_estimated"] = True
    return figures


def _limits(run: RunRows, runs: Sequence[RunRows]) -> dict[str, float | None]:
    point = _point(run, runs)
    return {"limit": point.limit, "limit_min": point.limit_min}


def _point(run: RunRows, runs: Sequence[RunRows]) -> Point:
    """The run as a point for the metrics. The limit of a class is the run without a class."""
    settings = run.settings
    limit: float | None = settings.limit
    limit_min = None
    if settings.length is not None:
        free = RunSettings(settings.method, settings.budget)
        baseline = next((r.thinking_tokens for r in runs if r.settings == free), None)
        if settings.length == "short":
            limit = baseline if limit is None else limit
        else:
            limit_min = baseline
    return Point(run.thinking_tokens, run.accuracy, limit, limit_min)


def _method_metrics(name: str, runs: Sequence[RunRows]) -> dict[str, float | None]:
    own = [run for run in runs if run.settings.method == name and not is_baseline(run.settings)]
    return method_metrics([_point(run, runs) for run in own])


def is_baseline(settings: RunSettings) -> bool:
    """Whether the run is the baseline of its method's other runs."""
    return settings.method in BASELINES and settings.length is None
