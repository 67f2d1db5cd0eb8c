"""Sweeps on a scripted backend: resuming, failures, rows and summaries."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.eval.backend import EvalRequest, EvalSample
from s1engine.eval.method_registry import SweepOptions, build_methods
from s1engine.eval.methods import Method
from s1engine.eval.results import Results, run_key
from s1engine.eval.summary import Prices, RunRows, summarize
from s1engine.eval.sweep import run_sweep
from tests.eval.scripted import ScriptedBackend, questions, sample

IDENTITY = {"task": "t", "seed": 0}
Script = Callable[[EvalRequest], list[EvalSample]]


def methods(*names: str, **options: object) -> list[Method]:
    return build_methods(names or ["budget-forcing"], SweepOptions(**options))  # type: ignore[arg-type]


def sweep(
    folder: Path, script: Script, asked: list[Method], count: int = 4, traces: int = 1
) -> tuple[list[RunRows], ScriptedBackend]:
    backend = ScriptedBackend(script)
    results = Results.open(folder, IDENTITY, overwrite=False)
    try:
        runs = run_sweep(
            asked, questions(count), backend, results, traces=traces, finished=lambda run: None
        )
    except BaseException:
        results.close()
        raise
    results.close([row for run in runs for row in run.rows])
    return runs, backend


def right(request: EvalRequest) -> list[EvalSample]:
    return [
        sample(f"Answer: {request.prompt[8:-1]}", request.key, 10) for _ in range(request.params.n)
    ]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_rows_are_in_order_for_any_order_of_answers(tmp_path: Path) -> None:
    asked = methods(budgets=(8, None), num_waits=(0, 1))
    runs, backend = sweep(tmp_path, right, asked)
    assert len(backend.asked) == 16
    order = [(run_key(run.settings), f"q{i}") for run in runs for i in range(4)]
    assert [(run_key(row["settings"]), row["id"]) for row in lines(tmp_path)] == order  # type: ignore[arg-type]
    assert all(row["correct"] for row in lines(tmp_path))


class Killed(BaseException):
    """Stands for a signal that kills the process."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.integers(0, 12), st.integers(0, 40))
def test_a_killed_sweep_continues(
    tmp_path_factory: pytest.TempPathFactory, after: int, torn: int
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    asked = methods(budgets=(2, 4, 8))
    calls = 0

    def dying(request: EvalRequest) -> list[EvalSample]:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return right(request)

    if after < 12:
        with pytest.raises(Killed):
            sweep(folder, dying, asked)
        with (folder / "results.jsonl").open("a") as out:  # the line being written
            out.write(json.dumps({"id": "q9", "settings": {"method": "x"}})[:torn])
    else:
        sweep(folder, dying, asked)
    runs, backend = sweep(folder, right, asked)
    assert len(backend.asked) == 12 - after
    assert [len(run.rows) for run in runs] == [4, 4, 4]
    assert len(lines(folder)) == 12 and all(run.accuracy == 100 for run in runs)
    again, untouched = sweep(folder, right, asked)
    assert not untouched.asked and [run.rows for run in again] == [run.rows for run in runs]


def test_a_failed_question_is_recorded_and_asked_again(tmp_path: Path) -> None:
    def failing(request: EvalRequest) -> list[EvalSample]:
        if request.key % 2:
            raise RuntimeError("HTTP 500: no")
        return right(request)

    (run,), _ = sweep(tmp_path, failing, methods())
    assert [row.get("error") for row in run.rows] == [None, "HTTP 500: no"] * 2
    assert [row["correct"] for row in run.rows] == [True, False] * 2
    (entry,) = summarize([run], seed=0, prices=Prices())["runs"]
    assert (entry["failed"], entry["accuracy"], entry["questions"]) == (2, 50, 4)
    (run,), backend = sweep(tmp_path, right, methods())
    assert len(backend.asked) == 2 and run.accuracy == 100
    assert len(lines(tmp_path)) == 4


def test_more_budgets_can_be_added_to_a_finished_sweep(tmp_path: Path) -> None:
    sweep(tmp_path, right, methods(budgets=(8,)))
    runs, backend = sweep(tmp_path, right, methods(budgets=(4, 8)))
    assert len(backend.asked) == 4 and [run.settings.budget for run in runs] == [4, 8]


def test_another_sweeps_folder_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path, right, methods())
    with pytest.raises(RequestError, match=r"holds another sweep \(seed differ\)"):
        Results.open(tmp_path, IDENTITY | {"seed": 1}, overwrite=False)
    Results.open(tmp_path, IDENTITY | {"seed": 1}, overwrite=True).close()
    assert lines(tmp_path) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RequestError, match="out: "):
        Results.open(blocked, IDENTITY, overwrite=False)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    sweep(tmp_path, right, methods())
    path = tmp_path / "results.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(RequestError, match="line 1 is no row"):
        Results.open(tmp_path, IDENTITY, overwrite=False)


def test_several_samples_are_summed_and_graded_together(tmp_path: Path) -> None:
    def voting(request: EvalRequest) -> list[EvalSample]:
        texts = ["Answer: 7", "Answer: 7", f"Answer: {request.key}"]
        return [sample(text, 5, 8) for text in texts[: request.params.n]]

    runs, _ = sweep(tmp_path, voting, methods("majority-voting", samples=(1, 3)))
    row = runs[1].rows[2]
    assert (row["thinking_tokens"], row["answer_tokens"], row["generated_tokens"]) == (15, 9, 24)
    assert (row["extracted"], row["votes"], row["covered"], row["correct"]) == ("7", 2, True, False)
    entries = summarize(runs, seed=0, prices=Prices())["runs"]
    assert "coverage" not in entries[0] and entries[1]["coverage"] == 100


def test_rejected_samples_cost_time_but_are_not_answers(tmp_path: Path) -> None:
    def long(request: EvalRequest) -> list[EvalSample]:
        return [sample("Answer: 0", 9, 12, end_reason="budget")]

    asked = methods("rejection-sampling", budgets=(9,), max_tries=3)
    (run,), _ = sweep(tmp_path, long, asked, count=1)
    (row,) = run.rows
    assert (row["tries"], row["accepted"], row["extracted"]) == (3, False, None)
    assert (row["thinking_tokens"], row["generated_tokens"]) == (9, 36)
    (entry,) = summarize([run], seed=0, prices=Prices())["runs"]
    assert (entry["accepted"], entry["tries"], entry["accuracy"]) == (0, 3, 0)


def test_figures_of_a_run_follow_from_its_rows(tmp_path: Path) -> None:
    runs, _ = sweep(tmp_path, right, methods(budgets=(2, 8)))
    prices = Prices(watts=300, dollars_per_hour=36, dollars_per_million_tokens=5)
    first, second = summarize(runs, seed=0, prices=prices)["runs"]
    assert first["thinking_tokens"] == (0 + 1 + 2 + 3) / 4
    assert first["answer_tokens"] == (10 + 9 + 8 + 7) / 4
    wall = max(row["finished_s"] for row in runs[0].rows)
    assert first["wall_s"] == wall and first["output_tokens_per_s"] == 40 / wall
    assert first["joules_per_question"] == 300 * wall / 4
    assert first["dollars_per_question"] == pytest.approx((0.01 * wall + 40 * 5e-6) / 4)
    assert "difference_to_first" not in first
    assert second["difference_to_first"] == {"accuracy": 0, "interval": (0, 0)}


def test_time_is_summed_over_the_starts_of_a_run() -> None:
    run = methods()[0].settings[0]
    rows = [
        {"session": session, "finished_s": at} for session, at in ((0, 2.0), (0, 3.0), (2, 1.5))
    ]
    assert RunRows(run, rows).wall_s == 4.5  # type: ignore[arg-type]


def test_each_method_has_its_figures_and_a_class_its_baseline(tmp_path: Path) -> None:
    def by_length(request: EvalRequest) -> list[EvalSample]:
        tokens = 20 if "short" in request.prompt else 40 if "long" in request.prompt else 10
        return [sample("Answer: 0", tokens, 50)]

    asked = methods("class-conditional", "budget-forcing", budgets=(8, 16))
    runs, _ = sweep(tmp_path, by_length, asked)
    summary = summarize(runs, seed=0, prices=Prices())
    limits = [(entry["limit"], entry["limit_min"]) for entry in summary["runs"]]
    assert limits == [(None, None), (10, None), (None, 10), (8, None), (16, None)]
    assert summary["methods"] == {
        "class-conditional": {"control": 50, "scaling": 0, "performance": 25},
        "budget-forcing": {"control": 50, "scaling": None, "performance": 25},
    }


def test_traces_are_kept_of_the_first_questions_only(tmp_path: Path) -> None:
    def traced(request: EvalRequest) -> list[EvalSample]:
        segments = (("two ", False), ("Wait", True)) if request.trace else ()
        return [sample("Answer: 1", segments=segments)]

    (run,), _ = sweep(tmp_path, traced, methods(), traces=2)
    assert [row.get("trace") for row in run.rows[:3]] == [[["two ", 0], ["Wait", 1]]] * 2 + [None]
    assert run.rows[0]["question"] == "what is 0?"
