"""Requests that are read where they are computed: all of them, or those whose own text decides.

A stop string ends a sequence, an answer that follows a grammar limits what comes next, and answers
at checkpoints that agree end the thinking: such requests are read here step by step, whoever else
makes text of them for the user.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from s1engine import _core
from s1engine.engine.core_output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    branch_number,
    decode_core_outputs,
)
from s1engine.engine.grammar import GrammarMatcher
from s1engine.engine.live_request import LiveRequest, LiveSequence
from s1engine.engine.request import Request
from s1engine.engine.request_output import RequestOutputBuilder, StreamEvent
from s1engine.errors import RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.tokenizer import Tokenizer

RequestEvent = tuple[str, StreamEvent | RequestFailedError]


class OutputProcessor:
    """The readers of one engine.

    Args:
        samples: live ones, by sequence.
        fail: told of a request that cannot be read, and why; the others go on.
        detokenize: read every request, and keep its events.
    """

    def __init__(
        self,
        scheduler: _core.Scheduler,
        samples: Mapping[int, LiveSequence],
        tokenizer: Tokenizer,
        fail: Callable[[LiveRequest, Exception], None],
        *,
        detokenize: bool,
    ) -> None:
        self._scheduler = scheduler
        self._samples = samples
        self._tokenizer = tokenizer
        self._fail = fail
        self._detokenize = detokenize
        self._num_open = 0
        self._guided: dict[int, LiveSequence] = {}  # samples with a grammar, by sequence
        self._events: list[RequestEvent] = []

    def add_request(self, request: Request) -> RequestOutputBuilder | None:
        """A reader for a request, if it has to be read here."""
        if not (self._detokenize or request.needs_output_processing):
            return None
        self._num_open += 1
        return RequestOutputBuilder(request, self._tokenizer)

    def add_sequence(self, sample: LiveSequence) -> None:
        """A sample begins."""
        if sample.live_request.matcher is not None:
            sample.matcher = sample.live_request.matcher.result().copy()
            self._guided[sample.seq_id] = sample

    def remove_request(self, live: LiveRequest) -> None:
        """A request is over."""
        self._num_open -= live.output_builder is not None
        for sample in live.all_sequences():
            self._guided.pop(sample.seq_id, None)

    def collect_events(self) -> list[RequestEvent]:
        """What has been read since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def has_grammar(self) -> bool:
        """Is there an answer that follows a grammar, or will be once its thinking ends?"""
        return bool(self._guided)

    def grammar_masks(self) -> dict[int, NDArray[np.bool_]]:
        """By req_index, what the answers may go on with that follow a grammar."""
        found = {}
        for sample in self._guided.values():
            if sample.matcher and sample.answering and not sample.finished:
                try:
                    found[self._scheduler.req_index(sample.seq_id)] = sample.matcher.mask()
                except Exception as error:
                    self._fail(sample.live_request, error)
        return found

    def process(self, step: EngineCoreOutputs) -> list[int]:
        """Reads a step. Returns the sequences that a stop string ended."""
        stopped: list[int] = []
        for progress in step.decode() if self._num_open else ():
            sample = self._samples[progress.seq_id]
            reader = sample.live_request.output_builder
            if reader is None:
                continue
            try:
                if self._process_one(reader, sample, progress, step.end_time):
                    stopped.append(sample.seq_id)
            except Exception as error:
                self._fail(sample.live_request, error)
        return stopped

    def _process_one(
        self,
        reader: RequestOutputBuilder,
        sample: LiveSequence,
        progress: EngineCoreOutput,
        now: float,
    ) -> bool:
        """Reads one record. Did its text end the sequence?"""
        events = reader.add(progress, now)
        if self._detokenize:
            self._events += [(reader.request.request_id, event) for event in events]
        if sample.matcher is not None:
            self._advance_matcher(sample, sample.matcher, progress)
        stopped = bool(reader.sequence_output(sample.seq_id).finish_reason) and not sample.finished
        if stopped:
            self._scheduler.finish(sample.seq_id, _core.FinishReason.STOP)
            sample.finished = True
        if sample.finished:
            self._exit_early(reader, sample)
        return stopped

    def _advance_matcher(
        self, sample: LiveSequence, guide: GrammarMatcher, progress: EngineCoreOutput
    ) -> None:
        """Moves a guide on by what the sequence sampled as its answer (mark 0)."""
        sample.answering = not progress.thinking
        if not sample.finished:
            pairs = zip(progress.token_ids, progress.marks, strict=True)
            guide.advance([token for token, mark in pairs if mark == 0])

    def _exit_early(self, reader: RequestOutputBuilder, sample: LiveSequence) -> None:
        """If the checkpoints of a sample agree for long enough, it has thought enough."""
        budget = reader.request.params.thinking
        if budget is None or budget.early_exit is None or not branch_number(sample.seq_id):
            return
        if reader.checkpoints_agree(sample.seq_id, budget.early_exit):
            parent = sample.seq_id - branch_number(sample.seq_id)
            self._scheduler.limit_thinking(parent, budget.min_tokens, _core.EndReason.CONVERGED)

    def partial_output(self, live: LiveRequest, now: float) -> RequestOutput | None:
        """What an aborted request has; None if it is not read here."""
        if live.output_builder is None:
            return None
        for sample in live.all_sequences():
            if not sample.finished:
                for progress in decode_core_outputs(self._scheduler.collect_output(sample.seq_id)):
                    live.output_builder.add(progress, now)
        return live.output_builder.build(now)
