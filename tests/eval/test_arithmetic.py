"""The task: answers agree with an independent reading of the question's text."""

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from s1engine.eval.arithmetic import MAX_STEPS, MIN_STEPS, draw_steps, generate, is_held_out, render


def read(question: str) -> int:
    """Evaluates the text as Python assignments, modulo 10 at the end only."""
    *definitions, last = question.split()
    values: dict[str, int] = {}
    for definition in definitions:
        assert re.fullmatch(r"[a-z]=([a-z][-+*])?\d", definition)
        label, expression = definition.split("=")
        values[label] = eval(expression, {}, dict(values))
    return values[last.removesuffix("?")] % 10


@given(st.integers(0, 2**32), st.integers(MIN_STEPS, MAX_STEPS))
def test_the_value_is_what_the_text_says(seed: int, count: int) -> None:
    steps = draw_steps(random.Random(seed), count)
    assert len({step.label for step in steps}) == len(steps) == count
    assert read(render(steps)) == steps[-1].value


def test_questions_are_held_out_reproducible_and_of_every_length() -> None:
    questions = generate(3, 200)
    assert questions == generate(3, 200) != generate(4, 200)
    assert all(is_held_out(q.question) and read(q.question) == int(q.answer) for q in questions)
    assert {len(q.steps) for q in questions} == set(range(MIN_STEPS, MAX_STEPS + 1))
    assert len({q.id for q in questions}) == 200


def test_few_of_all_questions_are_held_out() -> None:
    rng = random.Random(0)
    held = [is_held_out(render(draw_steps(rng, 5))) for _ in range(3000)]
    assert 1 / 24 < sum(held) / len(held) < 1 / 11
