"""The engine: requests in, one step at a time, chunks and finished outputs out.

Composes tokenizer, scheduler and runner; each knows nothing of the others. Not thread-safe: one
thread adds, steps and aborts (AsyncLLMEngine gives it one); only ``make_request`` may be called
from anywhere.
"""

import heapq
import itertools
import random
import time
from dataclasses import replace
from typing import Any

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.group import Group, Sample, sample_seed
from s1engine.engine.request import Prompt, Request, RequestCompiler
from s1engine.engine.sample_stream import SampleStream
from s1engine.models.config import ModelConfig
from s1engine.models.loader import resolve_model
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput
from s1engine.reasoning import detect_format
from s1engine.runner.cuda_graph import CudaGraphRunner
from s1engine.runner.device import resolve_config
from s1engine.runner.model_runner import ModelRunner, Runner
from s1engine.runner.sampler import RowLogprobs
from s1engine.sampling_params import SamplingParams
from s1engine.tokenizer import Tokenizer

Event = tuple[str, Chunk | CheckpointOutput | RequestOutput]
THINKING_NOW = 0  # a maximum that ends thinking at the next token
MAX_RIDE = 8  # tokens of a phrase that are fed one a step in a run, rather than as one extend


class LLMEngine:
    """A model that answers requests, stepped from outside.

    Args:
        config: what to load and how much of it to run at once.
        progress: show a bar while weights load.
        runner: what computes the steps; None: a ModelRunner with the model's weights.

    Raises:
        ModelError: the model directory is missing, damaged or not supported.
        RequestError: an option does not fit the model or the machine.
    """

    def __init__(
        self, config: EngineConfig, *, progress: bool = False, runner: Runner | None = None
    ) -> None:
        path = resolve_model(config.model)
        self.config = config = resolve_config(config)
        self.model_config = ModelConfig.from_dir(path)
        self.tokenizer = Tokenizer.from_dir(path, config.chat_template)
        self.format = detect_format(
            self.tokenizer, self.model_config.eos_token_ids, config.reasoning_format
        )
        vocab_limit = min(self.tokenizer.num_tokens, self.model_config.vocab_size)
        self.runner: Runner = runner or ModelRunner(
            config,
            self.model_config,
            path,
            vocab_limit=vocab_limit,
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
        )
        self._compiler = RequestCompiler(
            self.tokenizer,
            self.format,
            self.model_config,
            vocab_limit=vocab_limit,
            max_model_len=self.max_model_len,
        )
        self._random = random.Random(config.seed)
        self._next_id = itertools.count()
        self._groups: dict[str, Group] = {}
        self._sequences: dict[int, Sample] = {}
        self._deadlines: list[tuple[float, str]] = []  # heap

    def default_sampling(self) -> dict[str, Any]:
        """Sampling fields that the model directory sets; greedy if it sets ``do_sample`` false."""
        return dict(self.model_config.generation_defaults)

    def make_request(self, prompt: Prompt, params: SamplingParams, **options: Any) -> Request:
        """Validates a request (see RequestCompiler.compile). Raises RequestError."""
        return self._compiler.compile(prompt, params, **options)

    def chat_token_ids(
        self, messages: list[dict[str, Any]], enable_thinking: bool | None = None
    ) -> list[int]:
        """A chat as it would be computed: rendered, thinking opened. Raises RequestError."""
        return self._compiler.chat_token_ids(messages, enable_thinking)

    # --- requests come and go ---

    def add_request(self, request: Request) -> None:
        """Queues a request; its first sample now, the others when they can share its prompt."""
        assert request.request_id not in self._groups, "request id is taken"
        seed = request.params.seed
        group = Group(request, self._random.getrandbits(63) if seed is None else seed)
        self._groups[request.request_id] = group
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
        self._add_sample(group)

    def _add_sample(self, group: Group) -> None:
        request, index = group.request, len(group.samples)
        plan = request.thinking
        seed = sample_seed(group.seed, index)
        sample = self._make_sample(group, next(self._next_id), index, seed, request.params)
        maximum = plan.max_thinking if plan else 0
        for budget in plan.checkpoints if plan else ():
            sample.awaited[next(self._next_id)] = budget
        group.samples.append(sample)
        self.scheduler.add(
            sample.sequence,
            request.prompt,
            max_len=request.max_len,
            priority=request.priority,
            stop_tokens=request.stop_tokens,
            watched=True,
            salt=request.salt,
            budget=plan.params if plan else None,
            thinking_tokens=plan.thought if plan else -1,
            max_thinking=maximum,
            checkpoints=[(b, child) for child, b in sample.awaited.items() if b < maximum],
            loop_repeats=plan.loop_repeats if plan else 0,
        )
        self._adopt()
        if group.limit is not None:
            self._limit_samples(group, THINKING_NOW, group.limit)

    def _make_sample(
        self, group: Group, sequence: int, index: int, seed: int, params: SamplingParams
    ) -> Sample:
        thinks = group.request.thinking is not None
        stream = SampleStream(index, params, self.tokenizer, thinks=thinks)
        sample = self._sequences[sequence] = Sample(group, sequence, stream, seed)
        return sample

    def _adopt(self) -> None:
        """Children that the scheduler forked off become samples of their own; log-probabilities
        are of tokens that a sequence sampled itself, so children have none."""
        for child, parent in self.scheduler.forked:
            sample = self._sequences[parent]
            params = replace(sample.stream.params, logprobs=None)
            index = sample.stream.index
            forked = self._make_sample(sample.group, child, index, sample.seed, params)
            forked.budget = sample.awaited.pop(child)
            sample.children.append(forked)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks. Returns what it has so far; None if there
        is no such request."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        while not group.complete:
            self._add_sample(group)
        for sample in group.all_samples():
            if not sample.finished:
                self.scheduler.finish(sample.sequence, _core.FinishReason.ABORT)
                self._push(sample)
        return self._finish(group)

    def end_thinking(self, request_id: str) -> bool:
        """Tells a live request to answer now. False if there is no such request."""
        return self._limit(request_id, _core.EndReason.CLIENT)

    def _limit(self, request_id: str, reason: _core.EndReason) -> bool:
        group = self._groups.get(request_id)
        if group is None:
            return False
        group.limit = reason
        self._limit_samples(group, THINKING_NOW, reason)
        return True

    def _limit_samples(self, group: Group, maximum: int, reason: _core.EndReason) -> None:
        for sample in group.all_samples():
            self.scheduler.limit_thinking(sample.sequence, maximum, reason)

    @property
    def has_unfinished(self) -> bool:
        """Is there anything to step for?"""
        return bool(self._groups)

    # --- stepping ---

    def step(self) -> list[Event]:
        """Computes one step, or follows the device through several. Returns chunks and checkpoints
        of streaming requests, and outputs of finished ones."""
        self._enforce_deadlines()
        ahead = self.runner.ahead
        if ahead is not None and ahead.in_flight:
            return self._follow(ahead)
        batch = self.runner.batch
        for sequence in self.scheduler.schedule(batch.core):
            self._seat(self._sequences[sequence])
        if batch.core.num_rows == 0:
            return []
        if ahead is not None and self._begin_run(ahead):
            return self._follow(ahead)
        sampled = self.runner.execute()
        self.scheduler.update(sampled.token_ids)
        self.runner.sampler.observe(*self.scheduler.appended)
        self._adopt()
        return self._collect(sampled.logprobs)

    def _begin_run(self, ahead: CudaGraphRunner) -> bool:
        """Hands the planned step and those after it to the device, if it can decide them all."""
        batch, sampler = self.runner.batch, self.runner.sampler
        seats = batch.seats
        lanes = ahead.lanes(batch.core.num_rows)
        if lanes is None or len(seats) < batch.core.num_rows or sampler.needs_host(seats):
            return False
        steps = self.scheduler.begin_run(
            batch.core, lanes.core, steps=ahead.max_steps, max_pending=MAX_RIDE
        )
        if steps:
            sampler.write(lanes, seats)
            ahead.begin(lanes, len(seats), steps)
        return steps > 0

    def _follow(self, ahead: CudaGraphRunner) -> list[Event]:
        """Launches the next steps of the run, then takes what the steps before have sampled."""
        steps = self.scheduler.extend_run(self.runner.batch.core, ahead.max_steps)
        if steps:
            ahead.launch(steps)
        self.scheduler.replay(ahead.collect())
        self._adopt()
        return self._collect({})

    def _enforce_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            self._limit(heapq.heappop(self._deadlines)[1], _core.EndReason.DEADLINE)

    def _seat(self, sample: Sample) -> None:
        group = sample.group
        group.scheduled_at = group.scheduled_at or time.monotonic()
        self.runner.sampler.seat(
            self.scheduler.seat(sample.sequence),
            sample.stream.params,
            sample.seed,
            self.scheduler.tokens(sample.sequence),
            len(group.request.prompt),
        )

    def _collect(self, logprobs: dict[int, RowLogprobs]) -> list[Event]:
        events: list[Event] = []
        for sequence, seat in self.scheduler.progressed:
            sample = self._sequences[sequence]
            group = sample.group
            name, streams = group.request.request_id, group.request.stream
            chunk = self._push(sample, logprobs.get(seat))
            self._first_token(sample)
            if streams and sample.budget is None:
                events.append((name, chunk))
            if not sample.finished:
                continue
            checkpoints = self._finish_sample(sample)
            if streams:
                events += [(name, checkpoint) for checkpoint in checkpoints]
            if group.finished:
                events.append((name, self._finish(group)))
        return events

    def _first_token(self, sample: Sample) -> None:
        """Now the prompt is cached, so further samples find it; and few need watching on."""
        group = sample.group
        if group.first_token_at is None:
            group.first_token_at = time.monotonic()
            while not group.complete:
                self._add_sample(group)
        params = sample.stream.params
        shown = group.request.stream and sample.budget is None
        if not (shown or params.stop or params.logprobs is not None):
            self.scheduler.unwatch(sample.sequence)

    def _push(self, sample: Sample, row: RowLogprobs | None = None) -> Chunk:
        """Hands what a sequence gained to its stream, and ends it on a stop string."""
        progress = self.scheduler.take(sample.sequence)
        if sample.group.cached_tokens is None:
            sample.group.cached_tokens = progress["num_cached"]
        chunk = sample.stream.push(progress, row)
        if sample.stream.hit_stop_string:
            self.scheduler.finish(sample.sequence, _core.FinishReason.STOP)
        return chunk

    def _finish_sample(self, sample: Sample) -> list[CheckpointOutput]:
        """The checkpoints that are answered by the end of ``sample``; if they agree for long
        enough, its parent has thought enough."""
        if sample.budget is None:
            return sample.shared_checkpoints()
        budget = sample.group.request.params.thinking
        parent = sample.group.samples[sample.stream.index]
        assert budget is not None
        if budget.early_exit is not None and parent.agrees(budget.early_exit):
            reason = _core.EndReason.CONVERGED
            self.scheduler.limit_thinking(parent.sequence, budget.min_tokens, reason)
        return [CheckpointOutput(sample.budget, sample.stream.output())]

    def _finish(self, group: Group) -> RequestOutput:
        request = group.request
        for sample in group.all_samples():
            self.scheduler.remove(sample.sequence)
            del self._sequences[sample.sequence]
        del self._groups[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt.tolist(),
            outputs=[sample.stream.output() for sample in group.samples],
            usage=group.usage(),
            timing=group.timing(time.monotonic()),
            checkpoints=[c for sample in group.samples for c in sample.checkpoints()],
        )
