"""How long steps take by their number of tokens, so that drafts are made only where they pay.

Measured when an engine starts, on its own machine: a table would be out of date with the next
kernel. Attention over long contexts is left out; drafted tokens read it once together.
"""

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

REPEATS = 3  # the fastest counts
ENOUGH = 0.95  # cost of a token against one at half the size, from which larger steps gain nothing


def profile_steps(
    dummy_run: Callable[[int], Callable[[], None]], max_tokens: int
) -> list[tuple[int, float]]:
    """Points (tokens, seconds), ascending in both, up to ``max_tokens`` or to where twice the
    tokens take about twice as long.

    Args:
        dummy_run: prepares a step of so many tokens; the step returns when it is done.
    """
    seconds: dict[int, float] = {}
    for tokens in _sizes(max_tokens):
        seconds[tokens] = _fastest(dummy_run(tokens))
        if tokens // 2 in seconds and seconds[tokens] > 2 * ENOUGH * seconds[tokens // 2]:
            break
    # Other work on the machine makes steps slower, never faster, so no step takes longer than a
    # larger one.
    bounded = accumulate(reversed(seconds.values()), min)
    return list(zip(seconds, reversed(list(bounded)), strict=True))


def _sizes(largest: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to ``largest``."""
    size = 1
    while size <= largest:
        yield size
        if size > 1 and size * 3 // 2 <= largest:
            yield size * 3 // 2
        size *= 2


def _fastest(step: Callable[[], None]) -> float:
    step()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return min(times)
