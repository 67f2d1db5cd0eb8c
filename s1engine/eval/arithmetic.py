"""Chained arithmetic modulo 10: the task of s1-nano.

A question defines digits one after another and asks for the last one, all modulo 10, for example
``k=3 b=k+4 x=b*2 x?``, whose answer is 4. Each definition needs one small step of thinking, so the
thinking grows with the number of steps. A hash of its text decides whether a question is held out
or for training, so no question is both.
"""

import hashlib
import itertools
import operator
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

MIN_STEPS = 2
MAX_STEPS = 14
HELD_OUT_SHARE = 16  # one question in 16 is held out

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


@dataclass(frozen=True, slots=True)
class ArithmeticStep:
    """``label = previous label <op> operand``, equal to ``value`` modulo 10. The first step has no
    operator: its label is its operand."""

    label: str
    op: str
    operand: int
    value: int


@dataclass(frozen=True, slots=True)
class ArithmeticQuestion:
    """A question as a user asks it, and its answer."""

    id: str
    question: str
    answer: str
    steps: tuple[ArithmeticStep, ...]


def draw_steps(rng: random.Random, count: int) -> tuple[ArithmeticStep, ...]:
    """A random chain of ``count`` definitions with distinct one-letter labels."""
    labels = rng.sample(string.ascii_lowercase, count)
    value = rng.randrange(10)
    steps = [ArithmeticStep(labels[0], "", value, value)]
    for label in labels[1:]:
        op, operand = rng.choice("+-*"), rng.randrange(10)
        value = OPERATORS[op](value, operand) % 10
        steps.append(ArithmeticStep(label, op, operand, value))
    return tuple(steps)


def render(steps: tuple[ArithmeticStep, ...]) -> str:
    """The question's text."""
    definitions = [f"{steps[0].label}={steps[0].operand}"]
    for before, step in itertools.pairwise(steps):
        definitions.append(f"{step.label}={before.label}{step.op}{step.operand}")
    return f"{' '.join(definitions)} {steps[-1].label}?"


def is_held_out(question: str) -> bool:
    """Whether this question is kept from training."""
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT_SHARE == 0


def generate(
    seed: int, count: int, min_steps: int = MIN_STEPS, max_steps: int = MAX_STEPS
) -> list[ArithmeticQuestion]:
    """``count`` held-out questions with uniform numbers of steps in [min_steps, max_steps]."""
    rng = random.Random(seed)
    questions: list[ArithmeticQuestion] = []
    while len(questions) < count:
        steps = draw_steps(rng, rng.randint(min_steps, max_steps))
        text = render(steps)
        if is_held_out(text):
            name = f"arithmetic-{seed}-{len(questions)}"
            questions.append(ArithmeticQuestion(name, text, str(steps[-1].value), steps))
    return questions
