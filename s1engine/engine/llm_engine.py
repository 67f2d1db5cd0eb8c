"""The engine: requests in, one step at a time, chunks and finished outputs out.

Composes tokenizer, scheduler and runner; each knows nothing of the others. Not thread-safe: one
thread adds, steps and aborts (AsyncLLMEngine gives it one); only ``make_request`` may be called
from anywhere.
"""

import hashlib
import heapq
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Any

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.request import Prompt, Request, RequestCompiler
from s1engine.engine.sample_stream import SampleStream
from s1engine.models.config import ModelConfig
from s1engine.models.loader import resolve_model
from s1engine.outputs import Chunk, RequestOutput, Timing, Usage
from s1engine.reasoning import detect_format
from s1engine.runner.model_runner import ModelRunner, Runner
from s1engine.runner.sampler import RowLogprobs
from s1engine.sampling_params import SamplingParams
from s1engine.tokenizer import Tokenizer

Event = tuple[str, Chunk | RequestOutput]
THINKING_NOW = 0  # a maximum that ends thinking at the next token


@dataclass(slots=True)
class _Sample:
    """A sequence of a request in the scheduler."""

    group: "_Group"
    stream: SampleStream
    seed: int


@dataclass(slots=True)
class _Group:
    """A live request: its samples, and what is known of its time."""

    request: Request
    seed: int
    limit: _core.EndReason | None = None  # thinking was told to end, and why
    sequences: list[int] = field(default_factory=list)
    samples: list[_Sample] = field(default_factory=list)
    cached_tokens: int | None = None
    scheduled_at: float | None = None
    first_token_at: float | None = None

    @property
    def finished(self) -> bool:
        done = sum(sample.stream.finish_reason is not None for sample in self.samples)
        return done == self.request.params.n


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
        self.config = config
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
        self._compiler = RequestCompiler(
            self.tokenizer,
            self.format,
            self.model_config,
            vocab_limit=vocab_limit,
            max_model_len=self.max_model_len,
        )
        self._random = random.Random(config.seed)
        self._next_id = itertools.count()
        self._groups: dict[str, _Group] = {}
        self._sequences: dict[int, _Sample] = {}
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
        group = _Group(request, self._random.getrandbits(63) if seed is None else seed)
        self._groups[request.request_id] = group
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
        self._add_sample(group)

    def _add_sample(self, group: _Group) -> None:
        request, index = group.request, len(group.samples)
        thinking = request.thinking
        stream = SampleStream(index, request.params, self.tokenizer, thinks=thinking is not None)
        sample = _Sample(group, stream, sample_seed(group.seed, index))
        sequence = next(self._next_id)
        self.scheduler.add(
            sequence,
            request.prompt,
            max_len=request.max_len,
            priority=request.priority,
            stop_tokens=request.stop_tokens,
            watched=True,
            salt=request.salt,
            budget=thinking.params if thinking else None,
            thinking_tokens=thinking.thought if thinking else -1,
            max_thinking=thinking.max_thinking if thinking else 0,
        )
        if group.limit is not None:
            self.scheduler.limit_thinking(sequence, THINKING_NOW, group.limit)
        group.samples.append(sample)
        group.sequences.append(sequence)
        self._sequences[sequence] = sample

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks. Returns what it has so far; None if there
        is no such request."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        while len(group.samples) < group.request.params.n:
            self._add_sample(group)
        for sequence, sample in zip(group.sequences, group.samples, strict=True):
            if sample.stream.finish_reason is None:
                self.scheduler.finish(sequence, _core.FinishReason.ABORT)
                self._push(sequence)
        return self._finish(group)

    def end_thinking(self, request_id: str) -> bool:
        """Tells a live request to answer now. False if there is no such request."""
        return self._limit(request_id, _core.EndReason.CLIENT)

    def _limit(self, request_id: str, reason: _core.EndReason) -> bool:
        group = self._groups.get(request_id)
        if group is None:
            return False
        group.limit = reason
        for sequence in group.sequences:
            self.scheduler.limit_thinking(sequence, THINKING_NOW, reason)
        return True

    @property
    def has_unfinished(self) -> bool:
        """Is there anything to step for?"""
        return bool(self._groups)

    # --- stepping ---

    def step(self) -> list[Event]:
        """Computes one step. Returns chunks of streaming requests and outputs of finished ones."""
        self._enforce_deadlines()
        batch = self.runner.batch
        for sequence in self.scheduler.schedule(batch.core):
            self._seat(sequence)
        if batch.core.num_rows == 0:
            return []
        sampled = self.runner.execute()
        self.scheduler.update(sampled.token_ids)
        self.runner.sampler.observe(*self.scheduler.appended)
        return self._collect(sampled.logprobs)

    def _enforce_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            self._limit(heapq.heappop(self._deadlines)[1], _core.EndReason.DEADLINE)

    def _seat(self, sequence: int) -> None:
        sample = self._sequences[sequence]
        group = sample.group
        group.scheduled_at = group.scheduled_at or time.monotonic()
        self.runner.sampler.seat(
            self.scheduler.seat(sequence),
            group.request.params,
            sample.seed,
            self.scheduler.tokens(sequence),
            len(group.request.prompt),
        )

    def _collect(self, logprobs: dict[int, RowLogprobs]) -> list[Event]:
        events: list[Event] = []
        for sequence, seat in self.scheduler.progressed:
            sample = self._sequences[sequence]
            group = sample.group
            chunk = self._push(sequence, logprobs.get(seat))
            self._first_token(group, sequence)
            if group.request.stream:
                events.append((group.request.request_id, chunk))
            if sample.stream.finish_reason is not None and group.finished:
                events.append((group.request.request_id, self._finish(group)))
        return events

    def _first_token(self, group: _Group, sequence: int) -> None:
        """Now the prompt is cached, so further samples find it; and few need watching on."""
        if group.first_token_at is None:
            group.first_token_at = time.monotonic()
            for _ in range(group.request.params.n - 1):
                self._add_sample(group)
        params = group.request.params
        if not (group.request.stream or params.stop or params.logprobs is not None):
            self.scheduler.unwatch(sequence)

    def _push(self, sequence: int, row: RowLogprobs | None = None) -> Chunk:
        """Hands what a sequence gained to its stream, and ends it on a stop string."""
        sample = self._sequences[sequence]
        progress = self.scheduler.take(sequence)
        if sample.group.cached_tokens is None:
            sample.group.cached_tokens = progress["num_cached"]
        chunk = sample.stream.push(progress, row)
        if sample.stream.hit_stop_string:
            self.scheduler.finish(sequence, _core.FinishReason.STOP)
        return chunk

    def _finish(self, group: _Group) -> RequestOutput:
        request = group.request
        for sequence in group.sequences:
            self.scheduler.remove(sequence)
            del self._sequences[sequence]
        del self._groups[request.request_id]
        outputs = [sample.stream.output() for sample in group.samples]
        now = time.monotonic()
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt.tolist(),
            outputs=outputs,
            usage=Usage(
                prompt_tokens=len(request.prompt),
                completion_tokens=sum(len(output.token_ids) for output in outputs),
                cached_tokens=group.cached_tokens or 0,
                reasoning_tokens=sum(o.thinking.tokens for o in outputs if o.thinking),
            ),
            timing=Timing(
                queue_s=(group.scheduled_at or now) - request.arrival,
                ttft_s=(group.first_token_at or now) - request.arrival,
                total_s=now - request.arrival,
            ),
        )


def sample_seed(seed: int, index: int) -> int:
    """Key of the noise of sample ``index``: the seed itself for the first, a hash for others.

    Returned as a signed 64-bit integer, the form in which tensors hold it."""
    if index == 0:
        key = seed % 2**64
    else:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
    return key - 2**64 if key >= 2**63 else key
