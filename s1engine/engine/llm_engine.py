"""The engine: requests in, one step at a time, chunks and finished outputs out.

Composes tokenizer, scheduler and runner; each knows nothing of the others. Not thread-safe: one
thread adds, steps and aborts (AsyncLLMEngine gives it one); only ``make_request`` may be called
from anywhere.
"""

import heapq
import random
import time
from dataclasses import replace
from typing import Any

import numpy as np

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.assembly import Assembly, StreamEvent
from s1engine.engine.group import Group, Sample, sample_seed
from s1engine.engine.guide import Guide
from s1engine.engine.messages import EngineStats
from s1engine.engine.model_text import ModelText
from s1engine.engine.progress import Progress, StepTokens, child_number, read_progress, sequence_id
from s1engine.engine.request import Prompt, Request, RequestCompiler, ThinkingPlan
from s1engine.models.loader import resolve_model
from s1engine.outputs import RequestOutput
from s1engine.runner.model_runner import ModelRunner, Runner
from s1engine.runner.sampler import SamplerOutput
from s1engine.sampling_params import SamplingParams

Event = tuple[str, StreamEvent]
THINKING_NOW = 0  # a maximum that ends thinking at the next token


class LLMEngine:
    """A model that answers requests, stepped from outside.

    Args:
        config: what to load and how much of it to run at once.
        progress: show a bar while weights load.
        runner: what computes the steps; None: a ModelRunner with the model's weights.
        texts: make the text of every request here, so that ``step`` returns events. If false, only
            of requests whose own text decides when they end; ``step_tokens`` has all tokens.

    Raises:
        ModelError: the model directory is missing, damaged or not supported.
        RequestError: an option does not fit the model or the machine.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: bool = False,
        runner: Runner | None = None,
        texts: bool = True,
    ) -> None:
        path = resolve_model(config.model)
        text = ModelText.load(config, path)
        self.config = config
        self.model_config = text.config
        self.tokenizer = text.tokenizer
        self.format = text.format
        self.runner: Runner = runner or ModelRunner(
            config,
            self.model_config,
            path,
            vocab_limit=text.vocab_limit,
            triggers=self.format.triggers if self.format else (),
            progress=progress,
        )
        self.max_model_len = self.runner.max_model_len
        self.scheduler = _core.Scheduler(
            num_blocks=self.runner.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.compiler = RequestCompiler(text, self.max_model_len)
        self._core_format = _core_format(text)
        self._texts = texts
        self._random = random.Random(config.seed)
        self._groups: dict[str, Group] = {}
        self._samples: dict[int, Sample] = {}  # by sequence
        self._deadlines: list[tuple[float, str]] = []  # heap
        self._forked: list[int] = []  # children that no step has told of
        self._events: list[Event] = []
        self._num_readers = 0
        self._guided: dict[int, Sample] = {}  # samples with a grammar, by sequence

    def default_sampling(self) -> dict[str, Any]:
        """Sampling fields that the model directory sets; greedy if it sets ``do_sample`` false."""
        return self.compiler.text.default_sampling()

    def make_request(self, prompt: Prompt, params: SamplingParams, **options: Any) -> Request:
        """Validates a request (see RequestCompiler.compile). Raises RequestError."""
        return self.compiler.compile(prompt, params, **options)

    # --- requests come and go ---

    def add_request(self, request: Request) -> None:
        """Queues a request; its first sample now, the others when they can share its prompt."""
        assert request.request_id not in self._groups, "request id is taken"
        seed = request.params.seed
        reader = Assembly(request, self.tokenizer) if self._texts or request.reads_itself else None
        self._num_readers += reader is not None
        group = Group(request, self._random.getrandbits(63) if seed is None else seed, reader)
        self._groups[request.request_id] = group
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
        self._add_sample(group)

    def _add_sample(self, group: Group) -> None:
        request, index = group.request, len(group.samples)
        plan = request.thinking
        sequence = sequence_id(request.number, index)
        sample = Sample(group, sequence, sample_seed(group.seed, index))
        sample.answers = plan is None or plan.max_thinking <= plan.thought
        self._enter(sample)
        group.samples.append(sample)
        maximum = plan.max_thinking if plan else 0
        checkpoints = enumerate(plan.checkpoints if plan else (), start=1)
        self.scheduler.add(
            sequence,
            request.prompt,
            max_len=request.max_len,
            priority=request.priority,
            order=request.order,
            stop_tokens=request.stop_tokens,
            watched=True,
            salt=request.salt,
            budget=self._budget(plan) if plan else None,
            thinking_tokens=plan.thought if plan else -1,
            max_thinking=maximum,
            checkpoints=[(b, sequence + child) for child, b in checkpoints if b < maximum],
            loop_repeats=plan.loop_repeats if plan else 0,
        )
        self._adopt()
        if group.limit is not None:
            self._limit_samples(group, *group.limit)

    def _enter(self, sample: Sample) -> None:
        self._samples[sample.sequence] = sample
        grammar = sample.group.request.params.grammar
        if grammar is not None:
            sample.guide = self.compiler.guides.start(grammar)
            self._guided[sample.sequence] = sample

    def _budget(self, plan: ThinkingPlan) -> _core.BudgetParams:
        assert self._core_format is not None
        return _core.BudgetParams(
            format=self._core_format,
            wait=plan.wait,
            forced_end=plan.forced_end,
            delimiter_len=plan.delimiter_len,
            min_thinking=plan.min_thinking,
            num_waits=plan.num_waits,
        )

    def _adopt(self) -> None:
        """Children that the scheduler forked off become samples of their own."""
        for child, parent in self.scheduler.forked:
            sample = self._samples[parent]
            forked = Sample(sample.group, child, sample.seed, answers=True)
            self._enter(forked)
            sample.group.children.append(forked)
            self._forked.append(child)
            if sample.group.reader is not None:
                sample.group.reader.fork(child)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks. Returns what it has so far; None if there
        is no such request, or its text is not made here."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        while not group.complete:
            self._add_sample(group)
        for sample in group.all_samples():
            if not sample.finished:
                self.scheduler.finish(sample.sequence, _core.FinishReason.ABORT)
        now = time.monotonic()
        reader = group.reader
        output = None if reader is None else self._read_to_the_end(group, reader, now)
        self._remove(group)
        return output

    def _read_to_the_end(self, group: Group, reader: Assembly, now: float) -> RequestOutput:
        for sample in group.all_samples():
            if not sample.finished:
                for progress in read_progress(self.scheduler.take_record(sample.sequence)):
                    reader.push(progress, now)
        return reader.output(now)

    def _remove(self, group: Group) -> None:
        for sample in group.all_samples():
            self.scheduler.remove(sample.sequence)
            del self._samples[sample.sequence]
            self._guided.pop(sample.sequence, None)
        del self._groups[group.request.request_id]
        self._num_readers -= group.reader is not None

    def end_thinking(self, request_id: str) -> bool:
        """Tells a live request to answer now. False if there is no such request."""
        return self._limit(request_id, THINKING_NOW, _core.EndReason.CLIENT)

    def _limit(self, request_id: str, maximum: int, reason: _core.EndReason) -> bool:
        group = self._groups.get(request_id)
        if group is None:
            return False
        group.limit = (maximum, reason)
        self._limit_samples(group, maximum, reason)
        return True

    def _limit_samples(self, group: Group, maximum: int, reason: _core.EndReason) -> None:
        for sample in group.all_samples():
            self.scheduler.limit_thinking(sample.sequence, maximum, reason)

    @property
    def has_unfinished(self) -> bool:
        """Is there anything to step for?"""
        return bool(self._groups)

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        stats = self.scheduler.stats()
        return EngineStats(
            num_blocks=self.runner.num_blocks,
            num_free_blocks=stats.num_free_blocks,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_preemptions=stats.num_preemptions,
            num_computed_tokens=stats.num_computed_tokens,
            num_sampled_tokens=stats.num_sampled_tokens,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
        )

    # --- stepping ---

    def step(self) -> list[Event]:
        """Computes one step. Returns chunks and checkpoints of streaming requests, and outputs of
        finished ones."""
        self.step_tokens()
        events, self._events = self._events, []
        return events

    def step_tokens(self) -> StepTokens | None:
        """The same, but returns its tokens; None if there was nothing to compute."""
        self._enforce_deadlines()
        batch = self.runner.batch
        began = time.monotonic()
        seated = self.scheduler.schedule(batch.core)
        for sequence in seated:
            self._seat(self._samples[sequence], began)
        if batch.core.num_rows == 0:
            return None
        if self.config.overload_thinking_floor is not None:
            self._relieve(self.config.overload_thinking_floor)
        self.runner.sampler.masks = self._masks() if self._guided else {}
        sampled = self.runner.execute()
        self.scheduler.update(sampled.token_ids)
        self.runner.sampler.observe(*self.scheduler.appended)
        self._adopt()
        return self._collect(began, seated, sampled)

    def _enforce_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            name = heapq.heappop(self._deadlines)[1]
            self._limit(name, THINKING_NOW, _core.EndReason.DEADLINE)

    def _masks(self) -> dict[int, np.ndarray]:
        """By seat, what the answers may go on with that follow a grammar."""
        return {
            self.scheduler.seat(sample.sequence): sample.guide.mask()
            for sample in self._guided.values()
            if sample.guide and sample.answers and not sample.finished
        }

    def _relieve(self, floor: int) -> None:
        """Cuts budgets as far as requests wait that this step had no room for."""
        pressure = min(self.scheduler.stats().num_waiting / self.config.max_num_seqs, 1.0)
        if pressure == 0:
            return
        for name, group in self._groups.items():
            plan = group.request.thinking
            if plan is not None:
                excess = plan.max_thinking - max(floor, plan.min_thinking)
                maximum = plan.max_thinking - int(pressure * max(excess, 0))
                if maximum < (group.limit[0] if group.limit else plan.max_thinking):
                    self._limit(name, maximum, _core.EndReason.OVERLOAD)

    def _seat(self, sample: Sample, now: float) -> None:
        request = sample.group.request
        if sample.group.reader is not None:
            sample.group.reader.seat(now)
        child = child_number(sample.sequence) != 0
        self.runner.sampler.seat(
            self.scheduler.seat(sample.sequence),
            replace(request.params, logprobs=None) if child else request.params,
            sample.seed,
            self.scheduler.tokens(sample.sequence),
            len(request.prompt),
        )

    def _collect(self, began: float, seated: list[int], sampled: SamplerOutput) -> StepTokens:
        """Takes the tokens of the step, and gives up the sequences that are done."""
        now = time.monotonic()
        records = self.scheduler.take_progressed()
        step = StepTokens(began, now, seated, self._forked, records, sampled.logprobs)
        self._forked = []
        for sequence in self.scheduler.ended:
            self._samples[sequence].finished = True
        for sequence, _ in self.scheduler.progressed:
            sample = self._samples[sequence]
            if not sample.begun:
                self._begin(sample)
        ended = [*self.scheduler.ended, *self._read(step)]
        for group in {self._samples[sequence].group for sequence in ended}:
            if group.finished:
                self._remove(group)
        return step

    def _begin(self, sample: Sample) -> None:
        """Now the prompt is cached, so further samples find it; and few need watching on."""
        sample.begun = True
        group, request = sample.group, sample.group.request
        while not group.complete:
            self._add_sample(group)
        child = child_number(sample.sequence) != 0
        shown = not child and (request.stream or request.params.logprobs is not None)
        if not (shown or request.params.stop or sample.guide):
            self.scheduler.unwatch(sample.sequence)

    def _read(self, step: StepTokens) -> list[int]:
        """Makes text of what is read here. Returns the sequences that a stop string ended."""
        stopped: list[int] = []
        for progress in step.progress() if self._num_readers else ():
            sample = self._samples[progress.sequence]
            reader = sample.group.reader
            if reader is None:
                continue
            events = reader.push(progress, step.ended)
            if self._texts:
                self._events += [(reader.request.request_id, event) for event in events]
            if sample.guide is not None:
                self._guide(sample, sample.guide, progress)
            if reader.stream(sample.sequence).finish_reason and not sample.finished:
                self.scheduler.finish(sample.sequence, _core.FinishReason.STOP)
                sample.finished = True
                stopped.append(sample.sequence)
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
            self.scheduler.limit_thinking(parent, budget.min_tokens, _core.EndReason.CONVERGED)


def _core_format(text: ModelText) -> _core.BudgetFormat | None:
    reasoning, tokenizer = text.format, text.tokenizer
    if reasoning is None:
        return None
    flags = np.zeros(tokenizer.num_tokens, np.uint8)
    flags[tokenizer.newline_ids] = 1
    return _core.BudgetFormat(
        triggers=list(reasoning.triggers),
        natural_end=list(reasoning.natural_end),
        newline=list(reasoning.newline),
        newline_always=reasoning.newline_always,
        ends_in_newline=flags,
    )
