"""s1's budget forcing over full token lists: slow, obvious, and the oracle of the scheduler.

Thinking is generated in rounds, as in s1: a round ends when the model writes an end or the budget
is used up. The wait text replaces an ignored end, and the next round begins. Nothing is cached or
incremental. ``model(ids)`` returns all token ids, likeliest first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Model = Callable[[list[int]], Sequence[int]]


@dataclass(frozen=True)
class Format:
    """Token ids of a reasoning format; ``newlines`` are the ids whose text ends in a newline."""

    triggers: frozenset[int]
    natural_end: tuple[int, ...]
    newline: tuple[int, ...]
    newline_always: bool
    newlines: frozenset[int]


@dataclass(frozen=True)
class Budget:
    """Limits on thinking; ``max_thinking`` and ``min_thinking`` in tokens."""

    max_thinking: int
    min_thinking: int
    num_waits: int
    wait: tuple[int, ...]
    forced_end: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """The expected sequence."""

    token_ids: list[int]  # all generated, forced ones included
    forced: list[int]
    thinking_tokens: int
    waits_used: int
    end_reason: str


def think(
    model: Model, prompt: list[int], fmt: Format, budget: Budget, prompt_thinking: int = 0
) -> Result:
    """Thinking and its end; ``prompt_thinking`` thinking tokens are in the prompt already."""
    tokens: list[int] = []
    forced: list[int] = []
    waits, ban_first = 0, False

    def count() -> int:
        return prompt_thinking + len(tokens)

    def force(phrase: tuple[int, ...]) -> None:
        tokens.extend(phrase)
        forced.extend([1] * len(phrase))

    while True:
        ended = False
        first = True
        while count() < budget.max_thinking and not ended:
            suppress = not budget.wait and count() < budget.min_thinking
            banned = fmt.triggers if suppress or (ban_first and first) else frozenset()
            token = next(t for t in model(prompt + tokens) if t not in banned)
            ended = token in fmt.triggers
            if not ended:
                tokens.append(token)
                forced.append(0)
            first = False
        thinking = count()
        if not ended:
            last = (prompt + tokens)[-1]
            if fmt.newline_always or last not in fmt.newlines:
                force(fmt.newline)
            force(budget.forced_end)
            return Result(tokens, forced, thinking, waits, "BUDGET")
        ban_first = True
        if thinking < budget.min_thinking or waits < budget.num_waits:
            if thinking + len(budget.wait) < budget.max_thinking:
                force(budget.wait)
                waits += 1
                continue
            if thinking < budget.min_thinking:
                continue
        force(fmt.natural_end)
        return Result(tokens, forced, thinking, waits, "NATURAL")


def answer(
    model: Model, prompt: list[int], stops: frozenset[int], max_new: int
) -> tuple[list[int], str]:
    """Greedy generation up to a stop token, which is kept, or ``max_new`` tokens."""
    tokens: list[int] = []
    while len(tokens) < max_new:
        tokens.append(model(prompt + tokens)[0])
        if tokens[-1] in stops:
            return tokens, "STOP"
    return tokens, "LENGTH"
