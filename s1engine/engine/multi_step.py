"""Multi-step decode: the device decodes several steps while the host applies those before.

Connects scheduler and runner, which do not know each other. Owns the choice between a single step
and a multi-step decode; requests and their outputs are the engine's.
"""

import numpy as np

from s1engine import _core
from s1engine.runner.interface import Runner, SchedulerOutput
from s1engine.runner.resolved_config import ResolvedConfig

MAX_INLINE_TOKENS = 8  # of a forced phrase, fed one token a step; longer ones are one extend


class MultiStepDecoder:
    """Decode steps that the device takes by itself, budgets included."""

    def __init__(self, scheduler: _core.Scheduler, runner: Runner, max_num_seqs: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._needs_single_step = np.zeros(max_num_seqs, np.bool_)  # by req_index

    @property
    def in_flight(self) -> bool:
        """Are there steps that the host has not applied?"""
        return self._scheduler.num_steps_in_flight > 0

    def begin(self, step: SchedulerOutput) -> bool:
        """Launches the scheduled step and those after it, if the device can decide them all."""
        runner, core = self._runner, self._runner.batch.core
        for request in step.new_requests:
            self._needs_single_step[request.req_index] = request.needs_single_step
        if step.has_structured_output or core.num_samples < core.num_rows:
            return False
        device_batch = runner.device_batch(core.num_rows)
        if device_batch is None or self._needs_single_step[runner.batch.req_indices].any():
            return False
        num_steps = self._scheduler.begin_multi_step(
            core,
            device_batch.core,
            num_steps=runner.max_steps,
            max_inline_tokens=MAX_INLINE_TOKENS,
        )
        if num_steps == 0:
            return False
        step.device_batch, step.num_steps = device_batch, num_steps
        runner.begin_multi_step(step)
        return True

    def advance(self) -> int:
        """Launches the next steps, then waits for the oldest launch and applies its tokens. Returns
        how many steps these were."""
        scheduler, runner = self._scheduler, self._runner
        num_steps = scheduler.extend_multi_step(runner.batch.core, runner.max_steps)
        if num_steps:
            runner.extend_multi_step(num_steps)
        output = runner.collect()
        scheduler.apply_multi_step(output.token_ids, output.device_seconds)
        return len(output.token_ids)


def make_multi_step(
    config: ResolvedConfig, scheduler: _core.Scheduler, runner: Runner
) -> MultiStepDecoder | None:
    """None: the host decides every step."""
    if runner.max_steps == 1:
        return None
    return MultiStepDecoder(scheduler, runner, config.max_num_seqs)
