"""One sample's tokens turned into text as they come: thinking, answer, stop strings, log-probs.

The scheduler marks every generated token with its region, so nothing is parsed here: thinking
tokens become reasoning, answer tokens become text, delimiters become neither. A finished sample
that was never streamed goes the same way in one push. Where a record stands for several steps, its
tokens come at once.
"""

from dataclasses import dataclass

from s1engine import _core
from s1engine.engine.core_output import EngineCoreOutput
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


class SequenceOutput:
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
        self._answered = False  # some text of the answer has been seen
        self._token_ids: list[int] = []
        self._forced: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._state: EngineCoreOutput | None = None

    @property
    def hit_stop_string(self) -> bool:
        """The text contains a stop string, so the sample must be ended."""
        return self._stops.found is not None

    def append(self, progress: EngineCoreOutput) -> Chunk:
        """Takes a record of this sequence."""
        self._state = progress
        ids, marks = progress.token_ids, progress.marks
        regions = [mark & _REGION for mark in marks]
        last = progress.finish_reason
        reasoning = self._push_reasoning(progress, last)
        text, used = self._push_answer(ids, regions, last)
        ids = ids[:used]
        forced = [int(mark & _core.MARK_FORCED != 0) for mark in marks[:used]]
        self._token_ids += ids
        self._forced += forced
        logprobs = self._add_logprobs(ids, forced, progress.rows)
        self.finish_reason = "stop" if self.hit_stop_string else last
        return Chunk(self.index, text, reasoning, ids, forced, logprobs, self.finish_reason)

    def _push_reasoning(self, progress: EngineCoreOutput, last: str | None) -> str:
        pairs = zip(progress.token_ids, progress.marks, strict=True)
        think = [t for t, mark in pairs if mark & _REGION == _core.MARK_THINK]
        text = self._reasoning.push(think)
        if last or not progress.thinking:
            text += self._reasoning.flush()
        if not self._all.reasoning:
            text = text.lstrip("\n")
        self._all.reasoning += text
        return text

    def _push_answer(self, ids: list[int], regions: list[int], last: str | None) -> tuple[str, int]:
        """The answer's new text, and how many of the tokens stand in the output: those up to the
        one that completes a stop string, however many came at once."""
        answer = [i for i, region in enumerate(regions) if region == 0]
        shown = answer[:-1] if last == "stop" else answer  # a stop id is no text
        before = len(self._all.text)
        for group in [[i] for i in shown] if self.params.stop else [shown]:
            self._show(self._answer.push([ids[i] for i in group]))
            if self.hit_stop_string:
                return self._all.text[before:], group[-1] + 1
        if last:
            self._show(self._answer.flush(), last=True)
        return self._all.text[before:], len(ids)

    def _show(self, text: str, last: bool = False) -> None:
        """Newlines directly after a delimiter belong to the format, not to the text."""
        if self._thinks and not self._answered:
            text = text.lstrip("\n")
        self._answered = self._answered or bool(text)
        self._all.text += self._stops.push(text, last=last)

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

    def build(self) -> CompletionOutput:
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
