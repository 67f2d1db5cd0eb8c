"""Brings an engine back to the state between two calls, after a call that an exception ended.

An interrupt (Ctrl-C) may be raised after any call that Python makes. The scheduler's own calls are
whole or not made, so the truth is there: sequences, their tokens, blocks. What Python holds beside
it is completed from it. The rule:

- a step that was not applied is planned and computed again, with the same tokens;
- outputs of a step that was applied are collected again from where their readers are;
- a request whose output was being processed fails alone;
- an interrupted ``add_request`` has added nothing; an interrupted ``abort`` is completed, unless it
  had not begun.

Every part may be repeated, because recovery may be interrupted as well.
"""

import enum
import time
from collections.abc import Sequence
from typing import Protocol

from s1engine import _core
from s1engine.engine.core_output import EngineCoreOutputs
from s1engine.engine.deadlines import Deadlines
from s1engine.engine.live_request import (
    FailedRequests,
    LiveRequest,
    LiveSequence,
    PendingGrammars,
)
from s1engine.engine.output_processor import OutputProcessor
from s1engine.engine.thinking_limits import ThinkingLimits
from s1engine.outputs import RequestOutput
from s1engine.prompt_logprobs import PromptLogprobsPart
from s1engine.runner.interface import Runner


class Call(enum.Enum):
    """The call that changes an engine's state now."""

    NONE = enum.auto()
    REQUEST = enum.auto()  # of add_request, abort, end_thinking
    STEP = enum.auto()


class Recoverable(Protocol):
    """What recovery needs of an LLMEngine."""

    runner: Runner
    scheduler: _core.Scheduler
    _call: Call
    _leaving: LiveRequest | None
    _live_requests: dict[str, LiveRequest]
    _sequences: dict[int, LiveSequence]
    _prompt_logprobs: list[PromptLogprobsPart]
    _deadlines: Deadlines
    _limits: ThinkingLimits
    _failures: FailedRequests
    _pending_grammars: PendingGrammars
    _output_processor: OutputProcessor

    @property
    def step_logprobs(self) -> bytes: ...

    def _drop(self, live: LiveRequest) -> None: ...
    def _remove(self, live: LiveRequest) -> None: ...
    def _remove_failing(self) -> None: ...
    def _add_sample(self, live: LiveRequest) -> None: ...
    def _add_branches(self) -> None: ...
    def _apply_outputs(
        self,
        outputs: EngineCoreOutputs,
        finished: Sequence[int],
        reported: Sequence[tuple[int, int]],
    ) -> None: ...


def recover(engine: Recoverable) -> None:
    """Recovers from the call that was interrupted. Raises EngineDeadError if no step can follow."""
    engine._deadlines.rebuild()
    if engine._call is Call.STEP:
        engine.runner.abandon_step()
    if engine._leaving is not None:
        engine._add_branches()  # those that an interrupted add has forked leave with it
        engine._drop(engine._leaving)
        engine._leaving = None
    _fail_half_processed(engine)
    for live in list(engine._live_requests.values()):
        _forget_half_added(engine, live)
    engine._add_branches()
    if engine._call is Call.STEP:
        _process_again(engine)
        engine.scheduler.cancel_step()
    engine._remove_failing()
    for live in list(engine._live_requests.values()):
        _complete(engine, live)


def _fail_half_processed(engine: Recoverable) -> None:
    """Fails the request whose output was being processed, unless its last event is complete."""
    sequence = engine._output_processor.processing
    if sequence is None:
        return
    live = sequence.live_request
    name, events = live.request.request_id, engine._output_processor.events
    if any(owner == name and isinstance(event, RequestOutput) for owner, event in events):
        engine._drop(live)
    else:
        error = RuntimeError("the engine was interrupted while it processed this request's output")
        engine._failures.add(live, error)
    engine._output_processor.processing = None


def _forget_half_added(engine: Recoverable, live: LiveRequest) -> None:
    """Forgets sequences that are not known on both sides. The scheduler's branches stay."""
    for sequences in (live.samples, live.branches):
        sequences[:] = [s for s in sequences if s.finished or _is_known(engine, s)]


def _is_known(engine: Recoverable, sequence: LiveSequence) -> bool:
    if engine._sequences.get(sequence.seq_id) is not sequence:
        return False
    try:
        engine.scheduler.num_settled(sequence.seq_id)
    except IndexError:
        del engine._sequences[sequence.seq_id]
        return False
    return True


def _process_again(engine: Recoverable) -> None:
    """Processes what the last update has reported and Python has not processed."""
    scheduler, processor = engine.scheduler, engine._output_processor
    reported, records = [], b""
    for seq_id, req_index in scheduler.outputs:
        sequence = engine._sequences.get(seq_id)
        received = None if sequence is None else processor.unprocessed_from(sequence)
        if sequence is None or sequence.live_request in engine._failures.failing:
            continue
        ends = seq_id in scheduler.finished
        if received is None:
            sequence.finished |= ends
        elif ends or received < scheduler.num_settled(seq_id) - _prompt_len(sequence):
            reported.append((seq_id, req_index))
            records += scheduler.collect_again(seq_id, req_index, received)
    finished = [seq_id for seq_id, _ in reported if seq_id in scheduler.finished]
    now = time.monotonic()
    outputs = EngineCoreOutputs(
        now, now, [], [], records, engine.step_logprobs, engine._prompt_logprobs
    )
    engine._apply_outputs(outputs, finished, reported)


def _prompt_len(sequence: LiveSequence) -> int:
    return len(sequence.live_request.request.prompt)


def _complete(engine: Recoverable, live: LiveRequest) -> None:
    """Does what the interrupted call has left undone for one request."""
    if live.finished:
        engine._remove(live)
        return
    with engine._failures.isolate(live):
        if any(sample.has_output for sample in live.samples):
            while not live.complete:
                engine._add_sample(live)
        elif not live.samples and live.matcher is not None:
            engine._pending_grammars.restore(live)
        elif not live.samples:
            engine._add_sample(live)
        engine._limits.apply(live)
