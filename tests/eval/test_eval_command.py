"""``s1engine eval`` from end to end: files, figures of a run, bad options."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.eval import command
from s1engine.eval.engine_backend import EngineBackend
from s1engine.eval.method_registry import SweepOptions, build_methods
from s1engine.eval.methods import RunSettings
from s1engine.eval.metrics import Point, exact_accuracy, method_metrics
from s1engine.eval.results import Results
from s1engine.eval.sweep import run_sweep
from s1engine.eval.tasks import Question, arithmetic_questions
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.eval.stub_server import completion, serving


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(progress=False, max_num_seqs=32)


def test_a_sweep_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "arithmetic", "--budgets", "0,20,none", "--num-waits", "0,1"]
    assert command.run(parse(*words, "--limit", "8", "--seed", "5", "--out", str(tmp_path))) == 0
    rows = results(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    runs = summary["runs"]
    assert len(rows) == 6 * 8 and len(runs) == 6
    order = [(run["settings"]["num_waits"], run["settings"]["budget"]) for run in runs]
    assert order == [(0, 0), (0, 20), (0, None), (1, 0), (1, 20), (1, None)]
    for run in runs:
        own = [row for row in rows if row["settings"] == run["settings"]]
        assert len(own) == 8
        assert run["accuracy"] == pytest.approx(100 * sum(row["correct"] for row in own) / 8)
        assert run["thinking_tokens"] == sum(row["thinking_tokens"] for row in own) / 8
        low, high = run["interval"]
        assert 0 <= low <= run["accuracy"] <= high <= 100
        budget = run["settings"]["budget"]
        assert budget is None or all(row["thinking_tokens"] <= budget for row in own)
    assert runs[0]["thinking_tokens"] == 0 < runs[1]["thinking_tokens"]
    points = [
        Point(run["thinking_tokens"], exact_accuracy(run["accuracy"], 8), run["limit"])
        for run in runs
    ]
    assert summary["methods"] == {"budget-forcing": method_metrics(points)}
    for name in ("accuracy", "seconds", "throughput", "control"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.count("accuracy") == 6


@pytest.mark.parametrize(
    ("words", "param"),
    [
        (["--budgets=1,x"], "budgets"),
        (["--budgets=-1"], "budgets"),
        (["--budgets=99999999999"], "budgets"),
        (["--budgets=64,999999"], "budgets"),
        (["--num-waits=-1"], "num_waits"),
        (["--num-waits=none"], "num_waits"),
        (["--limit=0"], "limit"),
        (["--method=guessing"], "method"),
        (["--samples=4"], "samples"),
        (["--data=x.jsonl"], "data"),
        (["--base-url=localhost"], "base_url"),
        (["--base-url=http://localhost", "--dtype=float32"], "dtype"),
        (["--concurrency=0"], "concurrency"),
        (["--watts=-1"], "watts"),
    ],
)
def test_bad_options_are_named_before_anything_runs(
    tmp_path: Path, words: list[str], param: str
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(RequestError) as error:
        command.run(parse("--task", "arithmetic", "--out", str(folder), *words))
    assert error.value.param == param and not folder.exists()


def test_bad_rows_are_skipped_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text('{"id": "a", "question": "a=1 a?", "answer": "1", "from": "me"}\noops\n')
    words = ["--task", "jsonl", "--data", str(data), "--out", str(tmp_path / "out")]
    with pytest.raises(RequestError, match="line 2: is no JSON"):
        command.run(parse(*words))
    assert command.run(parse(*words, "--skip-bad", "--budgets", "4")) == 0
    (row,) = results(tmp_path / "out")
    assert row["extra"] == {"from": "me"} and row["answer"] == "1"
    assert "skipped line 2" in capsys.readouterr().err


def test_a_question_that_cannot_be_asked_is_a_failed_row(llm: LLM, tmp_path: Path) -> None:
    found = [Question("long", "x" * 100_000, "1"), *arithmetic_questions(0, 2)]
    (run,) = sweep_with(llm, tmp_path, found)
    assert "exceeds the context" in run.rows[0]["error"]
    assert ["error" in row for row in run.rows] == [True, False, False]


def sweep_with(llm: LLM, folder: Path, found: list[Question], **options: Any) -> list[Any]:
    opened = Results.open(folder, {}, overwrite=True)
    methods = build_methods(["budget-forcing"], SweepOptions(**options))
    runs = run_sweep(
        methods, found, EngineBackend(llm), opened, traces=1, finished=lambda run: None
    )
    opened.close()
    return runs


def test_a_sweep_has_the_same_answers_as_the_engine(llm: LLM, tmp_path: Path) -> None:
    found = arithmetic_questions(1, 12)
    (run,) = sweep_with(llm, tmp_path, found, budgets=(24,), num_waits=(1,))
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(max_tokens=24, num_waits=1))
    chats = [[{"role": "user", "content": question.prompt}] for question in found]
    for row, output in zip(run.rows, llm.chat(chats, params, progress=False), strict=True):
        sample = output.outputs[0]
        assert sample.thinking is not None
        assert row["thinking_tokens"] == sample.thinking.tokens
        assert row["waits_used"] == sample.thinking.waits_used
        assert row["generated_tokens"] == len(sample.token_ids)
    decode = llm.engine.tokenizer.decode
    trace = run.rows[0]["trace"]
    first = llm.chat(chats[0], params, progress=False)[0].outputs[0]
    assert "".join(text for text, _ in trace) == decode(first.token_ids, skip_special_tokens=False)
    assert any(forced for _, forced in trace) and not all(forced for _, forced in trace)


def test_every_method_runs_on_the_engine(llm: LLM) -> None:
    names = {
        "token-conditional": {"budgets": (16,)},
        "token-conditional-forced": {"budgets": (16,)},
        "step-conditional-forced": {"steps": (1,)},
        "class-conditional-forced": {"budgets": (16,)},
        "rejection-sampling": {"budgets": (40,), "max_tries": 3},
        "majority-voting": {"budgets": (16,), "samples": (3,)},
        "best-of-n": {"budgets": (16,), "samples": (2,)},
    }
    backend = EngineBackend(llm)
    for name, options in names.items():
        for method in build_methods([name], SweepOptions(**options)):  # type: ignore[arg-type]
            answers = list(method.answer(arithmetic_questions(2, 3), backend, frozenset()))
            assert len(answers) == 3 and not any(answer.error for answer in answers)
            (run,) = method.settings
            for sample in (one for answer in answers for one in answer.samples):
                if run.sample_limit is not None and name != "token-conditional":
                    assert sample.thinking_tokens <= run.sample_limit
                assert (sample.mean_logprob is not None) == (name == "best-of-n")


def test_parallel_samples_share_their_prompt(llm: LLM) -> None:
    (method,) = build_methods(
        ["majority-voting"], SweepOptions(budgets=(8,), samples=(6,), max_tokens=40)
    )
    ask = [Question("shared", "share this " * 40 + "a=3 a?", "3")]
    before = llm.engine.scheduler.stats().num_computed_tokens
    (answer,) = method.answer(ask, EngineBackend(llm), frozenset())
    computed = llm.engine.scheduler.stats().num_computed_tokens - before
    prompt = len(llm.engine.tokenizer.encode(ask[0].prompt))
    assert len(answer.samples) == 6 and computed < 2.5 * prompt


def test_stopping_early_leaves_no_sequences(llm: LLM) -> None:
    (method,) = build_methods(["budget-forcing"], SweepOptions(budgets=(8,)))
    stream = method.answer(arithmetic_questions(3, 6), EngineBackend(llm), frozenset())
    assert isinstance(stream, Iterator)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_unfinished


def test_a_run_is_one_continuous_batch(llm: LLM, tmp_path: Path) -> None:
    """A sweep submits all questions at once and needs as many steps as the engine alone."""
    engine, found = llm.engine, arithmetic_questions(4, 48)
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(max_tokens=32))
    chats = [[{"role": "user", "content": question.prompt}] for question in found]

    def steps(ask: Callable[[], object]) -> int:
        engine.scheduler.clear_cache()
        before = engine.scheduler.stats().num_steps
        ask()
        return engine.scheduler.stats().num_steps - before

    harness = steps(lambda: sweep_with(llm, tmp_path, found, budgets=(32,)))
    assert harness == steps(lambda: llm.chat(chats, params, progress=False))


def test_a_server_is_evaluated_like_a_model(tmp_path: Path) -> None:
    with serving(lambda body: completion("Answer: 1", tokens=9, thinking=4)) as server:
        words = ["--task", "arithmetic", "--limit", "5", "--budgets", "4,8"]
        args = parse(*words, "--base-url", server.url, "--out", str(tmp_path))
        assert command.run(args) == 0
        assert command.run(args) == 0
    assert len(server.bodies) == 10  # the second time there is nothing left to ask
    assert [body["thinking_token_budget"] for body in server.bodies].count(8) == 5
    assert json.loads((tmp_path / "sweep.json").read_text())["model"] == "stub-model"
    assert {row["thinking_tokens"] for row in results(tmp_path)} == {4}


def test_a_dead_server_leaves_failed_rows_and_status_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "arithmetic", "--limit", "3", "--retries", "0"]
    args = parse(*words, "--base-url", "http://127.0.0.1:9", "--out", str(tmp_path))
    assert command.run(args) == 1
    assert all("ConnectError" in row["error"] for row in results(tmp_path))
    assert "3 questions failed" in capsys.readouterr().err


def test_settings_name_only_what_a_method_has() -> None:
    assert RunSettings("m").to_json() == {"method": "m", "budget": None, "num_waits": 0}
    assert RunSettings("m", samples=4).to_json()["samples"] == 4
