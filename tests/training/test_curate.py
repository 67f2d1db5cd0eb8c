"""The funnel: its stages by properties, whole over stub servers, and on the real questions."""

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
from s1engine.training import rows
from s1engine.training.curate import curation_config, grading
from s1engine.training.curate.__main__ import main
from s1engine.training.curate.diversity import (
    Option,
    by_domain,
    by_domain_and_length,
    longest,
    uniform,
)
from s1engine.training.curate.pipeline import CHOSEN, Curation, Source, curate, question_id
from s1engine.training.curate.question_filters import Seen, fault
from tests.eval.stub_server import StubServer, completion, serving
from tests.shared_data import shared_file

# --- stages ---

words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "Epsilon"]), max_size=24)


@given(words, words)
def test_an_overlap_is_eight_words_in_a_row(first: list[str], second: list[str]) -> None:
    """The oracle: every pair of windows, compared."""
    seen = Seen()
    seen.add(["  ".join(first)], "test")
    low_first, low_second = ([word.lower() for word in some] for some in (first, second))
    shared = any(
        low_first[i : i + 8] == low_second[j : j + 8]
        for i in range(len(first) - 7)
        for j in range(len(second) - 7)
    )
    assert (seen.overlap(" \n".join(second)) == "test") == shared


options = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=1, max_size=40
).map(lambda drawn: [Option(f"q{i}", domain, n) for i, (domain, n) in enumerate(drawn)])


@given(options, st.integers(0, 50), st.integers(0, 99), st.randoms(use_true_random=False))
def test_every_choice_is_distinct_complete_and_reproducible(
    pool: list[Option], count: int, seed: int, rng: random.Random
) -> None:
    shuffled = rng.sample(pool, len(pool))
    for choose in (by_domain_and_length, by_domain, longest, uniform):
        chosen = choose(pool, count, seed)
        assert len(chosen) == len(set(chosen)) == min(count, len(pool))
        assert choose(shuffled, count, seed) == chosen


def test_the_draw_is_uniform_over_domains_and_halves_with_the_rank() -> None:
    pool = [Option(f"{domain}{n}", domain, n) for domain in "ab" for n in range(5)]
    pool += [Option(f"c{n}", "c", n) for n in range(40)]
    firsts = Counter(by_domain_and_length(pool, 1, seed)[0] for seed in range(6000))
    domains = Counter({d: sum(n for k, n in firsts.items() if k[0] == d) for d in "abc"})
    assert all(abs(domains[d] / 6000 - 1 / 3) < 0.03 for d in "abc")
    assert abs(firsts["c39"] / domains["c"] - 1 / 2) < 0.05
    assert abs(firsts["c38"] / domains["c"] - 1 / 4) < 0.05
    assert abs(firsts["a4"] / domains["a"] - 16 / 31) < 0.05


def test_trusted_questions_come_first_and_count() -> None:
    pool = [Option(f"q{i}", "a", i) for i in range(9)]
    chosen = by_domain_and_length(pool, 4, 1, ["q0", "q1"])
    assert chosen[:2] == ["q0", "q1"] and len(set(chosen)) == 4


def test_longest_are_the_longest() -> None:
    assert longest([Option(f"q{i}", "a", i % 5) for i in range(20)], 4, 0) != []
    chosen = longest([Option(f"q{i}", "a", i) for i in range(20)], 4, 0)
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
    assert (fault(question, source) is not None) == bad


def test_a_judge_is_read_on_its_last_line() -> None:
    assert grading.verdict("It says No here.\n**Yes**") is True
    assert grading.verdict("Yes\nno.") is False
    assert grading.verdict("Yes\nperhaps") is None
    assert grading.verdict("") is None
    assert grading.field_code("Counting.\n05") == "05"
    assert grading.field_code("Counting.\n99") is None
    assert len(grading.FIELDS) == 63


# --- formats ---


def test_the_real_rows_come_back_as_they_were() -> None:
    """Both formats: as they stand in s1K-1.1, and re-shaped as s1K has them."""
    given_rows = [row for _, row in rows.read_jsonl(
        shared_file("s1k/s1k_five_rows_with_traces.jsonl"), "data"
    )]  # fmt: skip
    assert len(given_rows) == 5
    for given_row in given_rows:
        row = rows.from_json(given_row)
        assert rows.to_json(row) == given_row
        s1k = {k: v for k, v in given_row.items() if not k.startswith("gemini")}
        s1k |= {
            "cot": None,
            "thinking_trajectories": [given_row["gemini_thinking_trajectory"]],
            "attempt": given_row["gemini_attempt"],
        }
        assert rows.to_json(rows.from_json(s1k)) == s1k
        both = given_row | {"deepseek_thinking_trajectory": "t", "deepseek_attempt": "a",
                            "deepseek_grade": "Yes"}  # fmt: skip
        assert rows.to_json(rows.from_json(both)) == both
        assert rows.from_json(both).trace("deepseek") == rows.Trace("t", "a")
        with pytest.raises(RequestError, match=r"gemini, deepseek"):
            rows.from_json(both).trace(None)


def overlapping(s1k: list[rows.Row], file: str, field: str) -> list[rows.Row]:
    """s1K's questions that share eight words with a test set; every copy must be among them."""
    test = curation_config.read_rows(shared_file(file), {"question": field}, "test")
    seen = Seen()
    seen.add((row.question for row in test), file)
    found = [row for row in s1k if seen.overlap(row.question) == file]
    texts = {row.question.strip() for row in test}
    copies = [row for row in s1k if row.question.strip() in texts and len(row.question.split()) > 7]
    assert all(row in found for row in copies)
    return found


def test_real_questions_against_real_test_sets() -> None:
    """s1 says that its sources were decontaminated, but AIME was added past that step: most of what
    overlaps with MATH500 is AIME, and AIME itself is found again."""
    s1k = curation_config.read_rows(shared_file("s1k/s1k_questions.jsonl"), {}, "s1k")
    assert len(s1k) == 912
    assert overlapping(s1k, "math/gsm8k_test.jsonl", "question") == []
    math500 = overlapping(s1k, "math/math500.jsonl", "problem")
    aime = [row for row in math500 if "AIME" in row.get("source_type")]
    assert (len(math500), len(aime)) == (79, 61)
    past = overlapping(s1k, "math/aime_1983_2023.json", "problem")
    assert sum("AIME" in row.get("source_type") for row in past) > 250


# --- the whole funnel ---


def questions(count: int) -> list[rows.Json]:
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


side_by_side = threading.Barrier(2, timeout=30)


def teacher(body: dict[str, Any]) -> Any:
    """Thinks for longer the larger the number; breaks on 7; never thinks on 11. It answers 0 only
    while 1 is asked, too."""
    i = number(body)
    if i in (0, 1):
        side_by_side.wait()
    if i == 7:
        return (400, {}, {"error": {"message": "refused"}})
    answer = completion(f"Answer: {2 * i + (i == 20)}")
    if i != 11:
        answer["choices"][0]["message"]["reasoning_content"] = "so " * (i + 1)
    return answer


def weak(body: dict[str, Any]) -> Any:
    """Solves every fifth."""
    i = number(body)
    return completion(f"Answer: {2 * i if i % 5 == 0 else 1}")


def write(path: Path, given: list[rows.Json]) -> str:
    rows.write_jsonl(path, given)
    return str(path)


def settings(tmp_path: Path, one: StubServer, two: StubServer, **more: Any) -> dict[str, Any]:
    repeated = questions(30)[:2]
    contaminated = {"question": questions(30)[3]["question"] + " Explain.", "solution": "6"}
    return {
        "out": str(tmp_path / "out"),
        "sources": [
            {"name": "first", "file": write(tmp_path / "a.jsonl", [*questions(30), *repeated])},
            {"name": "second", "file": write(tmp_path / "b.jsonl", [contaminated])},
        ],
        "tests": [{"name": "exam", "file": write(tmp_path / "t.jsonl", questions(30)[4:5])}],
        "teacher": {"url": one.url},
        "weak": {"small": {"url": two.url}},
        "domain": "topic",
        "trusted": [{"source": "first", "min_tokens": 80}],
        "count": 10,
        **more,
    }


def decisions(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for _, row in rows.read_jsonl(folder / "manifest.jsonl", "manifest"):
        found.setdefault(row.get("stage", "kept"), []).append(row["id"])
    return found


def test_the_funnel_over_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(teacher) as one, serving(weak) as two:
        given_settings = settings(tmp_path, one, two)
        config = tmp_path / "curate.yaml"
        config.write_text(json.dumps(given_settings))
        assert main([str(config)]) == 0
        asked = len(one.bodies) + len(two.bodies)
        first = (tmp_path / "out" / CHOSEN).read_bytes()
        assert main([str(config)]) == 0
        assert (tmp_path / "out" / CHOSEN).read_bytes() == first
        again = len(one.bodies) + len(two.bodies) - asked
        assert again == 1, "only what had failed is asked again"
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts == {
        "questions": 33,
        "decontaminated": 31,  # less the exam's, and the second source's copy
        "distinct": 29,
        "with a trace": 27,  # 7 refused, 11 without thinking
        "answered by all": 27,
        "well formatted": 27,
        "difficult": 21,  # 0, 5, .., 25
        "with a domain": 21,
        "chosen": 10,
    }
    fates = decisions(tmp_path / "out")
    assert sum(map(len, fates.values())) == 33
    assert {stage: len(ids) for stage, ids in fates.items()} == {
        "decontaminated": 2, "distinct": 2, "with a trace": 2, "difficult": 6, "chosen": 11,
        "kept": 10,
    }  # fmt: skip
    chosen = [row for _, row in rows.read_jsonl(tmp_path / "out" / CHOSEN, "chosen")]
    kept = [question_id(row["question"]) for row in chosen]
    trusted = [question_id(questions(30)[i]["question"]) for i in (27, 28, 29)]
    assert kept[:3] == trusted, "right and long ones of the trusted source stand first"
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
        plan = curation_config.from_dict(settings(tmp_path, one, two, **more))
        funnel = curate(plan)
    assert {c.facts["domain"] for c in funnel.candidates} == {"Combinatorics"}
    assert dict(funnel.counts)["difficult"] == 21
    (row, *_) = [row for _, row in rows.read_jsonl(tmp_path / "out" / CHOSEN, "chosen")]
    assert row["stub_attempt"].startswith("Answer:") and row["stub_thinking_trajectory"]


def test_too_few_is_an_error_that_leaves_its_manifest(tmp_path: Path) -> None:
    with serving(teacher) as one, serving(weak) as two:
        plan = curation_config.from_dict(settings(tmp_path, one, two, count=22))
        with pytest.raises(RequestError, match="only 21 questions are left of 33"):
            curate(plan)
    assert (tmp_path / "out" / "manifest.jsonl").exists()


def test_rows_may_bring_their_traces(tmp_path: Path) -> None:
    made = [
        rows.Row(f"q {i}", {"gemini": rows.Trace("t" * i, "Answer: 1")}, {"solution": "1"})
        for i in range(1, 6)
    ]
    plan = Curation(
        out=tmp_path, sources=[Source("all", made)], teacher_name="gemini",
        domain=lambda row: "one", count=3, progress=False,
    )  # fmt: skip
    assert len(curate(plan).candidates) == 3


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
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = write(tmp_path / "a.jsonl", questions(2))
    good: dict[str, Any] = {"out": "x", "sources": [{"file": file}], "domain": "topic"}
    with pytest.raises(RequestError, match=named):
        curation_config.from_dict(good | change)
