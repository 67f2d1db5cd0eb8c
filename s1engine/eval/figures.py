"""The figures of a sweep, made of the runs of summary.json. Knows no drawing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from s1engine.charts.figure import Figure, Mark, Series
from s1engine.eval.methods import RunSettings
from s1engine.eval.summary import is_baseline

Run = dict[str, Any]  # an entry of summary.json's runs


def sweep_figures(runs: Sequence[Run]) -> list[Figure]:
    """All figures of a sweep, without empty ones."""
    figures = [_accuracy(runs), _seconds(runs), _throughput(runs), _control(runs)]
    return [figure for figure in figures if figure.series]


def _accuracy(runs: Sequence[Run]) -> Figure:
    return Figure(
        name="accuracy",
        title="Accuracy against thinking",
        note="Mean thinking tokens a question on a doubling scale; bars are 95 % intervals over "
        "the questions.",
        x_label="mean thinking tokens",
        y_label="accuracy, %",
        series=_series(runs, x=lambda run: run["thinking_tokens"]),
    )


def _seconds(runs: Sequence[Run]) -> Figure:
    return Figure(
        name="seconds",
        title="Accuracy against time",
        note="Wall-clock seconds a question, all questions of a run in one batch. Up and left is "
        "better.",
        x_label="seconds a question",
        y_label="accuracy, %",
        series=_series(runs, x=lambda run: run["seconds_per_question"]),
        decimal=True,
        joined=False,
        front=pareto_front(runs, lambda run: -run["seconds_per_question"], "seconds_per_question"),
    )


def _throughput(runs: Sequence[Run]) -> Figure:
    return Figure(
        name="throughput",
        title="Accuracy against throughput",
        note="Output tokens a second over the whole run. Up and right is better.",
        x_label="output tokens/s",
        y_label="accuracy, %",
        series=_series(runs, x=lambda run: run["output_tokens_per_s"]),
        decimal=True,
        joined=False,
        front=pareto_front(runs, lambda run: run["output_tokens_per_s"], "output_tokens_per_s"),
    )


def _control(runs: Sequence[Run]) -> Figure:
    """Runs with an upper limit above 0: a logarithmic axis has no 0."""
    return Figure(
        name="control",
        title="Asked against used",
        note="Below the line a run stayed within its limit; above it, it thought for longer.",
        x_label="thinking tokens asked at most",
        y_label="mean thinking tokens used",
        series=_series(
            runs,
            x=lambda run: run["limit"] or None,
            y=lambda run: run["thinking_tokens"],
            bars=False,
        ),
        percent=False,
        joined=False,
        diagonal=True,
    )


def pareto_front(
    runs: Sequence[Run], worth: Callable[[Run], float], key: str
) -> tuple[tuple[float, float], ...]:
    """(x, accuracy) of the runs that no other run dominates: none is at least as good in both and
    better in one. By ascending x."""
    front = [
        (run[key], run["accuracy"])
        for run in runs
        if not any(
            worth(other) >= worth(run)
            and other["accuracy"] >= run["accuracy"]
            and (worth(other), other["accuracy"]) != (worth(run), run["accuracy"])
            for other in runs
        )
    ]
    return tuple(sorted(set(front)))


def _series(
    runs: Sequence[Run],
    *,
    x: Callable[[Run], float | None],
    y: Callable[[Run], float] = lambda run: run["accuracy"],
    bars: bool = True,
) -> tuple[Series, ...]:
    """Runs by series, without the runs that have no x. Colors follow the order of all runs."""
    groups: dict[str, list[Mark]] = {}
    for run in runs:
        marks = groups.setdefault(series_name(run["settings"]), [])
        value = x(run)
        if value is not None:
            marks.append(_mark(run, value, y(run), bars))
    return tuple(
        Series(name, color, tuple(sorted(marks, key=lambda mark: mark.x)))
        for color, (name, marks) in enumerate(groups.items())
        if marks
    )


def _mark(run: Run, x: float, y: float, bars: bool) -> Mark:
    low, high = run["interval"]
    settings = run["settings"]
    facts = (
        ("accuracy", f"{run['accuracy']:.1f} % ({low:.1f} to {high:.1f})"),
        ("thinking", f"{run['thinking_tokens']:,.1f} tokens"),
        ("answer", f"{run['answer_tokens']:,.1f} tokens"),
        ("speed", f"{run['output_tokens_per_s']:,.0f} tokens/s"),
        ("time", f"{run['seconds_per_question']:.3g} s a question"),
    )
    hollow = is_baseline(RunSettings(settings["method"], length=settings.get("length")))
    mark = Mark(x, y, run_label(settings), facts, hollow=hollow)
    return replace(mark, low=low, high=high) if bars else mark


def series_name(settings: dict[str, Any]) -> str:
    """The method and its waits."""
    waits = settings["num_waits"]
    suffix = f", {waits} wait{'s' * (waits > 1)}" if waits else ""
    return f"{settings['method']}{suffix}"


def run_label(settings: dict[str, Any]) -> str:
    """The settings in which a run differs from the others of its method."""
    words = []
    if settings.get("length"):
        words.append(settings["length"])
    if settings.get("steps"):
        words.append(f"{settings['steps']} steps")
    if settings["budget"] is not None:
        words.append(f"{settings['budget']:,} tokens")
    if settings["num_waits"]:
        words.append(f"{settings['num_waits']} wait{'s' * (settings['num_waits'] > 1)}")
    if settings.get("samples", 1) > 1:
        words.append(f"{settings['samples']} samples")
    if settings.get("max_tries"):
        words.append(f"{settings['max_tries']} tries at most")
    return ", ".join(words) or "unbounded"
