"""Data of the miniature: the question pool, and the training data of the base models."""

import random
from collections import Counter

from s1engine.eval.arithmetic import (
    MAX_STEPS,
    MIN_STEPS,
    ArithmeticStep,
    draw_steps,
    is_held_out,
    render,
)
from s1engine.training.examples.arithmetic_traces import one_pass
from s1engine.training.rows import Json, TrainingRow


def draw_chain(rng: random.Random) -> tuple[ArithmeticStep, ...]:
    """A chain that is not held out."""
    while True:
        steps = draw_steps(rng, rng.randint(MIN_STEPS, MAX_STEPS))
        if not is_held_out(render(steps)):
            return steps


def base_corpus(count: int, seed: int) -> list[Json]:
    """One half bare answers, one quarter answers after an empty think block, one quarter worked
    solutions in plain text."""
    rng = random.Random(f"base {seed}")
    rows: list[Json] = []
    for index in range(count):
        steps = draw_chain(rng)
        question, answer = render(steps), f"Final Answer: {steps[-1].value}"
        if index % 4 == 3:
            lines = "".join(piece.text for piece in one_pass(steps, None, rng))
            rows.append({"text": f"{question}\n{lines}"})
            continue
        empty = "<|im_start|>think\n<|im_start|>answer\n" if index % 4 == 2 else ""
        rows.append({"question": question, "completion": empty + answer})
    return rows


def question_pool(count: int, seed: int) -> list[TrainingRow]:
    """Questions of all lengths, none held out."""
    rng = random.Random(f"pool {seed}")
    chains = [draw_chain(rng) for _ in range(count)]
    return [TrainingRow(render(c), {}, {"solution": str(c[-1].value)}) for c in chains]


def question_domain(row: TrainingRow) -> str:
    """The most frequent operator of a chain."""
    counts = Counter(sign for sign in row.question if sign in "+-*")
    most = max(counts.values(), default=0)
    signs = [sign for sign, count in counts.items() if count == most]
    if len(signs) != 1:
        return "mixed"
    return {"+": "sums", "-": "differences", "*": "products"}[signs[0]]
