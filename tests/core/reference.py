"""s1's budget forcing over full token lists: slow, obvious, and the oracle of the scheduler.

Thinking ends when the model writes an end or the budget is used up. The wait text replaces an
ignored end. Nothing is cached or incremental: markers of several tokens are searched in the text of
all tokens. ``model(ids)`` returns all token ids, likeliest first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Model = Callable[[list[int]], Sequence[int]]


@dataclass(frozen=True)
class Format:
    """Token ids of a reasoning format; ``newlines`` are the ids whose text ends in a newline.
    ``markers`` end the thinking as well; they are bytes of several tokens' texts."""

    triggers: frozenset[int]
    natural_end: tuple[int, ...]
    newline: tuple[int, ...]
    newline_always: bool
    newlines: frozenset[int]
    markers: tuple[bytes, ...] = ()
    token_bytes: tuple[bytes, ...] = ()
    after_marker: tuple[int, ...] = ()

    def num_held(self, sampled: list[int]) -> int:
        """How many of the last tokens hold the longest end of the text that begins a marker."""
        text = b"".join(self.token_bytes[t] for t in self._unbroken(sampled))
        ends = (text[i:] for i in range(len(text)))
        begun = next(
            (e for e in ends if any(m.startswith(e) and m != e for m in self.markers)), b""
        )
        return self._overlap(sampled, len(begun))

    def num_ending(self, sampled: list[int], token: int) -> int | None:
        """How many of the tokens before ``token`` hold part of the marker that it completes; None
        if it completes none. The first marker that is complete counts, the longest if several
        are."""
        if not self.markers:
            return None
        before = b"".join(self.token_bytes[t] for t in self._unbroken(sampled))
        text = before + self.token_bytes[token]
        for end in range(len(before) + 1, len(text) + 1):
            complete = [m for m in self.markers if text[:end].endswith(m)]
            if complete:
                begin = end - max(map(len, complete))
                return self._overlap(sampled, max(len(before) - begin, 0))
        return None

    def _unbroken(self, sampled: list[int]) -> list[int]:
        """The last tokens that all have a text."""
        if not self.markers:
            return []
        broken = [i + 1 for i, token in enumerate(sampled) if not self.token_bytes[token]]
        return sampled[max(broken, default=0) :]

    def _overlap(self, sampled: list[int], num_bytes: int) -> int:
        count = 0
        while num_bytes > 0:
            count += 1
            num_bytes -= len(self.token_bytes[sampled[-count]])
        return count


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
    waits, ban, begin = 0, False, 0  # ``begin``: of the tokens since the last forced phrase

    def force(phrase: tuple[int, ...]) -> None:
        tokens.extend(phrase)
        forced.extend([1] * len(phrase))

    def drop(count: int) -> None:
        del tokens[len(tokens) - count :], forced[len(forced) - count :]

    while True:
        held = fmt.num_held(tokens[begin:])
        thinking = prompt_thinking + len(tokens) - held
        if thinking + held >= budget.max_thinking:
            kept = min(max(min(budget.min_thinking, budget.max_thinking) - thinking, 0), held)
            drop(held - kept)
            last = (prompt + tokens)[-1]
            if fmt.newline_always or last not in fmt.newlines:
                force(fmt.newline)
            force(budget.forced_end)
            return Result(tokens, forced, thinking + kept, waits, "BUDGET")
        suppress = not budget.wait and thinking < budget.min_thinking
        token = next(
            t
            for t in model(prompt + tokens)
            if not (suppress or ban)
            or (t not in fmt.triggers and fmt.num_ending(tokens[begin:], t) is None)
        )
        ending = held if token in fmt.triggers else fmt.num_ending(tokens[begin:], token)
        if ending is None:
            tokens.append(token)
            forced.append(0)
            ban = ban and fmt.num_held(tokens[begin:]) > held
            continue
        thinking = prompt_thinking + len(tokens) - ending
        if thinking < budget.min_thinking or waits < budget.num_waits:
            if thinking + len(budget.wait) < budget.max_thinking:
                waits, ban = waits + 1, True
                if budget.wait:
                    drop(ending)
                    force(budget.wait)
                    begin = len(tokens)
                continue
            if thinking < budget.min_thinking:
                ban = True
                continue
        if token in fmt.triggers:
            drop(ending)
            force(fmt.natural_end)
        else:
            tokens.append(token)
            forced.append(0)
            force(fmt.after_marker)
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
