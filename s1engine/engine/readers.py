"""Requests that are read where they are computed: all of them, or those whose own text decides.

A stop string ends a sequence, an answer that follows a grammar limits what comes next, and answers
at checkpoints that agree end the thinking: such requests are read here step by step, whoever else
makes text of them for the user.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from s1engine import _core
from s1engine.engine.assembly import Assembly, StreamEvent
from s1engine.engine.group import Group, Sample
from s1engine.engine.guide import Guide
from s1engine.engine.progress import Progress, StepTokens, child_number, read_progress
from s1engine.engine.request import Request
from s1engine.errors import RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.tokenizer import Tokenizer

Event = tuple[str, StreamEvent | RequestFailedError]


class Readers:
    """The readers of one engine.

    Args:
        samples: live ones, by sequence.
        fail: told of a request that cannot be read, and why; the others go on.
        texts: read every request, and keep its events.
    """

    def __init__(
        self,
        scheduler: _core.Scheduler,
        samples: Mapping[int, Sample],
        tokenizer: Tokenizer,
        fail: Callable[[Group, Exception], None],
        *,
        texts: bool,
    ) -> None:
        self._scheduler = scheduler
        self._samples = samples
        self._tokenizer = tokenizer
        self._fail = fail
        self._texts = texts
        self._open = 0
        self._guided: dict[int, Sample] = {}  # samples with a grammar, by sequence
        self._events: list[Event] = []

    def open(self, request: Request) -> Assembly | None:
        """A reader for a request, if it has to be read here."""
        if not (self._texts or request.reads_itself):
            return None
        self._open += 1
        return Assembly(request, self._tokenizer)

    def enter(self, sample: Sample) -> None:
        """A sample begins."""
        if sample.group.guide is not None:
            sample.guide = sample.group.guide.result().copy()
            self._guided[sample.sequence] = sample

    def close(self, group: Group) -> None:
        """A request is over."""
        self._open -= group.reader is not None
        for sample in group.all_samples():
            self._guided.pop(sample.sequence, None)

    def take_events(self) -> list[Event]:
        """What has been read since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def guide(self) -> bool:
        """Is there an answer that follows a grammar, or will be once its thinking ends?"""
        return bool(self._guided)

    def masks(self) -> dict[int, NDArray[np.bool_]]:
        """By seat, what the answers may go on with that follow a grammar."""
        found = {}
        for sample in self._guided.values():
            if sample.guide and sample.answers and not sample.finished:
                try:
                    found[self._scheduler.seat(sample.sequence)] = sample.guide.mask()
                except Exception as error:
                    self._fail(sample.group, error)
        return found

    def read(self, step: StepTokens) -> list[int]:
        """Reads a step. Returns the sequences that a stop string ended."""
        stopped: list[int] = []
        for progress in step.progress() if self._open else ():
            sample = self._samples[progress.sequence]
            reader = sample.group.reader
            if reader is None:
                continue
            try:
                if self._read(reader, sample, progress, step.ended):
                    stopped.append(sample.sequence)
            except Exception as error:
                self._fail(sample.group, error)
        return stopped

    def _read(self, reader: Assembly, sample: Sample, progress: Progress, now: float) -> bool:
        """Reads one record. Did its text end the sequence?"""
        events = reader.push(progress, now)
        if self._texts:
            self._events += [(reader.request.request_id, event) for event in events]
        if sample.guide is not None:
            self._guide(sample, sample.guide, progress)
        stopped = bool(reader.stream(sample.sequence).finish_reason) and not sample.finished
        if stopped:
            self._scheduler.finish(sample.sequence, _core.FinishReason.STOP)
            sample.finished = True
        if sample.finished:
            self._leave_early(reader, sample)
        return stopped

    def _guide(self, sample: Sample, guide: Guide, progress: Progress) -> None:
        """Moves a guide on by what the sequence sampled as its answer (mark 0)."""
        sample.answers = not progress.thinking
        if not sample.finished:
            pairs = zip(progress.token_ids, progress.marks, strict=True)
            guide.take([token for token, mark in pairs if mark == 0])

    def _leave_early(self, reader: Assembly, sample: Sample) -> None:
        """If the checkpoints of a sample agree for long enough, it has thought enough."""
        budget = reader.request.params.thinking
        if budget is None or budget.early_exit is None or not child_number(sample.sequence):
            return
        if reader.agrees(sample.sequence, budget.early_exit):
            parent = sample.sequence - child_number(sample.sequence)
            self._scheduler.limit_thinking(parent, budget.min_tokens, _core.EndReason.CONVERGED)

    def read_to_the_end(self, group: Group, now: float) -> RequestOutput | None:
        """What an aborted request has; None if it is not read here."""
        if group.reader is None:
            return None
        for sample in group.all_samples():
            if not sample.finished:
                for progress in read_progress(self._scheduler.take_record(sample.sequence)):
                    group.reader.push(progress, now)
        return group.reader.output(now)
