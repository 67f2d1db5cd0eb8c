"""The output of one sequence, grown record by record: reasoning, answer, stop strings, logprobs.

The scheduler marks every generated token with its region, so nothing is parsed here: thinking
tokens become reasoning, answer tokens become text, delimiters become neither. Only a delimiter that
the model wrote in several tokens may have text of either around it (end_markers.py). The number of
records does not matter: a sequence that is not streamed arrives in one.
"""

from s1engine import _core
from s1engine.engine.answer_text import AnswerText
from s1engine.engine.core_output import EngineCoreOutput, HeldLogprobs
from s1engine.engine.end_markers import MarkerSplitter, WrittenMarker
from s1engine.engine.token_text import TokenText
from s1engine.outputs import (
    Chunk,
    CompletionOutput,
    FinishReason,
    RowLogprobs,
    ThinkingUsage,
    TokenLogprob,
)
from s1engine.reasoning import AnswerMarkers
from s1engine.sampling_params import SamplingParams
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer


class StopStringFinder:
    """Finds the first stop string in growing text, and holds back text that may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.match: str | None = None

    def push(self, text: str, last: bool = False, may_match: bool = True) -> str:
        """Returns the text that is safe to show; nothing after a stop string. ``may_match`` False:
        none ends within this text."""
        if self.match is not None or not self._stops:
            return text if self.match is None else ""
        text = self._held + text
        hits = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits and may_match:
            at, _, self.match = min(hits)
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


class SequenceOutput:
    """``append`` each record until ``finish_reason`` is set; then ``build`` the whole."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        thinks: bool,
        logprobs: bool,
        end_markers: tuple[str, ...] = (),
        hidden: AnswerMarkers | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.num_received = 0  # tokens of all records
        self._index = index
        self._params = params
        self._thinks = thinks
        self._splitter = MarkerSplitter(end_markers, tokenizer) if end_markers else None
        self._held_logprobs = HeldLogprobs()
        self._reasoning_decoder = IncrementalDetokenizer(tokenizer)
        self._answer = AnswerText(tokenizer, hidden)
        self._stop_strings = StopStringFinder(tuple(params.stop))
        self._text = ""
        self._reasoning = ""
        self._answer_began = False  # with a character that is not a leading newline
        self._token_ids: list[int] = []
        self._forced: list[int] = []
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self._places: dict[int, tuple[bool, bool]] = {}  # of answer tokens: thinking, marker
        self._text_bytes = TokenText(tokenizer) if logprobs else None
        self._last: EngineCoreOutput | None = None

    def append(self, output: EngineCoreOutput) -> Chunk:
        """Appends a record of this sequence."""
        self._last = output
        marker = None
        if self._splitter is not None:
            marker = self._splitter.find(output.token_ids, output.marks)
        before = len(self._reasoning)
        self._append_reasoning(output, None if marker is None else marker[0])
        text, used = self._append_answer(output, marker)
        reasoning = self._reasoning[before:]
        ids = output.token_ids[:used]
        forced = [int(mark & _core.MARK_FORCED != 0) for mark in output.marks[:used]]
        self._token_ids += ids
        self._forced += forced
        logprobs = self._append_logprobs(ids, forced, output)
        self.num_received += len(output.token_ids)
        stopped = self._stop_strings.match is not None
        self.finish_reason = "stop" if stopped else output.finish_reason
        return Chunk(self._index, text, reasoning, ids, forced, logprobs, self.finish_reason)

    def _append_reasoning(self, output: EngineCoreOutput, marker: WrittenMarker | None) -> None:
        pairs = zip(output.token_ids, output.marks, strict=True)
        ids = [t for t, mark in pairs if mark & _core.MARK_REGION == _core.MARK_THINK]
        text = self._reasoning_decoder.push(ids)
        if marker is not None:
            text += marker.text_before(self._reasoning_decoder)
        if output.finish_reason or not output.thinking:
            text += self._reasoning_decoder.flush()
        if not self._reasoning:
            text = text.lstrip("\n")
        self._reasoning += text

    def _append_answer(
        self, output: EngineCoreOutput, marker: tuple[WrittenMarker, int] | None
    ) -> tuple[str, int]:
        """The new text of the answer, and the number of tokens that belong to the output: those up
        to the one that completes a stop string, however many arrived at once."""
        ids = output.token_ids
        answer = [i for i, mark in enumerate(output.marks) if mark & _core.MARK_REGION == 0]
        if output.finish_reason == "stop":
            answer = answer[:-1]  # a stop id has no text
        before = len(self._text)
        # A grammar describes the answer from the next token on.
        if marker is not None and self._params.grammar is None:
            text = marker[0].text_after(self._answer.decoder)
            self._append_parts(*self._answer.push_text(text), may_match=self._may_stop(marker[1]))
            if self._stop_strings.match is not None:
                return self._text[before:], marker[1] + 1
        one_by_one = self._params.stop or self._logprobs is not None
        for group in [[i] for i in answer] if one_by_one else [answer]:
            may_match = not group or self._may_stop(group[-1])
            self._append_parts(*self._answer.push([ids[i] for i in group]), may_match=may_match)
            if self._logprobs is not None:
                self._places[group[-1]] = self._answer.thinking, self._answer.completed
            if self._stop_strings.match is not None:
                return self._text[before:], group[-1] + 1
        if output.finish_reason:
            rest = self._answer.flush(output.finish_reason == "stop")
            self._append_parts(*rest, last=True, may_match=self._may_stop(len(ids) - 1))
        return self._text[before:], len(ids)

    def _may_stop(self, index: int) -> bool:
        """May the token with this index in the present record complete a stop string?"""
        return self.num_received + index >= self._params.min_tokens

    def _append_parts(
        self, text: str, reasoning: str, *, last: bool = False, may_match: bool
    ) -> None:
        """``reasoning``: thinking that the model wrote after its first thinking had ended."""
        self._reasoning += reasoning if self._reasoning else reasoning.lstrip("\n")
        self._append_text(text, last=last, may_match=may_match)

    def _append_text(self, text: str, *, last: bool = False, may_match: bool) -> None:
        """Newlines directly after a delimiter belong to the format, not to the text."""
        if (self._thinks or self._reasoning) and not self._answer_began:
            text = text.lstrip("\n")
        self._answer_began = self._answer_began or bool(text)
        self._text += self._stop_strings.push(text, last=last, may_match=may_match)

    def _append_logprobs(
        self, ids: list[int], forced: list[int], output: EngineCoreOutput
    ) -> list[TokenLogprob] | None:
        if self._logprobs is None:
            return None
        assert self._text_bytes is not None
        sampled = iter(self._held_logprobs.settle(output))
        added = []
        for i, (token, was_forced) in enumerate(zip(ids, forced, strict=True)):
            row = RowLogprobs(0.0, ()) if was_forced else next(sampled)
            thinking, shown = self._place(i, token, output.marks[i] & _core.MARK_REGION)
            added.append(
                TokenLogprob(token, row.logprob, row.top, bool(was_forced), thinking, shown)
            )
        self._places.clear()
        self._logprobs += added
        return added

    def _place(self, index: int, token: int, region: int) -> tuple[bool, bytes]:
        """Does a token of the present record belong to the thinking, and what does it show?"""
        assert self._text_bytes is not None
        if region == _core.MARK_DELIMITER:
            return True, b""
        if region == _core.MARK_THINK:
            return True, self._text_bytes.push(token, thinking=True, strips=True)
        thinking, marker = self._places.get(index, (False, True))  # missing: an end
        strips = self._thinks or self._text_bytes.has_thinking
        shown = b"" if marker else self._text_bytes.push(token, thinking, strips or thinking)
        return thinking, shown

    def build(self) -> CompletionOutput:
        """The finished sequence."""
        assert self.finish_reason is not None
        return CompletionOutput(
            index=self._index,
            text=self._text,
            reasoning=self._reasoning if self._thinks or self._reasoning else None,
            token_ids=self._token_ids,
            forced=self._forced,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason(),
            thinking=self._thinking_usage(),
            logprobs=self._logprobs,
            self_opened_tokens=0 if self._thinks else self._answer.num_thinking,
        )

    def _stop_reason(self) -> str | int | None:
        if self._stop_strings.match is not None:
            return self._stop_strings.match
        last = self._token_ids[-1] if self._token_ids else None
        ended = self.finish_reason == "stop" and last in self._params.stop_token_ids
        return last if ended else None

    def _thinking_usage(self) -> ThinkingUsage | None:
        if not self._thinks:
            return None
        assert self._last is not None
        return ThinkingUsage(
            tokens=self._last.thinking_tokens,
            forced_tokens=sum(self._forced),
            waits_used=self._last.waits_used,
            end_reason=self._last.end_reason,
            # What ends the thinking early lowers the maximum below what was thought already.
            budget=max(self._last.max_thinking, self._last.thinking_tokens),
        )
