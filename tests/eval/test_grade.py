"""Reading answers out of text, and marking them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.eval.grade import extract_answer, is_correct


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
        ("nothing to see", None),
        ("", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.text(), st.text(alphabet="abc123+ ", min_size=1))
def test_a_last_boxed_is_always_found(before: str, answer: str) -> None:
    assert extract_answer(f"{before}\\boxed{{{answer}}}") == answer.strip()


@pytest.mark.parametrize(
    ("given_", "wanted", "right"),
    [
        ("7", "7", True),
        ("023", "23", True),
        ("1,000", "1000", True),
        ("7.", "7", True),
        ("7", "8", False),
        (None, "8", False),
        ("x", "x", True),
        ("x", "8", False),
    ],
)
def test_marking(given_: str | None, wanted: str, right: bool) -> None:
    assert is_correct(given_, wanted) is right
