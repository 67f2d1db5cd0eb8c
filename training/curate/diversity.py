"""Selection among questions: s1's draw, and the simpler ones that it is compared with.

s1 (Algorithm 1 of the paper) draws a domain uniformly, and in it a question with probability
proportional to 2^-rank, rank 0 being the longest trace. A selection depends on the seed and the set
of candidates, not on their order.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SelectableQuestion:
    """A question as the draw sees it."""

    id: str
    domain: str
    length: int
    """Of its trace, in tokens."""


def by_domain_and_length(
    questions: Sequence[SelectableQuestion], count: int, seed: int, first: Sequence[str] = ()
) -> list[str]:
    """Ids of s1's draw: ``first``, then draws until ``count`` are selected or none is left."""
    return _draw_by_domain(questions, count, seed, 2.0, first)


def by_domain(questions: Sequence[SelectableQuestion], count: int, seed: int) -> list[str]:
    """Draws a domain, then a question of it, both uniformly (the paper's 1K-diverse)."""
    return _draw_by_domain(questions, count, seed, 1.0, ())


def longest(questions: Sequence[SelectableQuestion], count: int, seed: int) -> list[str]:
    """The longest traces; the seed breaks ties (1K-longest)."""
    rng = random.Random(seed)
    shuffled = rng.sample(_sorted(questions), len(questions))
    return [question.id for question in sorted(shuffled, key=lambda one: -one.length)][:count]


def uniform(questions: Sequence[SelectableQuestion], count: int, seed: int) -> list[str]:
    """A uniform draw (1K-random)."""
    chosen = random.Random(seed).sample(_sorted(questions), min(count, len(questions)))
    return [question.id for question in chosen]


def _sorted(questions: Sequence[SelectableQuestion]) -> list[SelectableQuestion]:
    return sorted(questions, key=lambda question: question.id)


def _draw_by_domain(
    questions: Sequence[SelectableQuestion],
    count: int,
    seed: int,
    base: float,
    first: Sequence[str],
) -> list[str]:
    rng = random.Random(seed)
    chosen = list(dict.fromkeys(first))[:count]
    excluded = set(chosen)
    domains: dict[str, list[SelectableQuestion]] = {}
    for question in sorted(_sorted(questions), key=lambda question: -question.length):
        if question.id not in excluded:
            domains.setdefault(question.domain, []).append(question)
    names = sorted(domains)
    while names and len(chosen) < count:
        name = rng.choice(names)
        pool = domains[name]
        weights = [base**-rank for rank in range(len(pool))]
        chosen.append(pool.pop(rng.choices(range(len(pool)), weights)[0]).id)
        if not pool:
            names.remove(name)
    return chosen
