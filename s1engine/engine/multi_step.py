"""Letting the device run ahead: a planned decode step becomes a run, and the host follows it.

Between scheduler and runner, which know nothing of each other; who asks for the tokens, and what
becomes of them, is up to the engine.
"""

from s1engine import _core
from s1engine.runner.model_runner import Runner

MAX_RIDE = 8  # tokens of a phrase that are fed one a step in a run, rather than as one extend


def begin_run(scheduler: _core.Scheduler, runner: Runner) -> bool:
    """Hands the planned step and those after it to the device, if it can decide them all."""
    ahead, batch, sampler = runner.multi_step, runner.batch, runner.sampler
    if ahead is None or batch.core.num_samples < batch.core.num_rows:
        return False
    lanes, req_indices = ahead.lanes(batch.core.num_rows), batch.req_indices
    if lanes is None or sampler.needs_single_step(req_indices):
        return False
    steps = scheduler.begin_multi_step(
        batch.core, lanes.core, num_steps=ahead.max_steps, max_inline_tokens=MAX_RIDE
    )
    if steps:
        sampler.write(lanes, req_indices)
        ahead.begin(lanes, len(req_indices), steps)
    return steps > 0


def follow(scheduler: _core.Scheduler, runner: Runner) -> int:
    """Launches the next steps of the run under way, then replays what the steps before have
    sampled. Returns how many these were."""
    ahead = runner.multi_step
    assert ahead is not None and ahead.in_flight
    steps = scheduler.extend_multi_step(runner.batch.core, ahead.max_steps)
    if steps:
        ahead.launch(steps)
    tokens = ahead.collect()
    scheduler.apply_multi_step(tokens)
    return len(tokens)
