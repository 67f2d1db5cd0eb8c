"""Scheduler and runner without text: steps of random models of any shape.

Schedules, multi-step decode and budgets as in LLMEngine.step, without requests and detokenisation,
so that the cost of a step can be measured without that of its text.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import make_scheduler
from s1engine.engine.multi_step import MultiStepDecoder, make_multi_step
from s1engine.models.decoder import Decoder
from s1engine.models.loader import random_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops import Ops, select_ops
from s1engine.runner.interface import ModelRunnerOutput, NewRequest, SchedulerOutput
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.resolved_config import resolve_cache_dtype, resolve_config, resolve_dtype
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import SamplingParams

TRIGGERS = (2,)
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One sequence to generate; ``thinks``: with a budget, three waits and a forced end."""

    prompt: list[int]
    max_new: int
    thinks: bool = False
    params: SamplingParams = GREEDY
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
    _multi_step: MultiStepDecoder | None = field(init=False)
    _jobs: dict[int, Job] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        config = resolve_config(self.config)
        self._newlines = np.zeros(self.model.vocab_size, np.uint8)
        self.runner = ModelRunner(
            config,
            self.model,
            self.decoder,
            vocab_limit=self.model.vocab_size,
            ends=ThinkingEnds(TRIGGERS),
            newlines=self._newlines,
            progress=False,
        )
        self.scheduler = make_scheduler(config, self.runner)
        self._multi_step = make_multi_step(config, self.scheduler, self.runner)
        self._format = _core.BudgetFormat(
            triggers=list(TRIGGERS), natural_end=[3], newline=[4], newline_always=False,
            ends_in_newline=self._newlines,
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
        multi_step = self._multi_step
        if multi_step is not None and multi_step.in_flight:
            return multi_step.advance()
        core = self.runner.next_batch()
        begin = time.monotonic()
        new = [self._admit(job_id) for job_id in self.scheduler.schedule(core)]
        step = SchedulerOutput(new, self.scheduler.appended)
        if core.num_rows == 0:
            return 0
        if multi_step is not None and multi_step.begin(step):
            return multi_step.advance()
        output = self._execute(step)
        self.scheduler.update(output.token_ids)
        if not output.recorded_now:
            self.scheduler.record_step_time(time.monotonic() - begin)
        return 1

    def _execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        return self.runner.execute(step)

    def _admit(self, job_id: int) -> NewRequest:
        job = self._jobs[job_id]
        return NewRequest(
            self.scheduler.req_index(job_id),
            job.params,
            job.seed,
            self.scheduler.tokens(job_id),
            len(job.prompt),
        )

    def run_jobs(self) -> int:
        """Step until every job is done; returns the number of steps."""
        steps = 0
        while self.scheduler.has_unfinished():
            steps += self.step()
        while self._multi_step is not None and self._multi_step.in_flight:
            self.step()
        return steps

    def wait_for_first_token(self, job_id: int) -> None:
        """Step until the job has an output token. Prompts are computed in the order of ``add``."""
        while not self.output_tokens(job_id):
            self.step()

    def end_jobs(self) -> None:
        """End all jobs; no step is in flight afterwards."""
        for job_id in self._jobs:
            self.scheduler.finish(job_id, _core.FinishReason.ABORT)
        while self._multi_step is not None and self._multi_step.in_flight:
            self.step()

    def output_tokens(self, job_id: int) -> list[int]:
        """All tokens of a job after its prompt."""
        return self.scheduler.tokens(job_id)[len(self._jobs[job_id].prompt) :]


def make_decoder(model: ModelConfig, config: EngineConfig, ops: Ops | None = None) -> Decoder:
    """A decoder with random weights for an engine of that configuration."""
    resolved = resolve_config(config)
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
