"""Choosing among questions: s1's draw, and the simpler ones that it is compared with.

s1 (Algorithm 1 of the paper) draws a domain, each as likely as another, and in it a question with
probability in proportion to 2^-rank, rank 0 being the longest trace. Everything follows from the
seed and the set of candidates, not from their order.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """A question that may be chosen."""

    id: str
    domain: str
    length: int
    """Of its trace, in tokens."""


Chooser = Callable[[Sequence[Option], int, int], list[str]]


def by_domain_and_length(
    options: Sequence[Option], count: int, seed: int, first: Sequence[str] = ()
) -> list[str]:
    """Ids of s1's draw: ``first`` and then draws until ``count`` are chosen, or none is left."""
    return _by_domain(options, count, seed, 2.0, first)


def by_domain(options: Sequence[Option], count: int, seed: int) -> list[str]:
    """A domain, each as likely, and any question of it (the paper's 1K-diverse)."""
    return _by_domain(options, count, seed, 1.0, ())


def longest(options: Sequence[Option], count: int, seed: int) -> list[str]:
    """The longest traces; the seed breaks ties (1K-longest)."""
    rng = random.Random(seed)
    shuffled = rng.sample(_sorted(options), len(options))
    return [option.id for option in sorted(shuffled, key=lambda option: -option.length)][:count]


def uniform(options: Sequence[Option], count: int, seed: int) -> list[str]:
    """Any (1K-random)."""
    chosen = random.Random(seed).sample(_sorted(options), min(count, len(options)))
    return [option.id for option in chosen]


def _sorted(options: Sequence[Option]) -> list[Option]:
    return sorted(options, key=lambda option: option.id)


def _by_domain(
    options: Sequence[Option], count: int, seed: int, base: float, first: Sequence[str]
) -> list[str]:
    rng = random.Random(seed)
    chosen = list(dict.fromkeys(first))[:count]
    taken = set(chosen)
    domains: dict[str, list[Option]] = {}
    for option in sorted(_sorted(options), key=lambda option: -option.length):
        if option.id not in taken:
            domains.setdefault(option.domain, []).append(option)
    names = sorted(domains)
    while names and len(chosen) < count:
        name = rng.choice(names)
        pool = domains[name]
        weights = [base**-rank for rank in range(len(pool))]
        chosen.append(pool.pop(rng.choices(range(len(pool)), weights)[0]).id)
        if not pool:
            names.remove(name)
    return chosen
