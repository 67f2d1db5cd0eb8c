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

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.core_output import (
    EngineCoreOutputs,
    EngineStats,
    branch_number,
    sequence_id,
)
from s1engine.engine.live_request import (
    FailedRequests,
    LiveRequest,
    LiveSequence,
    PendingGrammars,
    sample_seed,
)
from s1engine.engine.multi_step import begin_run, follow
from s1engine.engine.output_processor import OutputProcessor, RequestEvent
from s1engine.engine.request import Prompt, Request, drafting_mode
from s1engine.engine.request_compiler import ModelText, RequestCompiler
from s1engine.errors import RequestFailedError
from s1engine.models.loader import resolve_model
from s1engine.outputs import RequestOutput, RowLogprobs
from s1engine.runner.model_runner import ModelRunner, Runner
from s1engine.runner.resolved_config import resolve_config
from s1engine.sampling_params import SamplingParams

THINKING_NOW = 0  # a maximum that ends thinking at the next token


class LLMEngine:
    """A model that answers requests, stepped from outside.

    Args:
        config: what to load and how much of it to run at once.
        progress: show a bar while weights load.
        runner: what computes the steps; None: a ModelRunner with the model's weights.
        detokenize: build the output of every request here, so that ``step`` returns events. If
            false, only of requests whose output affects scheduling; ``step_core`` has all tokens.

    Raises:
        ModelError: the model directory is missing, damaged or not supported.
        RequestError: an option does not fit the model or the machine.
        EngineDeadError: another rank has died, then or in any later step.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: bool = False,
        runner: Runner | None = None,
        detokenize: bool = True,
    ) -> None:
        path = resolve_model(config.model)
        text = ModelText.load(config, path)
        self.config = config = resolve_config(config)
        self.model_config = text.config
        self.tokenizer = text.tokenizer
        self.format = text.format
        self.runner: Runner = runner or ModelRunner(
            config,
            self.model_config,
            path,
            vocab_limit=text.vocab_limit,
            triggers=self.format.triggers if self.format else (),
            newlines=self.tokenizer.newlines,
            progress=progress,
        )
        self.max_model_len = self.runner.max_model_len
        assert config.block_size is not None
        self.scheduler = _core.Scheduler(
            num_blocks=self.runner.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            max_draft=config.num_speculative_tokens,
            max_samples=config.max_samples,
            step_costs=self.runner.profile_step_costs() if config.num_speculative_tokens else [],
        )
        self.compiler = RequestCompiler(text, self.max_model_len)
        self._budget_format = text.core_format()
        self._random = random.Random(config.seed)
        self._live_requests: dict[str, LiveRequest] = {}
        self._sequences: dict[int, LiveSequence] = {}  # by sequence
        self._deadlines: list[tuple[float, str]] = []  # heap
        self._forked: list[int] = []  # children that no step has told of
        self._failures = FailedRequests()
        self._pending_grammars = PendingGrammars(self.compiler.grammars)
        self._output_processor = OutputProcessor(
            self.scheduler,
            self._sequences,
            self.tokenizer,
            self._failures.add,
            detokenize=detokenize,
        )

    def default_sampling(self) -> dict[str, Any]:
        """Sampling fields that the model directory sets; greedy if it sets ``do_sample`` false."""
        return self.compiler.text.default_sampling()

    def make_request(self, prompt: Prompt, params: SamplingParams, **options: Any) -> Request:
        """Validates a request (see RequestCompiler.compile). Raises RequestError."""
        return self.compiler.compile(prompt, params, **options)

    # --- requests come and go ---

    def add_request(self, request: Request) -> None:
        """Queues a request; its first sample now (once its grammar is compiled, if it has one), the
        others when they can share its prompt. A failure ends it alone: ``collect_failures``."""
        if request.request_id in self._live_requests:
            self._failures.report(request, ValueError("request id is taken"))
            return
        seed = request.params.seed
        seed = self._random.getrandbits(63) if seed is None else seed
        live = self._live_requests[request.request_id] = LiveRequest(request, seed)
        with self._failures.isolate(live):
            self._output_processor.add_request(request)
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, request.request_id))
            if request.params.grammar is not None:
                self._pending_grammars.add(live, request.params.grammar)
            else:
                self._add_sample(live)
        self._drop_failing()

    def _add_sample(self, live: LiveRequest) -> None:
        request, index = live.request, len(live.samples)
        plan = request.budget
        sequence = sequence_id(request.number, index)
        sample = LiveSequence(live, sequence, sample_seed(live.seed, index))
        sample.answering = plan is None or plan.max_thinking <= plan.tokens_thought
        live.samples.append(sample)
        self._enter(sample)
        maximum = plan.max_thinking if plan else 0
        checkpoints = enumerate(plan.checkpoints if plan else (), start=1)
        try:
            self.scheduler.add(
                sequence,
                request.prompt,
                max_len=request.max_len,
                priority=request.priority,
                order=request.order,
                stop_tokens=request.stop_tokens,
                stream_output=True,
                salt=request.salt,
                budget=plan.core_params(self._budget_format) if plan else None,
                thinking_tokens=plan.tokens_thought if plan else -1,
                max_thinking=maximum,
                checkpoints=[(b, sequence + child) for child, b in checkpoints if b < maximum],
                loop_repeats=plan.loop_repeats if plan else 0,
                drafting=drafting_mode(request.params),
            )
        finally:  # a child may have come off before it failed
            self._adopt()
        if live.thinking_limit is not None:
            self._limit_samples(live, *live.thinking_limit)

    def _enter(self, sample: LiveSequence) -> None:
        self._sequences[sample.seq_id] = sample
        self._output_processor.add_sequence(sample)

    def _adopt(self) -> None:
        """Children that the scheduler forked off become samples of their own."""
        for child, parent in self.scheduler.forked:
            sample = self._sequences.get(parent)
            if sample is None or child in self._sequences:
                continue  # of an earlier call
            forked = LiveSequence(sample.live_request, child, sample.seed, answering=True)
            sample.live_request.branches.append(forked)
            self._enter(forked)
            self._forked.append(child)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks. Returns what it has so far; None if there
        is no such request, or its text is not made here."""
        live = self._live_requests.get(request_id)
        if live is None:
            return None
        output = None
        if not self._pending_grammars.remove(live):
            with self._failures.isolate(live):
                while self._output_processor.builds(live.request) and not live.complete:
                    self._add_sample(live)
                self._finish(live)
                output = self._output_processor.partial_output(live, time.monotonic())
        self._finish(live)
        self._remove(live)
        return output

    def _finish(self, live: LiveRequest) -> None:
        for sample in live.all_sequences():
            if not sample.finished:
                self.scheduler.finish(sample.seq_id, _core.FinishReason.ABORT)

    def _drop_failing(self) -> None:
        """Requests that failed are gone. Between steps, or at the end of one."""
        for live in self._failures.pop_failing():
            if self._live_requests.get(live.request.request_id) is live:
                self._pending_grammars.remove(live)
                self._finish(live)
                self._remove(live)

    def collect_failures(self) -> list[tuple[Request, RequestFailedError]]:
        """Requests that failed alone since the last call; ``step`` tells of them too."""
        return self._failures.pop_errors()

    def _remove(self, live: LiveRequest) -> None:
        for sample in live.all_sequences():
            self.scheduler.remove(sample.seq_id)
            self._sequences.pop(sample.seq_id, None)
        del self._live_requests[live.request.request_id]
        self._output_processor.remove_request(live)

    def end_thinking(self, request_id: str) -> bool:
        """Tells a live request to answer now. False if there is no such request."""
        return self._limit(request_id, THINKING_NOW, _core.EndReason.CLIENT)

    def _limit(self, request_id: str, maximum: int, reason: _core.EndReason) -> bool:
        live = self._live_requests.get(request_id)
        if live is None:
            return False
        live.thinking_limit = (maximum, reason)
        self._limit_samples(live, maximum, reason)
        return True

    def _limit_samples(self, live: LiveRequest, maximum: int, reason: _core.EndReason) -> None:
        for sample in live.all_sequences():
            self.scheduler.limit_thinking(sample.seq_id, maximum, reason)

    @property
    def has_unfinished(self) -> bool:
        """Is there anything to step for?"""
        return bool(self._live_requests or self._failures)

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
            num_drafts=stats.num_drafts,
            num_draft_tokens=stats.num_draft_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
            num_undrafted=stats.num_undrafted,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
        )

    def close(self) -> None:
        """Ends the processes of other ranks, if there are any. No step may follow."""
        self.runner.close()

    # --- stepping ---

    def step(self) -> list[RequestEvent]:
        """Computes one step, or follows the device through several. Returns chunks and checkpoints
        of streaming requests, outputs of finished ones, and errors of those that failed alone."""
        self.step_core()
        failures = [(request.request_id, error) for request, error in self.collect_failures()]
        return [*self._output_processor.collect_events(), *failures]

    def step_core(self) -> EngineCoreOutputs | None:
        """The same, but returns its tokens; None if there was nothing to compute."""
        self.runner.check()
        self._enforce_deadlines()
        self._admit_prepared()
        step = self._step()
        self._drop_failing()
        return step

    def _admit_prepared(self) -> None:
        """Requests whose grammar is compiled begin."""
        idle = len(self._pending_grammars) == len(self._live_requests)
        for live in self._pending_grammars.pop_ready(wait=idle):
            with self._failures.isolate(live):
                self._add_sample(live)

    def _step(self) -> EngineCoreOutputs | None:
        ahead = self.runner.multi_step
        began = time.monotonic()
        if ahead is not None and ahead.in_flight:
            return self._follow(began, [])
        batch = self.runner.batch
        admitted = self.scheduler.schedule(batch.core)
        for sequence in admitted:
            sample = self._sequences[sequence]
            with self._failures.isolate(sample.live_request):
                self._admit(sample, began)
        if batch.core.num_rows == 0:
            return None
        if self.config.overload_thinking_floor is not None:
            self._relieve(self.config.overload_thinking_floor)
        self.runner.sampler.masks = self._output_processor.grammar_masks()
        if not self._output_processor.has_grammar and begin_run(self.scheduler, self.runner):
            return self._follow(began, admitted)
        sampled = self.runner.execute()
        self.scheduler.update(sampled.token_ids)
        self.runner.sampler.count_tokens(*self.scheduler.appended)
        self._adopt()
        if not self.runner.recorded_now:
            self.scheduler.record_step_time(time.monotonic() - began)
        return self._collect(began, admitted, sampled.logprobs)

    def _follow(self, began: float, admitted: list[int]) -> EngineCoreOutputs:
        follow(self.scheduler, self.runner)
        self._adopt()
        return self._collect(began, admitted, {})

    def _enforce_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            name = heapq.heappop(self._deadlines)[1]
            self._limit(name, THINKING_NOW, _core.EndReason.DEADLINE)

    def _relieve(self, floor: int) -> None:
        """Cuts budgets as far as requests wait that this step had no room for."""
        pressure = min(self.scheduler.stats().num_waiting / self.config.max_num_seqs, 1.0)
        if pressure == 0:
            return
        for name, live in self._live_requests.items():
            plan = live.request.budget
            if plan is not None:
                excess = plan.max_thinking - max(floor, plan.min_thinking)
                maximum = plan.max_thinking - int(pressure * max(excess, 0))
                if maximum < (live.thinking_limit[0] if live.thinking_limit else plan.max_thinking):
                    self._limit(name, maximum, _core.EndReason.OVERLOAD)

    def _admit(self, sample: LiveSequence, now: float) -> None:
        request = sample.live_request.request
        self._output_processor.record_scheduled(request, now)
        child = branch_number(sample.seq_id) != 0
        self.runner.sampler.add_request(
            self.scheduler.req_index(sample.seq_id),
            replace(request.params, logprobs=None) if child else request.params,
            sample.seed,
            self.scheduler.tokens(sample.seq_id),
            len(request.prompt),
        )

    def _collect(
        self, began: float, admitted: list[int], logprobs: dict[int, RowLogprobs]
    ) -> EngineCoreOutputs:
        """Takes the tokens of the step, and gives up the sequences that are done."""
        now = time.monotonic()
        records = self.scheduler.collect_outputs()
        step = EngineCoreOutputs(began, now, admitted, self._forked, records, logprobs)
        self._forked = []
        if not records:  # nobody ended, and nobody watches
            return step
        for sequence in self.scheduler.finished:
            self._sequences[sequence].finished = True
        for sequence, _ in self.scheduler.outputs:
            sample = self._sequences[sequence]
            if not sample.has_output:
                with self._failures.isolate(sample.live_request):
                    self._begin(sample)
        ended = [*self.scheduler.finished, *self._output_processor.process(step)]
        for live in {self._sequences[sequence].live_request for sequence in ended}:
            if live.finished:
                self._remove(live)
        return step

    def _begin(self, sample: LiveSequence) -> None:
        """Now the prompt is cached, so further samples find it; and few need watching on."""
        sample.has_output = True
        live, request = sample.live_request, sample.live_request.request
        while not live.complete:
            self._add_sample(live)
        child = branch_number(sample.seq_id) != 0
        shown = not child and (request.stream or request.params.logprobs is not None)
        if not (shown or request.params.stop or sample.matcher):
            self.scheduler.stop_streaming(sample.seq_id)
