"""The funnel: properties of its stages, whole runs over stub servers, and s1K's questions."""

import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.training.curate import grading
from s1engine.training.curate.__main__ import main
from s1engine.training.curate.curation_config import (
    CurationConfig,
    QuestionSource,
    parse_config,
    read_rows,
)
from s1engine.training.curate.diversity import (
    SelectableQuestion,
    by_domain,
    by_domain_and_length,
    longest,
    uniform,
)
from s1engine.training.curate.pipeline import CHOSEN, curate, question_id
from s1engine.training.curate.question_filters import NgramIndex, formatting_fault
from s1engine.training.rows import (
    Json,
    TeacherTrace,
    TrainingRow,
    format_row,
    parse_row,
    read_jsonl,
    write_jsonl,
)
from tests.eval.stub_server import StubServer, completion, serving
from tests.shared_data import shared_file

# --- stages ---

words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "Epsilon"]), max_size=24)


@given(words, words)
def test_an_overlap_is_eight_words_in_a_row(first: list[str], second: list[str]) -> None:
    """The oracle compares every pair of windows."""
    index = NgramIndex()
    index.add(["  ".join(first)], "test")
    low_first, low_second = ([word.lower() for word in some] for some in (first, second))
    shared = any(
        low_first[i : i + 8] == low_second[j : j + 8]
        for i in range(len(first) - 7)
        for j in range(len(second) - 7)
    )
    assert (index.find_overlap(" \n".join(second)) == "test") == shared


options = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=1, max_size=40
).map(lambda drawn: [SelectableQuestion(f"q{i}", domain, n) for i, (domain, n) in enumerate(drawn)])


@given(options, st.integers(0, 50), st.integers(0, 99), st.randoms(use_true_random=False))
def test_every_selection_is_distinct_complete_and_reproducible(
    pool: list[SelectableQuestion], count: int, seed: int, rng: random.Random
) -> None:
    shuffled = rng.sample(pool, len(pool))
    for select in (by_domain_and_length, by_domain, longest, uniform):
        chosen = select(pool, count, seed)
        assert len(chosen) == len(set(chosen)) == min(count, len(pool))
        assert select(shuffled, count, seed) == chosen


def test_the_draw_is_uniform_over_domains_and_halves_per_rank() -> None:
    pool = [SelectableQuestion(f"{domain}{n}", domain, n) for domain in "ab" for n in range(5)]
    pool += [SelectableQuestion(f"c{n}", "c", n) for n in range(40)]
    firsts = Counter(by_domain_and_length(pool, 1, seed)[0] for seed in range(6000))
    domains = Counter({d: sum(n for k, n in firsts.items() if k[0] == d) for d in "abc"})
    assert all(abs(domains[d] / 6000 - 1 / 3) < 0.03 for d in "abc")
    assert abs(firsts["c39"] / domains["c"] - 1 / 2) < 0.05
    assert abs(firsts["c38"] / domains["c"] - 1 / 4) < 0.05
    assert abs(firsts["a4"] / domains["a"] - 16 / 31) < 0.05


def test_trusted_questions_come_first_and_are_counted() -> None:
    pool = [SelectableQuestion(f"q{i}", "a", i) for i in range(9)]
    chosen = by_domain_and_length(pool, 4, 1, ["q0", "q1"])
    assert chosen[:2] == ["q0", "q1"] and len(set(chosen)) == 4


def test_longest_are_the_longest() -> None:
    assert longest([SelectableQuestion(f"q{i}", "a", i % 5) for i in range(20)], 4, 0) != []
    chosen = longest([SelectableQuestion(f"q{i}", "a", i) for i in range(20)], 4, 0)
    assert chosen == ["q19", "q18", "q17", "q16"]


@pytest.mark.parametrize(
    ("question", "source", "bad"),
    [
        ("Find x.", "math", False),
        ("[asy] draw(A--B); [/asy] Find x.", "math", True),
        ("[asy] draw(A--B); [/asy] Find x.", "aime-2001", False),
        ("See ![Image] and say.", "math", True),
        ("p1. First. p2. Second.", "math", True),
        ("Let p be prime. p0. is no part", "math", False),
        ("**p3** is bold", "math", True),
        ("**bold** words with a 3", "math", False),
    ],
)
def test_quality(question: str, source: str, bad: bool) -> None:
    assert (formatting_fault(question, source) is not None) == bad


def test_a_judge_is_parsed_on_its_last_line() -> None:
    assert grading.parse_verdict("It says No here.\n**Yes**") is True
    assert grading.parse_verdict("Yes\nno.") is False
    assert grading.parse_verdict("Yes\nperhaps") is None
    assert grading.parse_verdict("") is None
    assert grading.parse_field_code("Counting.\n05") == "05"
    assert grading.parse_field_code("Counting.\n99") is None
    assert len(grading.FIELDS) == 63


# --- formats ---


def test_published_rows_survive_a_round_trip() -> None:
    """Both formats: as published in s1K-1.1, and reshaped to s1K's."""
    given_rows = [row for _, row in read_jsonl(
        shared_file("s1k/s1k_five_rows_with_traces.jsonl"), "data"
    )]  # fmt: skip
    assert len(given_rows) == 5
    for given_row in given_rows:
        row = parse_row(given_row)
        assert format_row(row) == given_row
        s1k = {k: v for k, v in given_row.items() if not k.startswith("gemini")}
        s1k |= {
            "cot": None,
            "thinking_trajectories": [given_row["gemini_thinking_trajectory"]],
            "attempt": given_row["gemini_attempt"],
        }
        assert format_row(parse_row(s1k)) == s1k
        both = given_row | {"deepseek_thinking_trajectory": "t", "deepseek_attempt": "a",
                            "deepseek_grade": "Yes"}  # fmt: skip
        assert format_row(parse_row(both)) == both
        assert parse_row(both).trace("deepseek") == TeacherTrace("t", "a")
        with pytest.raises(RequestError, match=r"gemini, deepseek"):
            parse_row(both).trace(None)


def overlapping(s1k: list[TrainingRow], file: str, field: str) -> list[TrainingRow]:
    """s1K's questions that share eight words with a test set; all copies must be among them."""
    test = read_rows(shared_file(file), {"question": field}, "test")
    index = NgramIndex()
    index.add((row.question for row in test), file)
    overlaps = [row for row in s1k if index.find_overlap(row.question) == file]
    texts = {row.question.strip() for row in test}
    copies = [row for row in s1k if row.question.strip() in texts and len(row.question.split()) > 7]
    assert all(row in overlaps for row in copies)
    return overlaps


def test_s1k_questions_against_real_test_sets() -> None:
    """s1 decontaminated its sources but added AIME after that step: most overlaps with MATH500 are
    AIME questions, and AIME overlaps with itself."""
    s1k = read_rows(shared_file("s1k/s1k_questions.jsonl"), {}, "s1k")
    assert len(s1k) == 912
    assert overlapping(s1k, "math/gsm8k_test.jsonl", "question") == []
    math500 = overlapping(s1k, "math/math500.jsonl", "problem")
    aime = [row for row in math500 if "AIME" in row.text("source_type")]
    assert (len(math500), len(aime)) == (79, 61)
    earlier = overlapping(s1k, "math/aime_1983_2023.json", "problem")
    assert sum("AIME" in row.text("source_type") for row in earlier) > 250


# --- the whole funnel ---


def questions(count: int) -> list[Json]:
    topics = ("rings", "graphs", "limits")
    return [
        {
            "question": f"number {i} of {topics[i % 3]}: what is {i} plus {i} and why is that so?",
            "solution": str(2 * i),
            "topic": topics[i % 3],
        }
        for i in range(count)
    ]


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].split()[1])


both_in_flight = threading.Barrier(2, timeout=30)


def teacher(body: dict[str, Any]) -> Any:
    """Thinks longer for larger numbers, fails on 7, does not think on 11. It answers 0 and 1 only
    while both are in flight."""
    i = number(body)
    if i in (0, 1):
        both_in_flight.wait()
    if i == 7:
        return (400, {}, {"error": {"message": "refused"}})
    answer = completion(f"Answer: {2 * i + (i == 20)}")
    if i != 11:
        answer["choices"][0]["message"]["reasoning_content"] = "so " * (i + 1)
    return answer


def weak(body: dict[str, Any]) -> Any:
    """Solves every fifth question."""
    i = number(body)
    return completion(f"Answer: {2 * i if i % 5 == 0 else 1}")


def write_rows(path: Path, given: list[Json]) -> str:
    write_jsonl(path, given)
    return str(path)


def config_fields(tmp_path: Path, one: StubServer, two: StubServer, **more: Any) -> dict[str, Any]:
    repeated = questions(30)[:2]
    contaminated = {"question": questions(30)[3]["question"] + " Explain.", "solution": "6"}
    return {
        "out": str(tmp_path / "out"),
        "sources": [
            {
                "name": "first",
                "file": write_rows(tmp_path / "a.jsonl", [*questions(30), *repeated]),
            },
            {"name": "second", "file": write_rows(tmp_path / "b.jsonl", [contaminated])},
        ],
        "tests": [{"name": "exam", "file": write_rows(tmp_path / "t.jsonl", questions(30)[4:5])}],
        "teacher": {"url": one.url},
        "weak": {"small": {"url": two.url}},
        "domain": "topic",
        "trusted": [{"source": "first", "min_tokens": 80}],
        "count": 10,
        **more,
    }


def decisions(folder: Path) -> dict[str, list[str]]:
    by_stage: dict[str, list[str]] = {}
    for _, row in read_jsonl(folder / "manifest.jsonl", "manifest"):
        by_stage.setdefault(row.get("stage", "kept"), []).append(row["id"])
    return by_stage


def test_the_funnel_over_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(teacher) as one, serving(weak) as two:
        fields = config_fields(tmp_path, one, two)
        config = tmp_path / "curate.yaml"
        config.write_text(json.dumps(fields))
        assert main([str(config)]) == 0
        asked = len(one.bodies) + len(two.bodies)
        first = (tmp_path / "out" / CHOSEN).read_bytes()
        assert main([str(config)]) == 0
        assert (tmp_path / "out" / CHOSEN).read_bytes() == first
        again = len(one.bodies) + len(two.bodies) - asked
        assert again == 1, "only the failed question is asked again"
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts == {
        "questions": 33,
        "decontaminated": 31,  # less the exam's, and the second source's copy
        "distinct": 29,
        "with a trace": 27,  # 7 failed, 11 without thinking
        "answered by all": 27,
        "well formatted": 27,
        "difficult": 21,  # 0, 5, .., 25
        "with a domain": 21,
        "chosen": 10,
    }
    outcomes = decisions(tmp_path / "out")
    assert sum(map(len, outcomes.values())) == 33
    assert {stage: len(ids) for stage, ids in outcomes.items()} == {
        "decontaminated": 2, "distinct": 2, "with a trace": 2, "difficult": 6, "chosen": 11,
        "kept": 10,
    }  # fmt: skip
    chosen = [row for _, row in read_jsonl(tmp_path / "out" / CHOSEN, "chosen")]
    kept = [question_id(row["question"]) for row in chosen]
    trusted = [question_id(questions(30)[i]["question"]) for i in (27, 28, 29)]
    assert kept[:3] == trusted, "correct and long ones of the trusted source come first"
    assert all(row["thinking_trajectories"][0].startswith("so") for row in chosen)
    assert (tmp_path / "out" / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert "difficult                     21" in capsys.readouterr().err


def test_a_judge_grades_and_names_the_domain(tmp_path: Path) -> None:
    def judge(body: dict[str, Any]) -> Any:
        text = body["messages"][0]["content"]
        if "two-digit" in text:
            return completion("It counts things.\n05")
        return completion("Hm.\nNo" if "## Attempt\nAnswer: 1\n" in text else "Good.\nYes")

    with serving(teacher) as one, serving(weak) as two, serving(judge) as three:
        more = {"domain": None, "judge": {"url": three.url}, "teacher_name": "stub"}
        config = parse_config(config_fields(tmp_path, one, two, **more))
        funnel = curate(config)
    assert {c.facts["domain"] for c in funnel.candidates} == {"Combinatorics"}
    assert dict(funnel.counts)["difficult"] == 21
    (row, *_) = [row for _, row in read_jsonl(tmp_path / "out" / CHOSEN, "chosen")]
    assert row["stub_attempt"].startswith("Answer:") and row["stub_thinking_trajectory"]


def test_too_few_questions_are_an_error_with_a_manifest(tmp_path: Path) -> None:
    with serving(teacher) as one, serving(weak) as two:
        config = parse_config(config_fields(tmp_path, one, two, count=22))
        with pytest.raises(RequestError, match="only 21 questions are left of 33"):
            curate(config)
    assert (tmp_path / "out" / "manifest.jsonl").exists()


def test_rows_with_their_own_traces(tmp_path: Path) -> None:
    rows = [
        TrainingRow(f"q {i}", {"gemini": TeacherTrace("t" * i, "Answer: 1")}, {"solution": "1"})
        for i in range(1, 6)
    ]
    config = CurationConfig(
        out=tmp_path, sources=[QuestionSource("all", rows)], teacher_name="gemini",
        domain=lambda row: "one", count=3, progress=False,
    )  # fmt: skip
    assert len(curate(config).candidates) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sourcez": []}, "config.sourcez"),
        ({"sources": None}, "config.sources"),
        ({"sources": [{"file": "nowhere.jsonl"}]}, r"sources\[0\]"),
        ({"teacher": {"ur": "x"}}, "teacher.ur"),
        ({"teacher": {"url": "x", "key": "S1ENGINE_NO_SUCH_KEY"}}, "teacher.key"),
        ({"domain": None}, "domain"),
        ({"count": 0}, "count"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", questions(2))
    good: dict[str, Any] = {"out": "x", "sources": [{"file": file}], "domain": "topic"}
    with pytest.raises(RequestError, match=named):
        parse_config(good | change)
