"""Extraction and grading of answers."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.eval.grade import choice_letter, extract_answer, is_correct
from tests.shared_data import shared_file


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Final Answer: 7", "7"),
        ("final answer:\n 42 ", "42"),
        ("Answer: 1, no. Answer: 2", "2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}. Answer: 3", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{x}", "x"),
        ("<think>Answer: 1</think>\n\nAnswer: 2", "2"),
        (r"\boxed{1}<|im_start|>answer" + "\nI do not know", None),
        ("nothing to see", None),
        ("", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.text(), st.text(alphabet="abc123+ ", min_size=1))
def test_a_last_boxed_is_always_extracted(before: str, answer: str) -> None:
    assert extract_answer(f"{before}\\boxed{{{answer}}}") == answer.strip()


@pytest.mark.parametrize(
    ("given_", "wanted", "right"),
    [
        ("7", "7", True),
        ("023", "23", True),
        ("1,000", "1000", True),
        ("7.", "7", True),
        ("$7$", "7", True),
        ("7", "8", False),
        (None, "8", False),
        ("x", "x", True),
        ("x", "8", False),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"(3,\pi/3)", r"\left( 3, \frac{\pi}{2} \right)", False),
        ("q - p", "p - q", False),
        ("-q + p", "p - q", True),
        ("Evelyn", r"\text{Evelyn}", True),
        (r"10\%", "10", True),
        ("the answer is $\\frac12$", "1/2", True),
        ("{" * 5000, "8", False),
    ],
)
def test_grading(given_: str | None, wanted: str, right: bool) -> None:
    assert is_correct(given_, wanted) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(B)", "B"),
        ("D) 3 eV", "D"),
        (r"\text{A}", "A"),
        ("The answer is B", "B"),
        ("ABC", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter
    if letter:
        assert is_correct(text, letter, "choice") and not is_correct(text, "E", "choice")


def test_grading_works_outside_the_main_thread() -> None:
    found: list[bool] = []
    worker = threading.Thread(target=lambda: found.append(is_correct("3/6", r"\frac{4}{8}")))
    worker.start()
    worker.join()
    assert found == [True]


def test_every_gold_answer_is_right_by_itself() -> None:
    lines = shared_file("math/math500.jsonl").read_text().splitlines()
    for line in lines:
        answer = json.loads(line)["answer"]
        assert is_correct(extract_answer(f"so \\boxed{{{answer}}}."), answer)


def test_grades_agree_with_those_of_another_harness() -> None:
    """100 MATH problems with 8 answers each, extracted and graded by another harness."""
    rows = shared_file("model_outputs/qwen_math_cot_100x8.jsonl").read_text().splitlines()[:40]
    agreed = total = 0
    for row in map(json.loads, rows):
        for pred, score in zip(row["pred"], row["score"], strict=True):
            agreed += is_correct(pred, str(row["gt"])) == bool(score)
            total += 1
    assert total == 320 and agreed >= 0.98 * total
