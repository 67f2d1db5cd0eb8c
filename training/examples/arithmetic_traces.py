"""Training samples for s1-nano: questions of s1engine.eval.arithmetic with written-out thinking.

A pass computes the chain line by line (``b=3+4=7``). After a pass the thinking either ends or goes
on with "Wait" and a check, which is another pass over the question. Three things make budget
forcing known territory for the model:

- some samples are cut at a random token of the thinking, as a used-up budget does;
- most "Wait"s carry no loss: they stand for ones that the engine injects, so the model learns to go
  on after them without learning to write them; a few do, so traces sometimes check themselves;
- before a check, a step may hold a wrong value. It carries no loss, so the model does not learn to
  err, and everything after it follows from it; the check computes from the question and ends right.
"""

import random
from dataclasses import dataclass

from s1engine.eval.arithmetic import OPERATORS, ArithmeticStep, is_held_out, render

CUT_SHARE = 0.12
SYSTEM_SHARE = 0.05
NATURAL_CHECK_SHARE = 0.2
CORRUPT_SHARE = 0.5
CHECKS = ((0, 50), (1, 25), (2, 14), (3, 6), (4, 3), (5, 1), (6, 1))  # number, weight
TOKENS_A_STEP = 8
MAX_THINKING = 640

SYSTEM = "<|im_start|>system\nYou are a careful calculator.<|im_end|>\n"
CHECK = ", check.\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text of a sample; ``loss`` tells whether the model is trained to write it."""

    text: str
    loss: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat with its thinking, ready to be tokenised piece by piece."""

    pieces: tuple[Piece, ...]
    cut: bool  # the thinking may be cut anywhere: see nano.py
    thinking: slice  # the pieces between the delimiters


def sample(rng: random.Random, steps: tuple[ArithmeticStep, ...], most_checks: int = 0) -> Sample:
    """One training sample on a question that is not held out; ``most_checks`` as Recipe.checks."""
    question = render(steps)
    assert not is_held_out(question)
    system = SYSTEM if rng.random() < SYSTEM_SHARE else ""
    head = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    cut = rng.random() < CUT_SHARE
    checks = 0 if cut else _number_of_checks(rng, len(steps), most_checks)
    thinking = _thinking(rng, steps, checks)
    answer = f"<|im_start|>answer\nFinal Answer: {steps[-1].value}<|im_end|>\n"
    pieces = (Piece(head, False), Piece("<|im_start|>think"), *thinking, Piece(answer))
    return Sample(pieces, cut, slice(2, 2 + len(thinking)))


def _number_of_checks(rng: random.Random, steps: int, most_checks: int) -> int:
    if most_checks:
        return rng.randint(0, most_checks)
    numbers, weights = zip(*CHECKS, strict=True)
    room = max(MAX_THINKING // (TOKENS_A_STEP * steps) - 1, 1)
    return min(int(rng.choices(numbers, weights)[0]), room)


def _thinking(rng: random.Random, steps: tuple[ArithmeticStep, ...], checks: int) -> list[Piece]:
    pieces = [Piece("\n")]
    natural = rng.random() < NATURAL_CHECK_SHARE
    for check in range(checks + 1):
        if check:
            pieces += [Piece("Wait", loss=natural and check == 1), Piece(CHECK)]
        wrong = rng.random() < CORRUPT_SHARE and check < checks
        pieces += one_pass(steps, rng.randrange(len(steps)) if wrong else None, rng)
    return pieces


def one_pass(
    steps: tuple[ArithmeticStep, ...], corrupt: int | None, rng: random.Random
) -> list[Piece]:
    """The lines of a pass; step ``corrupt`` gets a wrong value, from which the rest follows."""
    pieces: list[Piece] = []
    value = 0
    for i, step in enumerate(steps):
        if i == 0:
            shown = f"{step.label}="
            value = step.operand
        else:
            shown = f"{step.label}={value}{step.op}{step.operand}="
            value = OPERATORS[step.op](value, step.operand) % 10
        if i == corrupt:
            value = (value + rng.randint(1, 9)) % 10
        pieces += [Piece(shown), Piece(str(value), loss=i != corrupt), Piece("\n")]
    return pieces
