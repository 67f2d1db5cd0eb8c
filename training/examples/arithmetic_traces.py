"""Training samples for s1-nano: questions of s1engine.eval.arithmetic with written-out thinking.

A pass computes the chain line by line (``b=3+4=7``). After a pass the thinking either ends or
continues with "Wait" and a check: another pass over the question. Three choices teach the model
what budget forcing does:

- Some samples are cut at a random token of the thinking, like a used-up budget.
- Most "Wait"s carry no loss. They represent injected ones: the model learns to continue after them
  without learning to write them. A few carry loss, so some traces check themselves.
- Before a check, a step may hold a wrong value. It carries no loss, so the model does not learn to
  err, and the rest of the pass follows from it. The check computes from the question and is right.
"""

import random
from dataclasses import dataclass

from s1engine.eval.arithmetic import OPERATORS, ArithmeticStep, is_held_out, render

CUT_SHARE = 0.12
SYSTEM_SHARE = 0.05
NATURAL_CHECK_SHARE = 0.2
CORRUPT_SHARE = 0.5
CHECKS = ((0, 50), (1, 25), (2, 14), (3, 6), (4, 3), (5, 1), (6, 1))  # number, weight
TOKENS_PER_STEP = 8
MAX_THINKING = 640

SYSTEM = "<|im_start|>system\nYou are a careful calculator.<|im_end|>\n"
CHECK = ", check.\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive text of a sample, with or without loss."""

    text: str
    loss: bool = True


@dataclass(frozen=True, slots=True)
class ChatSample:
    """A chat with its thinking, as pieces to tokenize."""

    pieces: tuple[Piece, ...]
    cut: bool  # ``nano.tokenize`` cuts the thinking at a random token
    thinking: slice  # the pieces between the delimiters


def draw_sample(
    rng: random.Random, steps: tuple[ArithmeticStep, ...], max_checks: int = 0
) -> ChatSample:
    """A training sample of a question that is not held out; ``max_checks`` as
    NanoRecipe.checks."""
    question = render(steps)
    assert not is_held_out(question)
    system = SYSTEM if rng.random() < SYSTEM_SHARE else ""
    head = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    cut = rng.random() < CUT_SHARE
    checks = 0 if cut else _draw_number_of_checks(rng, len(steps), max_checks)
    thinking = _draw_thinking(rng, steps, checks)
    answer = f"<|im_start|>answer\nFinal Answer: {steps[-1].value}<|im_end|>\n"
    pieces = (Piece(head, False), Piece("<|im_start|>think"), *thinking, Piece(answer))
    return ChatSample(pieces, cut, slice(2, 2 + len(thinking)))


def _draw_number_of_checks(rng: random.Random, num_steps: int, max_checks: int) -> int:
    if max_checks:
        return rng.randint(0, max_checks)
    numbers, weights = zip(*CHECKS, strict=True)
    limit = max(MAX_THINKING // (TOKENS_PER_STEP * num_steps) - 1, 1)
    return min(int(rng.choices(numbers, weights)[0]), limit)


def _draw_thinking(
    rng: random.Random, steps: tuple[ArithmeticStep, ...], checks: int
) -> list[Piece]:
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
    """The lines of a pass. Step ``corrupt`` gets a wrong value; the rest follows from it."""
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
