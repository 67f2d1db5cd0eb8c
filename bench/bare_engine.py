"""Scheduler and runner without text: steps of random models of any shape.

Schedules, multi-step decode and budgets as in LLMEngine.step, without requests and detokenisation,
so that the cost of a step can be measured without that of its text.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.multi_step import begin_run, follow
from s1engine.models.decoder import Decoder
from s1engine.models.loader import random_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops import Ops, select_ops
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.resolved_config import resolve_cache_dtype, resolve_config, resolve_dtype
from s1engine.runner.sampler import SamplerOutput
from s1engine.sampling_params import SamplingParams

TRIGGERS = (2,)
FORMAT_IDS = {"natural_end": [3], "newline": [4]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One sequence to generate; ``thinks``: with a budget, three waits and a forced end."""

    prompt: list[int]
    max_new: int
    thinks: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class BareEngine:
    """A random model that runs jobs; engines may share a ``decoder``.

    Args:
        config: not resolved; its ``model`` is ignored.
        model: the shapes.
    """

    config: EngineConfig
    model: ModelConfig
    decoder: Decoder
    runner: ModelRunner = field(init=False)
    scheduler: _core.Scheduler = field(init=False)
    _jobs: dict[int, Job] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        config = resolve_config(self.config)
        assert config.block_size is not None
        self._newlines = np.zeros(self.model.vocab_size, np.uint8)
        self.runner = ModelRunner(
            config,
            self.model,
            self.decoder,
            vocab_limit=self.model.vocab_size,
            triggers=TRIGGERS,
            newlines=self._newlines,
            progress=False,
        )
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
        self._format = _core.BudgetFormat(
            triggers=list(TRIGGERS), newline_always=False, ends_in_newline=self._newlines,
            **FORMAT_IDS,
        )  # fmt: skip

    _newlines: np.ndarray = field(init=False)
    _format: _core.BudgetFormat = field(init=False)

    def add(self, job: Job) -> int:
        """Queue a job; returns its id."""
        job_id = len(self._jobs)
        self._jobs[job_id] = job
        budget = _core.BudgetParams(
            format=self._format, wait=[5, 6], forced_end=[3, 7, 8], delimiter_len=1,
            min_thinking=0, num_waits=3,
        )  # fmt: skip
        self.scheduler.add(
            job_id,
            np.array(job.prompt, np.int32),
            max_len=len(job.prompt) + job.max_new,
            budget=budget if job.thinks else None,
            thinking_tokens=0 if job.thinks else -1,
            max_thinking=max(job.max_new - 16, 1),
        )
        return job_id

    def step(self) -> int:
        """Run one step, or apply those that the device ran; returns their number."""
        multi_step, core = self.runner.multi_step, self.runner.batch.core
        if multi_step is not None and multi_step.in_flight:
            return follow(self.scheduler, self.runner)
        begin = time.monotonic()
        for job_id in self.scheduler.schedule(core):
            self._admit(job_id)
        if core.num_rows == 0:
            return 0
        if begin_run(self.scheduler, self.runner):
            return follow(self.scheduler, self.runner)
        self.scheduler.update(self._execute().token_ids)
        if not self.runner.recorded_now:
            self.scheduler.record_step_time(time.monotonic() - begin)
        return 1

    def _execute(self) -> SamplerOutput:
        return self.runner.execute()

    def _admit(self, job_id: int) -> None:
        job = self._jobs[job_id]
        params = SamplingParams(temperature=job.temperature)
        req_index, tokens = self.scheduler.req_index(job_id), self.scheduler.tokens(job_id)
        self.runner.sampler.add_request(req_index, params, job.seed, tokens, len(job.prompt))

    def run_jobs(self) -> int:
        """Step until every job is done; returns the number of steps."""
        steps = 0
        while self.scheduler.has_unfinished():
            steps += self.step()
        while self.runner.multi_step is not None and self.runner.multi_step.in_flight:
            self.step()
        return steps

    def output_tokens(self, job_id: int) -> list[int]:
        """All tokens of a job after its prompt."""
        return self.scheduler.tokens(job_id)[len(self._jobs[job_id].prompt) :]


def make_decoder(model: ModelConfig, config: EngineConfig, ops: Ops | None = None) -> Decoder:
    """A decoder with random weights for an engine of that configuration."""
    resolved = resolve_config(config)
    assert resolved.block_size is not None
    dtype = resolve_dtype(config.dtype, resolved.device, model.torch_dtype)
    ops = ops or select_ops(resolved.device)
    ops.check_model(
        head_dim=model.head_dim,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        block_size=resolved.block_size,
        dtype=dtype,
        cache_dtype=resolve_cache_dtype(config.kv_cache_dtype, dtype),
        quantization=config.quantization,
    )
    return random_decoder(model, dtype, resolved.device, ops, quantization=config.quantization)
