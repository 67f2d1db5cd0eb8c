"""Processes core outputs in the engine's own process: for every request, or only where it must.

It must where the output of a request decides how the request goes on: a stop string ends its
sequence, a grammar limits the next token, agreeing checkpoints end the thinking. Otherwise another
process may build the output (ProcessEngineClient).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from s1engine import _core
from s1engine.engine.core_output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    branch_number,
    decode_core_outputs,
    request_number,
)
from s1engine.engine.live_request import LiveRequest, LiveSequence
from s1engine.engine.mask_threads import MaskJob, MaskThreads, wait_for_masks
from s1engine.engine.request import Request
from s1engine.engine.request_output import RequestOutputBuilder, StreamEvent
from s1engine.errors import RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.tokenizer import Tokenizer

RequestEvent = tuple[str, StreamEvent | RequestFailedError]  # with the id of its request


@dataclass(slots=True)
class GrammarMasks:
    """What grammars allow in one step."""

    allowed: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """By req_index, a bitmask of the tokens that may come next."""
    undecided: set[int] = field(default_factory=set)
    """req_index of rows whose mask is not known in time: their sample does not count."""


NO_GRAMMAR = GrammarMasks()


class OutputProcessor:
    """Outputs and grammar matchers of the live requests of one engine.

    Args:
        sequences: live ones by id.
        fail: called with a request whose output cannot be processed, and the error.
        detokenize: process every request, and collect its events.
    """

    def __init__(
        self,
        scheduler: _core.Scheduler,
        sequences: Mapping[int, LiveSequence],
        tokenizer: Tokenizer,
        fail: Callable[[LiveRequest, Exception], None],
        *,
        detokenize: bool,
    ) -> None:
        self._scheduler = scheduler
        self._sequences = sequences
        self._tokenizer = tokenizer
        self._fail = fail
        self._detokenize = detokenize
        self._builders: dict[int, RequestOutputBuilder] = {}  # by number of the request
        self._with_grammar: dict[int, LiveSequence] = {}  # by id
        self._processed: set[int] = set()  # ids of sequences with a builder or a matcher
        self._mask_threads = MaskThreads()
        self.events: list[RequestEvent] = []  # not returned to the user yet
        self.processing: LiveSequence | None = None  # if interrupted, its output is not usable

    def add_request(self, request: Request) -> None:
        """Starts to build the output of a request, if this process has to."""
        if self._detokenize or request.needs_output_processing:
            self._builders[request.number] = RequestOutputBuilder(request, self._tokenizer)

    def add_sequence(self, sequence: LiveSequence) -> None:
        """Starts a sample, or a branch that has just split off."""
        live = sequence.live_request
        if live.matcher is not None:
            sequence.matcher = live.matcher.result().copy()
            self._with_grammar[sequence.seq_id] = sequence
            self._processed.add(sequence.seq_id)
        builder = self._builders.get(live.request.number)
        if builder is not None:
            builder.sequence_output(sequence.seq_id)
            self._processed.add(sequence.seq_id)

    def remove_request(self, live: LiveRequest) -> None:
        """Forgets a request."""
        live.mask_cost.closed = True
        self._builders.pop(live.request.number, None)
        for sequence in live.all_sequences():
            self._with_grammar.pop(sequence.seq_id, None)
            self._processed.discard(sequence.seq_id)

    def builds(self, request: Request) -> bool:
        """True if the output of ``request`` is built here."""
        return request.number in self._builders

    def unprocessed_from(self, sequence: LiveSequence) -> int | None:
        """How many tokens of a sequence the records processed so far contain; None if they are not
        processed here, or it is finished."""
        builder = self._builders.get(sequence.live_request.request.number)
        if builder is None:
            followed = sequence.matcher is not None and not sequence.finished
            return sequence.num_processed if followed else None
        output = builder.sequence_output(sequence.seq_id)
        return None if output.finish_reason is not None else output.num_received

    def record_scheduled(self, request: Request, now: float) -> None:
        """Records that a sequence of ``request`` entered the batch."""
        builder = self._builders.get(request.number)
        if builder is not None:
            builder.record_scheduled(now)

    @property
    def has_grammar(self) -> bool:
        """True if a live sequence has a grammar, even one that still thinks."""
        return bool(self._with_grammar)

    def unfinished_masks(self) -> list[MaskJob]:
        """Masks that answers wait for."""
        jobs = [s.mask_job for s in self._with_grammar.values() if _follows_grammar(s)]
        return [job for job in jobs if job is not None and not job.done.done()]

    def grammar_masks(self) -> GrammarMasks:
        """The masks of answers that follow a grammar, as far as they are known in time."""
        following = [s for s in self._with_grammar.values() if _follows_grammar(s)]
        if not following:
            return NO_GRAMMAR
        wait_for_masks([s.mask_job for s in following if s.mask_job is not None])
        masks = GrammarMasks()
        for sequence in following:
            req_index, mask = _core.NO_REQ_INDEX, None
            try:
                req_index = self._scheduler.req_index(sequence.seq_id)
                mask = _mask_of(sequence)
            except Exception as error:
                self._fail(sequence.live_request, error)
            if mask is None:
                masks.undecided.add(req_index)
            elif req_index != _core.NO_REQ_INDEX:  # else it waits
                masks.allowed[req_index] = mask
        return masks

    def process(self, step: EngineCoreOutputs) -> list[int]:
        """Processes the output of a step. Returns the ids of sequences that a stop string ended."""
        stopped: list[int] = []
        for part in step.prompt_logprobs:
            if (builder := self._builders.get(request_number(part.seq_id))) is not None:
                builder.add_prompt_logprobs(part)
        for output in step.decode(self._processed) if self._processed else ():
            sequence = self._sequences[output.seq_id]
            self.processing = sequence
            try:
                if self._process_one(sequence, output, step.end_time):
                    stopped.append(output.seq_id)
            except Exception as error:
                self._fail(sequence.live_request, error)
            self.processing = None
        return stopped

    def _process_one(self, sequence: LiveSequence, output: EngineCoreOutput, now: float) -> bool:
        """Processes one record. True if its text ended the sequence."""
        builder = self._builders.get(request_number(output.seq_id))
        events = [] if builder is None else builder.add(output, now)
        if builder is not None and self._detokenize:
            self.events += [(builder.request.request_id, event) for event in events]
        if sequence.matcher is not None:
            self._advance_matcher(sequence, output)
        if builder is None:
            return False
        finish_reason = builder.sequence_output(output.seq_id).finish_reason
        stopped = finish_reason is not None and not sequence.finished
        if stopped:
            self._scheduler.finish(output.seq_id, _core.FinishReason.STOP)
            sequence.finished = True
        if sequence.finished:
            self._exit_early(builder, output.seq_id)
        return stopped

    def _advance_matcher(self, sequence: LiveSequence, output: EngineCoreOutput) -> None:
        """Advances a matcher by the tokens that its sequence sampled as its answer (mark 0)."""
        assert sequence.matcher is not None
        sequence.num_processed += len(output.token_ids)
        sequence.answering = not output.thinking
        if not sequence.finished:
            pairs = zip(output.token_ids, output.marks, strict=True)
            tokens = [token for token, mark in pairs if mark == 0]
            if tokens:
                cost = sequence.live_request.mask_cost
                sequence.mask_job = self._mask_threads.advance(cost, sequence.matcher, tokens)

    def _exit_early(self, builder: RequestOutputBuilder, seq_id: int) -> None:
        """Ends the thinking of a sample whose latest checkpoints agree; ``seq_id`` is the sequence
        that finished."""
        budget, branch = builder.request.params.thinking, branch_number(seq_id)
        if budget is None or budget.early_exit is None or not branch:
            return
        if builder.checkpoints_agree(seq_id, budget.early_exit):
            sample, reason = seq_id - branch, _core.EndReason.CONVERGED
            self._scheduler.limit_thinking(sample, budget.min_tokens, reason)

    def partial_output(self, live: LiveRequest, now: float) -> RequestOutput | None:
        """The output of an aborted request so far; None if it is not built here."""
        builder = self._builders.get(live.request.number)
        if builder is None:
            return None
        for sequence in live.all_sequences():
            if not sequence.finished:
                for output in decode_core_outputs(self._scheduler.collect_output(sequence.seq_id)):
                    builder.add(output, now)
        return builder.build(now)


def _follows_grammar(sequence: LiveSequence) -> bool:
    return sequence.matcher is not None and sequence.answering and not sequence.finished


def _mask_of(sequence: LiveSequence) -> NDArray[np.uint8] | None:
    """The tokens that may come next; None: not known yet. Raises RequestFailedError."""
    job = sequence.mask_job
    if job is not None and job.done.done():
        job.done.result()
        sequence.mask_job = None
    assert sequence.matcher is not None
    return sequence.matcher.mask
