"""One engine in virtual time: the real scheduler over a device that only takes time.

The device samples the tokens of each request's script. The scheduler decides everything else:
waits, forced ends, blocks, preemption. The clock advances by the ``StepTimeModel``.
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
NEVER = 2**40  # a position that no sequence reaches


@dataclass(slots=True)
class RequestScript:
    """What the simulated model samples for one request, and how far the request is."""

    metrics: RequestMetrics
    budget: PlannedBudget
    _prompt_len: int = field(init=False)
    _tries_at: int = field(init=False)  # thinking tokens at which the model next tries to end
    _answer_end: int = 0  # position of the answer's last token, once it is known
    _thinking: int = 0
    _max_thinking: int = 0
    _waits: int = 0
    _phase: _core.Phase | None = None

    def __post_init__(self) -> None:
        request = self.metrics.request
        self._prompt_len = workload.prompt_len(request, self.budget)
        self._tries_at = request.thinking or 0

    def update(self, output: "_core.CoreOutputDict") -> None:
        """Follows the tokens that the scheduler appended."""
        metrics = self.metrics
        metrics.output_tokens += len(output["token_ids"])
        metrics.forced_tokens += sum(m & _core.MARK_FORCED > 0 for m in output["marks"])
        metrics.thinking_tokens = self._thinking = max(output["thinking_tokens"], 0)
        self._max_thinking = output["max_thinking"]
        if output["waits_used"] > self._waits:
            self._waits = output["waits_used"]
            self._tries_at = self._thinking + self.budget.wait_thinking
        if output["phase"] != self._phase and output["phase"] != _core.Phase.THINKING:
            self._answer_end = self._position + metrics.request.answer - 1
        self._phase = output["phase"]

    @property
    def _position(self) -> int:
        """Position of the next token."""
        return self._prompt_len + self.metrics.output_tokens

    def next_event(self) -> tuple[int, int]:
        """The next position at which the model samples a token besides OTHER or the budget cuts,
        and the token sampled there."""
        if self._phase != _core.Phase.THINKING:
            return self._answer_end, EOS
        tries = self._position + self._tries_at - self._thinking
        cut = self._position + self._max_thinking - self._thinking - 1
        return (tries, TRIGGER) if tries <= cut else (cut, OTHER)


@dataclass(slots=True)
class SimulatedReplica:
    """An engine that serves requests. Calls of ``submit`` and ``advance`` are in order of time."""

    placement: Placement
    time: StepTimeModel
    budget: PlannedBudget
    busy_s: float = 0.0
    finished: list[RequestMetrics] = field(default_factory=list)
    _live: dict[int, RequestScript] = field(default_factory=dict)  # by number, also sequence id
    _waiting: list[RequestMetrics] = field(default_factory=list)  # until the next step boundary
    _step_end: float | None = None  # end of the current step
    _decode_steps: int = 0  # of the present multi-step decode
    _run_began: float = 0.0  # time of its first step
    _quiet_steps: int = 0  # coming steps with an unchanged schedule that sample nothing but OTHER
    _last_step: StepShape = field(default_factory=lambda: StepShape(0, 0))
    _sampled: np.ndarray = field(init=False)
    _with_event: list[int] = field(default_factory=list)  # sequences with an event in this step
    _others: np.ndarray = field(init=False)  # [max_num_seqs] OTHER
    _events: np.ndarray = field(init=False)  # [max_num_seqs] position of the next event
    _tokens: np.ndarray = field(init=False)  # [max_num_seqs] token sampled there
    _sequences: np.ndarray = field(init=False)  # [max_num_seqs] sequence of the row
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
        self._sequences = np.zeros(rows, np.int64)

    @property
    def outstanding(self) -> int:
        """Number of unfinished requests."""
        return len(self._live) + len(self._waiting)

    def stats(self) -> _core.SchedulerStats:
        """The scheduler's counters."""
        return self._scheduler.stats()

    def submit(self, number: int, request: PlannedRequest) -> None:
        """Adds a request at time ``request.at``, to which the replica has advanced."""
        self._waiting.append(RequestMetrics(number, request))
        if self._step_end is None:
            self._decode_steps = 0
            self._begin_step(request.at)

    def advance(self, until: float) -> None:
        """Runs all steps that end by ``until``."""
        while self._step_end is not None and self._step_end <= until:
            now = self._step_end
            self._end_step(now)
            self._begin_step(now)

    def check_integrity(self) -> None:
        """Raises unless every sequence and block is accounted for."""
        self._scheduler.check_integrity()

    # --- a step begins ---

    def _begin_step(self, now: float) -> None:
        place = self.placement
        in_run = 0 < self._decode_steps < place.run_ahead  # of a multi-step decode
        if not in_run or now - self._run_began >= place.max_run_s:
            self._run_began, self._decode_steps = now, 0
        if self._decode_steps == 0 or not self._scheduler.has_unfinished():
            for metrics in self._waiting:
                self._add(metrics)
            self._waiting.clear()
        core = self._batch.core
        admitted = self._scheduler.schedule(core)
        if core.num_rows == 0:
            self._step_end = None
            return
        rows = core.num_rows
        decodes = rows == core.num_tokens == core.num_samples
        if self._quiet_steps and not admitted and decodes and rows == self._last_step.tokens:
            self._quiet_steps -= 1
            step = StepShape(rows, rows, self._last_step.decode_context + rows)
            self._sampled = self._others[:rows]
        else:
            step = self._read_batch(admitted)
            self._quiet_steps *= decodes
        self._last_step = step
        self._decode_steps = self._decode_steps + 1 if decodes else 0
        seconds = self.time.seconds(step)
        self.busy_s += seconds
        self._step_end = now + seconds

    def _read_batch(self, admitted: list[int]) -> StepShape:
        """The shape of the scheduled batch; prepares what its rows sample."""
        for sequence in admitted:
            req_index = self._scheduler.req_index(sequence)
            self._sequences[req_index] = sequence
            self._update_event(sequence, req_index)
        rows = self._batch.inputs().rows
        left = self._events[rows.req_indices] - rows.positions.numpy()
        now = left == 0
        self._sampled = np.where(now, self._tokens[rows.req_indices], OTHER)
        self._with_event = self._sequences[rows.req_indices[now]].tolist()
        self._quiet_steps = 0 if self._with_event or not len(left) else int(left.min()) - 1
        return StepShape.from_batch(self._batch, len(admitted))

    def _add(self, metrics: RequestMetrics) -> None:
        request, budget = metrics.request, self.budget
        prompt = request.prompt(metrics.number)
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
        self._live[metrics.number] = RequestScript(metrics, budget)
        self._scheduler.add(
            metrics.number,
            prompt,
            max_len=workload.max_len(request, budget),
            stop_tokens=[EOS],
            stream_output=True,
            **options,
        )
        self._quiet_steps = 0

    def _update_event(self, sequence: int, req_index: int) -> None:
        script = self._live[sequence]
        script.update(self._scheduler.collect_output_dict(sequence))
        self._events[req_index], self._tokens[req_index] = script.next_event()

    # --- a step ends ---

    def _end_step(self, now: float) -> None:
        scheduler = self._scheduler
        scheduler.update(self._sampled)
        for sequence, _ in scheduler.outputs:
            metrics = self._live[sequence].metrics
            if not metrics.first:
                metrics.first = now
                scheduler.stop_streaming(sequence)
        for sequence in scheduler.finished:
            self._finish(sequence, now)
        for sequence in self._with_event:
            if sequence in self._live:
                self._update_event(sequence, scheduler.req_index(sequence))
        self._with_event = []

    def _finish(self, sequence: int, now: float) -> None:
        script = self._live.pop(sequence)
        script.update(self._scheduler.collect_output_dict(sequence))
        script.metrics.end = now
        self.finished.append(script.metrics)
        self._scheduler.remove(sequence)
