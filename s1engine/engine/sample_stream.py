"""One sample's tokens turned into text as they come: thinking, answer, stop strings, log-probs.

The scheduler marks every generated token with its region, so nothing is parsed here: thinking
tokens become reasoning, answer tokens become text, delimiters become neither. A finished sample
that was never streamed goes the same way in one push. Where a record stands for several steps, its
tokens come at once.
"""

from dataclasses import dataclass

from s1engine import _core
from s1engine.engine.progress import Progress
from s1engine.outputs import (
    Chunk,
    CompletionOutput,
    RowLogprobs,
    ThinkingUsage,
    TokenLogprob,
)
from s1engine.sampling_params import SamplingParams
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer

_REGION = _core.MARK_REGION


class StopFinder:
    """Finds the first stop string in growing text, and holds back what may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, last: bool = False) -> str:
        """Text that is safe to show; nothing after a stop string."""
        if self.found is not None or not self._stops:
            return text if self.found is None else ""
        text = self._held + text
        hits = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits:
            at, _, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = 0 if last else self._ambiguous(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _ambiguous(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for n in range(longest, 0, -1):
            if any(stop.startswith(text[len(text) - n :]) for stop in self._stops):
                return n
        return 0


@dataclass(slots=True)
class _Gathered:
    text: str = ""
    reasoning: str = ""


class SampleStream:
    """Grows with ``push`` until the sample is finished; then ``output`` is the whole."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        thinks: bool,
        logprobs: bool,
    ) -> None:
        self.index = index
        self.params = params
        self._wants_logprobs = logprobs
        self.finish_reason: str | None = None
        self._thinks = thinks
        self._reasoning = IncrementalDetokenizer(tokenizer)
        self._answer = IncrementalDetokenizer(tokenizer)
        self._stops = StopFinder(params.stop)
        self._all = _Gathered()
        self._token_ids: list[int] = []
        self._forced: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._state: Progress | None = None

    @property
    def hit_stop_string(self) -> bool:
        """The text contains a stop string, so the sample must be ended."""
        return self._stops.found is not None

    def push(self, progress: Progress) -> Chunk:
        """Takes a record of this sequence."""
        self._state = progress
        ids, marks = progress.token_ids, progress.marks
        forced = [int(mark & _core.MARK_FORCED != 0) for mark in marks]
        think = [t for t, m in zip(ids, marks, strict=True) if m & _REGION == _core.MARK_THINK]
        answer = [t for t, m in zip(ids, marks, strict=True) if m & _REGION == 0]
        self._token_ids += ids
        self._forced += forced
        logprobs = self._add_logprobs(ids, forced, progress.rows)
        last = progress.finish_reason
        reasoning = self._reasoning.push(think)
        if last or not progress.thinking:
            reasoning += self._reasoning.flush()
        text = self._answer.push(self._without_end(answer, last))
        text = self._strip(text + (self._answer.flush() if last else ""), self._all.text)
        text = self._stops.push(text, last=last is not None)
        self.finish_reason = "stop" if self.hit_stop_string else last
        reasoning = self._strip(reasoning, self._all.reasoning)
        self._all.text += text
        self._all.reasoning += reasoning
        return Chunk(self.index, text, reasoning, ids, forced, logprobs, self.finish_reason)

    def _strip(self, text: str, before: str) -> str:
        """Newlines directly after a delimiter belong to the format, not to the text."""
        return text.lstrip("\n") if self._thinks and not before else text

    def _without_end(self, answer: list[int], last: str | None) -> list[int]:
        """A stop id ends the text without being part of it."""
        return answer[:-1] if last == "stop" else answer

    def _add_logprobs(
        self, ids: list[int], forced: list[int], rows: list[RowLogprobs]
    ) -> list[TokenLogprob] | None:
        if not self._wants_logprobs:
            return None
        sampled = iter(rows)
        added = []
        for token, was_forced in zip(ids, forced, strict=True):
            if was_forced:
                added.append(TokenLogprob(token, 0.0, (), True))
            else:
                row = next(sampled)
                added.append(TokenLogprob(token, row.logprob, row.top, False))
        self._logprobs += added
        return added

    def output(self) -> CompletionOutput:
        """The finished sample."""
        assert self.finish_reason is not None
        return CompletionOutput(
            index=self.index,
            text=self._all.text,
            reasoning=self._all.reasoning if self._thinks else None,
            token_ids=self._token_ids,
            forced=self._forced,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason(),
            thinking=self._thinking(),
            logprobs=self._logprobs if self._wants_logprobs else None,
        )

    def _stop_reason(self) -> str | int | None:
        if self._stops.found is not None:
            return self._stops.found
        last = self._token_ids[-1] if self._token_ids else None
        ended = self.finish_reason == "stop" and last in self.params.stop_token_ids
        return last if ended else None

    def _thinking(self) -> ThinkingUsage | None:
        if not self._thinks:
            return None
        assert self._state is not None
        return ThinkingUsage(
            tokens=self._state.thinking_tokens,
            forced_tokens=sum(self._forced),
            waits_used=self._state.waits_used,
            end_reason=self._state.end_reason,
            budget=self._state.max_thinking,
        )
