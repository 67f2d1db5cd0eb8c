"""The engine: requests in, chunks and finished outputs out, one step at a time.

Owns the live requests. Connects tokenizer, scheduler and runner, which do not know each other. Not
thread-safe: one thread adds, steps and aborts (EngineThread is one); only ``make_request`` may
be called from any thread.
"""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Unpack

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.core_output import (
    EngineCoreOutputs,
    EngineStats,
    branch_number,
    sequence_id,
)
from s1engine.engine.deadlines import Deadlines
from s1engine.engine.live_request import (
    FailedRequests,
    LiveRequest,
    LiveSequence,
    PendingGrammars,
    sample_seed,
)
from s1engine.engine.mask_threads import wait_for_a_mask
from s1engine.engine.model_text import ModelText
from s1engine.engine.multi_step import make_multi_step
from s1engine.engine.output_processor import OutputProcessor, RequestEvent
from s1engine.engine.recovery import Call, recover
from s1engine.engine.request import (
    CompiledBudget,
    Request,
    drafting_mode,
    id_is_taken,
)
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.thinking_limits import ThinkingLimits
from s1engine.errors import RequestFailedError
from s1engine.models.checkpoint import open_weights
from s1engine.models.model_path import resolve_model
from s1engine.options import Prompt, RequestOptions
from s1engine.outputs import RequestOutput
from s1engine.profiling import StepTracer, profiler_attached, ranged
from s1engine.prompt_logprobs import PromptLogprobsPart
from s1engine.runner.interface import ModelRunnerOutput, NewRequest, Runner, SchedulerOutput
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.prompt_scores import PromptScores
from s1engine.runner.resolved_config import MAX_RUN_S, ResolvedConfig, resolve_config
from s1engine.runner.thinking_ends import EndTables, ThinkingEnds
from s1engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class LLMEngine:
    """A model that answers requests. The caller calls ``step``.

    Args:
        progress: show a bar while weights load.
        runner: computes the steps; None: a ModelRunner with the model's weights.
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
        self._path = path = resolve_model(config.model)
        text = ModelText.load(config, path)
        self.config = resolved = resolve_config(config)
        self.model_config = text.config
        self.tokenizer = text.tokenizer
        self.format = text.format
        self._budget_format = text.core_format()
        self._calls_format = text.core_format(tools=True) if text.ends_by_tools else None
        self.runner: Runner = runner or ModelRunner(
            resolved,
            self.model_config,
            path,
            vocab_limit=text.vocab_limit,
            ends=ThinkingEnds(
                self.format.triggers if self.format else (), EndTables.of(self._budget_format)
            ),
            newlines=self.tokenizer.newlines,
            progress=progress,
        )
        self.max_model_len = self.runner.max_model_len
        self.scheduler = make_scheduler(resolved, self.runner)
        self._multi_step = make_multi_step(resolved, self.scheduler, self.runner)
        self.compiler = RequestCompiler(text, self.max_model_len, config)
        self._random = random.Random(config.seed)
        self._live_requests: dict[str, LiveRequest] = {}
        self._sequences: dict[int, LiveSequence] = {}  # by id
        self._limits = ThinkingLimits(self.scheduler, self._live_requests)
        self._deadlines = Deadlines(
            self.scheduler, self._live_requests, self._limits, resolved.max_step_ms / 1000
        )
        self._new_branches: list[int] = []  # not in any EngineCoreOutputs yet
        self._call = Call.NONE  # not at its end yet; else it was interrupted
        self._owes_events = False  # a call of step() has not returned its events
        self._leaving: LiveRequest | None = None  # an interrupted call has not added or removed it
        self._logprobs: bytes | None = b""  # of the step that is applied; None: in the loop
        self._prompt_logprobs: list[PromptLogprobsPart] = []  # of that step, too
        self._failures = FailedRequests()
        self._tracer = StepTracer(config.profile) if config.profile else None
        self._plain_phases = self._schedule, self._execute, self._process
        self._ranged_phases = (
            ranged("schedule", self._schedule),
            ranged("execute", self._execute),
            ranged("process", self._process),
        )
        self._pending_grammars = PendingGrammars(self.compiler.grammars)
        self._output_processor = OutputProcessor(
            self.scheduler,
            self._sequences,
            self.tokenizer,
            self._failures.add,
            detokenize=detokenize,
        )

    @cached_property
    def weights_digest(self) -> str:
        """Identifies the weights on disk (Checkpoint.weights_digest). Raises ModelError."""
        return open_weights(self._path).weights_digest()

    def default_sampling(self) -> dict[str, Any]:
        """Sampling fields that the model directory sets; greedy if it sets ``do_sample`` false."""
        return self.compiler.default_sampling()

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        stream: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Validates a request (see RequestCompiler.compile). Raises RequestError."""
        return self.compiler.compile(prompt, params, stream=stream, **options)

    # --- adding and removing requests ---

    def add_request(self, request: Request) -> None:
        """Queues a request: its first sample as soon as its grammar is compiled, the others once
        they can share its cached prompt. A failure ends this request only (``collect_failures``).
        Raises RequestError if a live request has its id."""
        self._begin(Call.REQUEST)
        if request.request_id in self._live_requests:
            self._call = Call.NONE
            raise id_is_taken(request)
        seed = request.params.seed
        seed = self._random.getrandbits(63) if seed is None else seed
        live = self._leaving = LiveRequest(request, seed)
        self._live_requests[request.request_id] = live
        with self._failures.isolate(live):
            self._output_processor.add_request(request)
            self._deadlines.add(request)
            if request.params.grammar is not None:
                self._pending_grammars.add(live)
            else:
                self._add_sample(live)
        self._remove_failing()
        self._end()

    def _begin(self, call: Call) -> None:
        """Begins a call that changes the state. If the last one was interrupted, recovers first."""
        if self._call is not Call.NONE:
            recover(self)
        self._call = call

    def _end(self) -> None:
        self._leaving, self._call = None, Call.NONE

    def _add_sample(self, live: LiveRequest) -> None:
        """Hands the request's next sample to the scheduler."""
        request, index = live.request, len(live.samples)
        budget = request.budget
        seq_id = sequence_id(request.number, index)
        sample = LiveSequence(live, seq_id, sample_seed(live.seed, index))
        sample.answering = budget is None or budget.max_thinking <= budget.tokens_thought
        live.samples.append(sample)
        self._add_sequence(sample)
        max_thinking = budget.max_thinking if budget else 0
        checkpoints = enumerate(budget.checkpoints if budget else (), start=1)
        try:
            self.scheduler.add(
                seq_id,
                request.prompt,
                max_len=request.max_len,
                min_tokens=request.params.min_tokens,
                num_to_score=request.num_to_score if index == 0 else 0,
                priority=request.priority,
                client=request.client,
                order=request.number,
                stop_tokens=request.stop_tokens,
                stream_output=True,
                interactive=request.interactive,
                salt=request.salt,
                budget=self._budget_params(budget),
                thinking_tokens=budget.tokens_thought if budget else -1,
                max_thinking=max_thinking,
                checkpoints=[(at, seq_id + i) for i, at in checkpoints if at < max_thinking],
                loop_repeats=budget.loop_repeats if budget else 0,
                drafting=drafting_mode(request.params),
                pin=request.pin,
            )
        finally:  # the scheduler may have forked a branch before it failed
            self._add_branches()
        self._limits.apply(live)

    def _budget_params(self, budget: CompiledBudget | None) -> _core.BudgetParams | None:
        if budget is None:
            return None
        calls = budget.calls and self._calls_format is not None
        return budget.core_params(self._calls_format if calls else self._budget_format)

    def _add_sequence(self, sequence: LiveSequence) -> None:
        self._output_processor.add_sequence(sequence)
        self._sequences[sequence.seq_id] = sequence

    def _add_branches(self) -> None:
        """Registers the checkpoint branches that the scheduler has forked."""
        for branch_id, parent_id in self.scheduler.forked:
            parent = self._sequences.get(parent_id)
            if parent is None or branch_id in self._sequences:
                continue  # of an earlier call
            live = parent.live_request
            branch = LiveSequence(live, branch_id, parent.seed, answering=True)
            live.branches.append(branch)
            self._add_sequence(branch)
            self._new_branches.append(branch_id)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks. Returns its output so far; None if there is
        no such request, or its output is not built here."""
        self._begin(Call.REQUEST)
        live = self._leaving = self._live_requests.get(request_id)
        output = None if live is None else self._abort(live)
        self._end()
        return output

    def _abort(self, live: LiveRequest) -> RequestOutput | None:
        output = None
        if not self._pending_grammars.remove(live):
            with self._failures.isolate(live):
                while self._output_processor.builds(live.request) and not live.complete:
                    self._add_sample(live)
                self._finish(live)
                output = self._output_processor.partial_output(live, time.monotonic())
        self._drop(live)
        return output

    def _drop(self, live: LiveRequest) -> None:
        """Removes a request in any state."""
        self._pending_grammars.remove(live)
        self._finish(live)
        self._remove(live)

    def _end_expired(self) -> EngineCoreOutputs | None:
        """Ends the requests whose deadline has passed. Returns their last outputs."""
        now, records = time.monotonic(), b""
        expired = self._deadlines.enforce(now)
        for live in expired:
            with self._failures.isolate(live):
                records += self._end_at_deadline(live)
        if not records:
            return None
        outputs = EngineCoreOutputs(now, now, [], self._new_branches, records, b"")
        self._new_branches = []
        self._output_processor.process(outputs)
        for live in expired:
            if live not in self._failures.failing:
                self._drop(live)
        return outputs

    def _end_at_deadline(self, live: LiveRequest) -> bytes:
        """Ends all sequences of a request, those too that were never scheduled. Returns their
        records."""
        if self._pending_grammars.remove(live):
            live.matcher = None
        while not live.complete:
            self._add_sample(live)
        records = b""
        for sequence in live.all_sequences():
            if sequence.finished:
                continue
            self.scheduler.finish(sequence.seq_id, _core.FinishReason.DEADLINE)
            received = self._output_processor.unprocessed_from(sequence)
            if received is None:
                records += self.scheduler.collect_output(sequence.seq_id)
            else:  # again, if this is the second try
                records += self.scheduler.collect_again(sequence.seq_id, -1, received)
        return records

    def _finish(self, live: LiveRequest) -> None:
        for sequence in live.all_sequences():
            if not sequence.finished:
                self.scheduler.finish(sequence.seq_id, _core.FinishReason.ABORT)

    def _remove(self, live: LiveRequest) -> None:
        for sequence in live.all_sequences():
            self.scheduler.remove(sequence.seq_id)
            self._sequences.pop(sequence.seq_id, None)
        self._deadlines.remove(live.request.request_id)
        self._output_processor.remove_request(live)
        self._live_requests.pop(live.request.request_id, None)

    def _remove_failing(self) -> None:
        """Removes requests that failed. Only between steps."""
        while self._failures.failing:
            live = self._failures.failing[-1]
            if self._live_requests.get(live.request.request_id) is live:
                self._drop(live)
            self._failures.failing.pop()

    def collect_failures(self) -> list[tuple[Request, RequestFailedError]]:
        """Requests that failed alone since the last call; ``step`` returns them too."""
        return self._failures.pop_errors()

    def end_thinking(self, request_id: str) -> bool:
        """Makes a live request answer now. False if there is no such request."""
        self._begin(Call.REQUEST)
        known = self._limits.end_thinking(request_id, _core.EndReason.CLIENT)
        self._end()
        return known

    @property
    def has_unfinished(self) -> bool:
        """Is there a live request, a failure to collect, or an interrupted call?"""
        interrupted = self._call is not Call.NONE or self._owes_events
        return bool(self._live_requests or self._failures or interrupted)

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        stats = self.scheduler.stats()
        return EngineStats(
            num_blocks=self.runner.num_blocks,
            num_free_blocks=stats.num_free_blocks,
            num_pinned_blocks=stats.num_pinned_blocks,
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
        """Ends the worker processes and frees the memory of model and cache. No step may follow."""
        if self._tracer is not None:
            self._tracer.close()
        self.runner.close()

    # --- stepping ---

    def step(self, max_seconds: float = 0.0) -> list[RequestEvent]:
        """Computes one step, or applies several of a multi-step decode. Returns chunks and
        checkpoints of streaming requests, outputs of finished ones, and errors of failed ones.

        On a CPU, further decode steps follow until one has output to report, ``max_seconds``
        have passed, or another thread calls ``interrupt``.

        An exception, an interrupt included, may end it anywhere: no event is lost, and the next
        call goes on with the same tokens. At most one request, whose output was being processed,
        fails (RequestFailedError)."""
        self._owes_events = True
        self.step_core(max_seconds)
        processor, failures = self._output_processor, self._failures
        reported = {request.request_id: error for request, error in failures.errors}
        unfailed = [event for event in processor.events if event[0] not in reported]
        events = [*unfailed, *reported.items()]
        processor.events, failures.errors, self._owes_events = [], [], False
        return events

    def interrupt(self) -> None:
        """Ends the present ``step``, or the next, after its first step. Any thread may call it."""
        if self.runner.decode_loop is not None:
            self.runner.decode_loop.interrupt()

    def step_core(self, max_seconds: float = 0.0) -> EngineCoreOutputs | None:
        """As ``step``, but returns the tokens; None if there was nothing to compute."""
        self._begin(Call.STEP)
        self.runner.check_health()
        observed = self._tracer is not None or logger.isEnabledFor(logging.DEBUG)
        outputs = self._end_expired() if self._deadlines else None
        if outputs is None:  # else the next call steps: what has ended is reported at once
            self._add_pending()
            outputs = self._step(0.0 if observed else max_seconds)
            if outputs is not None:
                self._deadlines.record_step(outputs.end_time - outputs.start_time)
        self._remove_failing()
        if observed:
            self._observe_step(outputs)
        self._end()
        return outputs

    def _observe_step(self, outputs: EngineCoreOutputs | None) -> None:
        """Traces and logs a step, unless there was nothing to compute."""
        if outputs is None:
            return
        if self._tracer is not None:
            self._tracer.end_step()
        if logger.isEnabledFor(logging.DEBUG):
            stats = self.scheduler.stats()
            logger.debug(
                "step: %.2f ms, %d admitted, %d running, %d waiting, %d free blocks",
                1e3 * (outputs.end_time - outputs.start_time),
                len(outputs.admitted),
                stats.num_running,
                stats.num_waiting,
                stats.num_free_blocks,
            )

    def _add_pending(self) -> None:
        """Starts requests whose grammar has been compiled."""
        idle = len(self._pending_grammars) == len(self._live_requests)
        for live in self._pending_grammars.pop_ready(wait=idle):
            with self._failures.isolate(live):
                self._add_sample(live)

    def _step(self, max_seconds: float) -> EngineCoreOutputs | None:
        began = time.monotonic()
        if self._waits_for_masks():
            return None
        profiled = profiler_attached()
        schedule, execute, process = self._ranged_phases if profiled else self._plain_phases
        if self._multi_step is not None and self._multi_step.in_flight:
            return process(execute(None), began, [])
        planned = None if profiled else self._decode(began, max_seconds)
        if isinstance(planned, bytes):
            self._add_branches()
            return self._collect(began, [], planned)
        began = time.monotonic()
        step, admitted = schedule(began, planned)
        return None if step is None else process(execute(step), began, admitted)

    def _waits_for_masks(self) -> bool:
        """True if no sequence can go on, because the masks of all are still being computed. Waits
        a little for the first one."""
        jobs = self._output_processor.unfinished_masks()
        if not jobs:
            return False
        stats = self.scheduler.stats()
        alone = len(jobs) == stats.num_running + stats.num_waiting
        return alone and not wait_for_a_mask(jobs)

    def _decode(self, now: float, max_seconds: float) -> bytes | list[int] | None:
        """Takes decode steps without Python (see DecodeLoop.run). None: no step is planned yet,
        because it needs Python."""
        loop = self.runner.decode_loop
        sheds_load = self.config.overload_thinking_floor is not None
        if loop is None or sheds_load:
            return None
        masks = self._output_processor.grammar_masks()
        if masks.undecided:
            return None
        checks = len(self._pending_grammars) > 0 or len(self._deadlines) > 0  # between all steps
        self._logprobs, self._prompt_logprobs = None, []
        seconds = 0.0 if checks else max_seconds
        left = self._deadlines.time_left(now)
        planned = loop.run(self.scheduler, seconds, left, masks.allowed)
        self._logprobs = loop.logprobs
        return planned

    def _schedule(
        self, now: float, admitted: list[int] | None
    ) -> tuple[SchedulerOutput | None, list[int]]:
        """The next step, and the sequences that entered the persistent batch; None if there is
        nothing to compute. ``admitted``: these sequences, if the step is planned already."""
        batch = self.runner.batch
        if admitted is None:
            batch_core = self.runner.next_batch()
            admitted = self.scheduler.schedule(batch_core, self._deadlines.time_left(now))
        new_requests = self._admit(admitted, now) if admitted else []
        if batch.core.num_rows == 0:
            return None, admitted
        if self.config.overload_thinking_floor is not None:
            self._limits.shed_load(self.config.overload_thinking_floor, self.config.max_num_seqs)
        masks = self._output_processor.grammar_masks()
        step = SchedulerOutput(
            new_requests,
            self.scheduler.appended,
            masks.allowed,
            self._output_processor.has_grammar,
            masks.undecided,
            num_prompt_logprobs=self._num_prompt_logprobs(),
        )
        return step, admitted

    def _num_prompt_logprobs(self) -> int:
        """Alternatives that the scored prompts of the scheduled step want at most."""
        spans = self.runner.batch.core.scored_spans if self.runner.batch.core.num_scored else ()
        wanted = (self._sequences[seq_id].live_request.request.params for seq_id, *_ in spans)
        return max((params.prompt_logprobs or 0 for params in wanted), default=0)

    def _parts_of(self, scores: PromptScores) -> list[PromptLogprobsPart]:
        """The scores of the step, by sequence."""
        parts, begin = [], 0
        for seq_id, first, count in self.runner.batch.core.scored_spans:
            rows = slice(begin, begin + count)
            k = self._sequences[seq_id].live_request.request.params.prompt_logprobs
            arrays = scores.logprobs[rows], scores.ranks[rows]
            top = scores.top[rows, :k], scores.top_ids[rows, :k]
            parts.append(PromptLogprobsPart.pack(seq_id, first, *arrays, *top))
            begin += count
        return parts

    def _execute(self, step: SchedulerOutput | None) -> ModelRunnerOutput | None:
        """Computes ``step``. None if the tokens have been applied, as a multi-step decode does; it
        continues if ``step`` is None."""
        multi_step = self._multi_step
        if multi_step is not None and (step is None or multi_step.begin(step)):
            multi_step.advance()
            return None
        assert step is not None
        output = self.runner.execute(step)
        if step.undecided:
            output.drop(step.undecided, self.runner.batch.req_indices)
        return output

    def _process(
        self, output: ModelRunnerOutput | None, began: float, admitted: list[int]
    ) -> EngineCoreOutputs:
        """Applies the sampled tokens, and returns what the sequences gained."""
        self._logprobs = b"" if output is None else output.logprobs
        scores = None if output is None else output.prompt_scores
        self._prompt_logprobs = [] if scores is None else self._parts_of(scores)
        if output is not None:
            if output.failures:
                self._fail_rows(output.failures)
            self.scheduler.update(output.token_ids)
            if not output.recorded_now:
                self.scheduler.record_step_time(time.monotonic() - began)
        self._add_branches()
        return self._collect(began, admitted, self.scheduler.collect_outputs())

    def _fail_rows(self, errors: dict[int, Exception]) -> None:
        """Fails the requests whose sequences have these rows of the persistent batch."""
        for seq_id, sequence in self._sequences.items():
            error = errors.get(self.scheduler.req_index(seq_id))
            if error is not None:
                self._failures.add(sequence.live_request, error)

    def _admit(self, admitted: list[int], now: float) -> list[NewRequest]:
        """The sequences that have entered the persistent batch, as the runner samples them."""
        new_requests = []
        for seq_id in admitted:
            sequence = self._sequences[seq_id]
            with self._failures.isolate(sequence.live_request):
                new_requests.append(self._new_request(sequence, now))
        return new_requests

    def _new_request(self, sequence: LiveSequence, now: float) -> NewRequest:
        request = sequence.live_request.request
        self._output_processor.record_scheduled(request, now)
        params = request.params
        if branch_number(sequence.seq_id) != 0:
            params = replace(params, logprobs=None)
        return NewRequest(
            self.scheduler.req_index(sequence.seq_id),
            params,
            sequence.seed,
            self.scheduler.tokens(sequence.seq_id),
            len(request.prompt),
            request.stop_tokens if params.min_tokens else (),
        )

    def _collect(self, began: float, admitted: list[int], records: bytes) -> EngineCoreOutputs:
        """The outputs of the step."""
        now = time.monotonic()
        branches, self._new_branches = self._new_branches, []
        outputs = EngineCoreOutputs(
            began, now, admitted, branches, records, self.step_logprobs, self._prompt_logprobs
        )
        if records or outputs.prompt_logprobs:  # a sequence has finished or streams its output
            self._apply_outputs(outputs, self.scheduler.finished, self.scheduler.outputs)
        return outputs

    @property
    def step_logprobs(self) -> bytes:
        """Log-probabilities of the step that is applied (logprob_records.py)."""
        if self._logprobs is None:
            assert self.runner.decode_loop is not None
            return self.runner.decode_loop.logprobs
        return self._logprobs

    def _apply_outputs(
        self,
        outputs: EngineCoreOutputs,
        finished: Sequence[int],
        reported: Sequence[tuple[int, int]],
    ) -> None:
        """Processes the outputs of a step. Removes the requests that it has finished."""
        for seq_id in finished:
            self._sequences[seq_id].finished = True
        for seq_id, _ in reported:
            sequence = self._sequences[seq_id]
            if not sequence.has_output:
                with self._failures.isolate(sequence.live_request):
                    self._on_first_output(sequence)
        ended = [*finished, *self._output_processor.process(outputs)]
        for live in {self._sequences[seq_id].live_request for seq_id in ended}:
            if live.finished:
                self._remove(live)

    def _on_first_output(self, sequence: LiveSequence) -> None:
        """The prompt is cached now, so the request's other samples start. The scheduler reports
        further tokens of this sequence only if they are needed before it finishes."""
        sequence.has_output = True
        live, request = sequence.live_request, sequence.live_request.request
        while not live.complete:
            self._add_sample(live)
        is_branch = branch_number(sequence.seq_id) != 0
        streams = not is_branch and (request.stream or request.params.logprobs is not None)
        if not (streams or request.params.stop or sequence.matcher):
            self.scheduler.stop_streaming(sequence.seq_id)


def make_scheduler(config: ResolvedConfig, runner: Runner) -> _core.Scheduler:
    """The scheduler of an engine whose steps ``runner`` computes."""
    return _core.Scheduler(
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        max_len=runner.max_model_len,
        max_window=runner.max_window,
        max_draft=config.num_speculative_tokens,
        max_samples=config.max_samples,
        step_costs=runner.profile_step_costs() if config.num_speculative_tokens else [],
        max_step_time=config.max_step_ms / 1000,
        max_run_time=MAX_RUN_S,
    )
