"""One engine in virtual time: the real scheduler on a device that only takes time.

The device samples what each request's script says; what becomes of it (waits, forced ends, blocks,
preemption) is the scheduler's business. The clock moves by what ``StepTime`` says of a step.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s1engine import _core
from s1engine.plan import workload
from s1engine.plan.placement import Placement
from s1engine.plan.request_metrics import RequestMetrics
from s1engine.plan.step_time import StepShape, StepTimeModel
from s1engine.plan.workload import PlannedBudget, PlannedRequest
from s1engine.runner.input_batch import InputBatch

OTHER, TRIGGER, EOS, NEWLINE, PHRASE = 0, 1, 2, 3, 4  # token ids; prompts have none of them


@dataclass(slots=True)
class RequestScript:
    """One request's script, and how far it has come."""

    served: RequestMetrics
    budget: PlannedBudget
    _prompt_len: int = field(init=False)
    _tries_at: int = field(init=False)  # thinking tokens before the next try to end
    _answer_end: int = field(init=False)  # position of the answer's last token, once it is known
    _thinking: int = 0
    _max_thinking: int = 0
    _waits: int = 0
    _phase: _core.Phase | None = None

    def __post_init__(self) -> None:
        request = self.served.request
        self._prompt_len = workload.prompt_len(request, self.budget)
        self._tries_at = request.thinking or 0
        self._answer_end = 0

    def read(self, progress: "_core.CoreOutputDict") -> None:
        """Takes note of what the scheduler made of the tokens so far."""
        served = self.served
        served.output_tokens += len(progress["token_ids"])
        served.forced_tokens += sum(m & _core.MARK_FORCED > 0 for m in progress["marks"])
        served.thinking_tokens = self._thinking = max(progress["thinking_tokens"], 0)
        self._max_thinking = progress["max_thinking"]
        if progress["waits_used"] > self._waits:
            self._waits = progress["waits_used"]
            self._tries_at = self._thinking + self.budget.wait_thinking
        if progress["phase"] != self._phase and progress["phase"] != _core.Phase.THINKING:
            self._answer_end = self._here + served.request.answer - 1
        self._phase = progress["phase"]

    @property
    def _here(self) -> int:
        """Position of the next token."""
        return self._prompt_len + self.served.output_tokens

    def next_event(self) -> tuple[int, int]:
        """The position at which something besides OTHER is sampled or the budget cuts, and what is
        sampled there."""
        if self._phase != _core.Phase.THINKING:
            return self._answer_end, EOS
        tries = self._here + self._tries_at - self._thinking
        cut = self._here + self._max_thinking - self._thinking - 1
        return (tries, TRIGGER) if tries <= cut else (cut, OTHER)


NEVER = 2**40  # a position that no sequence reaches


@dataclass(slots=True)
class SimulatedReplica:
    """An engine that is asked over time. ``submit`` and ``advance`` must come in order of time."""

    placement: Placement
    time: StepTimeModel
    budget: PlannedBudget
    busy_s: float = 0.0
    finished: list[RequestMetrics] = field(default_factory=list)
    _live: dict[int, RequestScript] = field(
        default_factory=dict
    )  # by number, the sequence's id too
    _inbox: list[RequestMetrics] = field(default_factory=list)
    _due: float | None = None  # when the step under way ends
    _run_steps: int = 0  # decode steps since the last that was none
    _quiet: int = 0  # steps for which the plan is as it was, and nothing but OTHER is sampled
    _last: StepShape = field(default_factory=lambda: StepShape(0, 0))
    _sampled: np.ndarray = field(init=False)
    _eventful: list[int] = field(default_factory=list)  # sequences whose script goes on
    _others: np.ndarray = field(init=False)
    _events: np.ndarray = field(init=False)  # [max_num_seqs] position at which a script goes on
    _tokens: np.ndarray = field(init=False)  # [max_num_seqs] what is sampled there
    _owners: np.ndarray = field(init=False)  # [max_num_seqs] sequence
    _batch: InputBatch = field(init=False)
    _scheduler: _core.Scheduler = field(init=False)
    _format: _core.BudgetFormat = field(init=False)

    def __post_init__(self) -> None:
        place = self.placement
        self._scheduler = _core.Scheduler(
            num_blocks=place.num_blocks,
            block_size=place.block_size,
            max_num_seqs=place.max_num_seqs,
            max_num_batched_tokens=place.max_num_batched_tokens,
            enable_prefix_caching=place.enable_prefix_caching,
        )
        self._batch = InputBatch(
            max_tokens=place.max_num_batched_tokens,
            max_rows=place.max_num_seqs,
            max_blocks=-(-place.max_model_len // place.block_size),
            device="cpu",
        )
        self._format = _core.BudgetFormat(
            triggers=[TRIGGER],
            natural_end=[PHRASE] * self.budget.natural_end_len,
            newline=[NEWLINE] * self.budget.newline_len,
            newline_always=False,
            ends_in_newline=np.zeros(workload.FIRST_TOKEN, np.uint8),
        )
        rows = place.max_num_seqs
        self._others = np.full(rows, OTHER, np.int64)
        self._sampled = self._others[:0]
        self._events = np.full(rows, NEVER, np.int64)
        self._tokens = np.full(rows, OTHER, np.int64)
        self._owners = np.zeros(rows, np.int64)

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._live) + len(self._inbox)

    def stats(self) -> _core.SchedulerStats:
        """What the scheduler has counted."""
        return self._scheduler.stats()

    def submit(self, number: int, request: PlannedRequest) -> None:
        """At ``ask.at``, to which the replica has been advanced."""
        self._inbox.append(RequestMetrics(number, request))
        if self._due is None:
            self._run_steps = 0
            self._begin(request.at)

    def advance(self, until: float) -> None:
        """All steps that end by then."""
        while self._due is not None and self._due <= until:
            now = self._due
            self._complete(now)
            self._begin(now)

    def check(self) -> None:
        """Raises unless every sequence and block is accounted for."""
        self._scheduler.check_integrity()

    # --- a step begins ---

    def _begin(self, now: float) -> None:
        boundary = self._run_steps % self.placement.run_ahead == 0  # of what the device decides
        if boundary or not self._scheduler.has_unfinished():
            for served in self._inbox:
                self._add(served)
            self._inbox.clear()
        core = self._batch.core
        admitted = self._scheduler.schedule(core)
        if core.num_rows == 0:
            self._due = None
            return
        rows = core.num_rows
        decodes = rows == core.num_tokens == core.num_samples
        if self._quiet and not admitted and decodes and rows == self._last.tokens:
            self._quiet -= 1
            step = StepShape(rows, rows, self._last.decode_context + rows)
            self._sampled = self._others[:rows]
        else:
            step = self._look(admitted)
            self._quiet *= decodes
        self._last = step
        self._run_steps = self._run_steps + 1 if decodes else 0
        seconds = self.time.seconds(step)
        self.busy_s += seconds
        self._due = now + seconds

    def _look(self, admitted: list[int]) -> StepShape:
        """What the plan is, and what its rows will sample."""
        for sequence in admitted:
            self._admit(sequence)
        rows = self._batch.inputs().rows
        left = self._events[rows.req_indices] - rows.positions.numpy()
        now = left == 0
        self._sampled = np.where(now, self._tokens[rows.req_indices], OTHER)
        self._eventful = self._owners[rows.req_indices[now]].tolist()
        self._quiet = 0 if self._eventful or not len(left) else int(left.min()) - 1
        return StepShape.of(self._batch, len(admitted))

    def _add(self, served: RequestMetrics) -> None:
        request, budget = served.request, self.budget
        prompt = request.prompt(served.number)
        options: dict[str, Any] = {}
        if request.thinking is not None:
            prompt = np.append(prompt, np.full(budget.start_len, PHRASE, np.int32))
            params = _core.BudgetParams(
                format=self._format,
                wait=[PHRASE] * budget.wait_len,
                forced_end=[PHRASE] * budget.forced_end_len,
                delimiter_len=budget.natural_end_len,
                min_thinking=0,
                num_waits=budget.num_waits,
            )
            maximum = workload.max_thinking(request, budget)
            options = {"budget": params, "thinking_tokens": 0, "max_thinking": maximum}
        self._live[served.number] = RequestScript(served, budget)
        self._scheduler.add(
            served.number,
            prompt,
            max_len=workload.max_len(request, budget),
            stop_tokens=[EOS],
            stream_output=True,
            **options,
        )
        self._quiet = 0

    def _admit(self, sequence: int) -> None:
        req_index = self._scheduler.req_index(sequence)
        self._owners[req_index] = sequence
        self._read(sequence, req_index)

    def _read(self, sequence: int, req_index: int) -> None:
        """Finds where the script of a sequence goes on from here."""
        script = self._live[sequence]
        script.read(self._scheduler.collect_output_dict(sequence))
        self._events[req_index], self._tokens[req_index] = script.next_event()

    # --- a step ends ---

    def _complete(self, now: float) -> None:
        scheduler = self._scheduler
        scheduler.update(self._sampled)
        for sequence, _ in scheduler.outputs:
            served = self._live[sequence].served
            if not served.first:
                served.first = now
                scheduler.stop_streaming(sequence)
        for sequence in scheduler.finished:
            self._finish(sequence, now)
        for sequence in self._eventful:
            if sequence in self._live:
                self._read(sequence, scheduler.req_index(sequence))
        self._eventful = []

    def _finish(self, sequence: int, now: float) -> None:
        script = self._live.pop(sequence)
        script.read(self._scheduler.collect_output_dict(sequence))
        script.served.end = now
        self.finished.append(script.served)
        self._scheduler.remove(sequence)
