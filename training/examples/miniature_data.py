"""The miniature's data: questions to choose from, and what a base model is made with."""

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
from s1engine.training import rows
from s1engine.training.examples.arithmetic_traces import one_pass


def chain(rng: random.Random) -> tuple[ArithmeticStep, ...]:
    """A chain that is not held out."""
    while True:
        steps = draw_steps(rng, rng.randint(MIN_STEPS, MAX_STEPS))
        if not is_held_out(render(steps)):
            return steps


def base_corpus(count: int, seed: int) -> list[rows.Json]:
    """Half bare answers, a quarter of answers after an empty think block, a quarter of worked
    solutions in plain text."""
    rng = random.Random(f"base {seed}")
    found: list[rows.Json] = []
    for index in range(count):
        steps = chain(rng)
        question, answer = render(steps), f"Final Answer: {steps[-1].value}"
        if index % 4 == 3:
            lines = "".join(piece.text for piece in one_pass(steps, None, rng))
            found.append({"text": f"{question}\n{lines}"})
            continue
        empty = "<|im_start|>think\n<|im_start|>answer\n" if index % 4 == 2 else ""
        found.append({"question": question, "completion": empty + answer})
    return found


def pool(count: int, seed: int) -> list[rows.Row]:
    """Questions of all lengths, none held out."""
    rng = random.Random(f"pool {seed}")
    chains = [chain(rng) for _ in range(count)]
    return [rows.Row(render(c), {}, {"solution": str(c[-1].value)}) for c in chains]


def domain(row: rows.Row) -> str:
    """The operator that a chain has most of."""
    counts = Counter(sign for sign in row.question if sign in "+-*")
    most = max(counts.values(), default=0)
    first = [sign for sign, count in counts.items() if count == most]
    return {"+": "sums", "-": "differences", "*": "products"}[first[0]] if len(first) == 1 \
        else "mixed"  # fmt: skip
