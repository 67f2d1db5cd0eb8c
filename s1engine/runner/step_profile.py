"""What a step takes by the number of its tokens, so that drafts are made where they pay.

Measured on the machine that runs, when it begins to: a table would be out of date with the next
kernel. Attention over long contexts is not in it, of which drafted tokens share what is read.
"""

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

REPEATS = 3  # the fastest counts
ENOUGH = 0.95  # a token that costs so much of one at half the size: larger steps gain nothing


def profile_steps(
    dummy_run: Callable[[int], Callable[[], None]], max_tokens: int
) -> list[tuple[int, float]]:
    """Points (tokens, seconds), ascending in both, up to ``max_tokens`` or to where tokens cost
    what they cost.

    Args:
        dummy_run: prepares a step of so many tokens, which returns when it is done.
    """
    seconds: dict[int, float] = {}
    for tokens in _sizes(max_tokens):
        seconds[tokens] = _fastest(dummy_run(tokens))
        if tokens // 2 in seconds and seconds[tokens] > 2 * ENOUGH * seconds[tokens // 2]:
            break
    # Whatever else the machine does makes steps slower, never faster: a step takes at most what a
    # larger one takes.
    least = accumulate(reversed(seconds.values()), min)
    return list(zip(seconds, reversed(list(least)), strict=True))


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to ``most``."""
    size = 1
    while size <= most:
        yield size
        if size > 1 and size * 3 // 2 <= most:
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
