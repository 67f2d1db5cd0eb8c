"""Plans every combination of GPUs, rate and budget, by roofline and by simulation."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from s1engine.config import EngineConfig
from s1engine.errors import RequestError
from s1engine.models.model_config import ModelConfig
from s1engine.plan import hardware, workload
from s1engine.plan.options import PlanOptions
from s1engine.plan.placement import Placement, footprint, place_on_gpus, placement_of
from s1engine.plan.roofline import roofline
from s1engine.plan.simulation import simulate
from s1engine.plan.step_time import (
    GpuTimeModel,
    SpeculativeTimeModel,
    StepTimeModel,
    decode_step,
    draft_choices,
)
from s1engine.plan.workload import PlannedBudget, PlannedRequest
from s1engine.runner.resolved_config import resolve_config, resolve_dtype

logger = logging.getLogger(__name__)

SHARES = (
    f"bandwidth {hardware.READ_SHARE:.0%} of the data sheet, products {hardware.MATMUL_SHARE:.0%} "
    f"and attention over prompts {hardware.ATTENTION_SHARE:.0%} of the 16-bit peak, links "
    f"{hardware.LINK_SHARE:.0%}",
    f"{hardware.KERNELS_PER_LAYER} kernels a layer, {hardware.KERNEL_GAP_US:g} us between two; "
    "host work overlaps the device",
    "quantized weights save bytes, not operations",
)
LINKS = (
    "ring all-reduces over {gb:g} GB/s a direction, {us:g} us for an empty one; kernels follow "
    "each other as in a graph, which steps of several GPUs do not have yet"
)
DRAFTS = "drafts where they pay, in steps without prompts; drafting costs no host time"
SCRIPTS = (
    "max_tokens of every request is its output; prompts share the blocks that the trace names, "
    "else none",
)


@dataclass(frozen=True, slots=True)
class PlannedEngine:
    """One engine of the plan, and the time model of its steps."""

    placement: Placement
    time: StepTimeModel
    facts: dict[str, Any]
    assumptions: tuple[str, ...]


def build_plan(config: EngineConfig, model: ModelConfig, options: PlanOptions) -> dict[str, Any]:
    """The plan as JSON data, in seconds, bytes and tokens. Raises RequestError."""
    gpus = options.numbers_of_gpus(config.tensor_parallel_size)
    rates, budgets = options.rates(), options.budgets()
    requests = load_requests(options, config.seed)
    engine = _calibrated(config, model) if options.is_cpu else _on_gpus(config, model, options)
    cases = []
    left_out = 0
    for limit in budgets:
        budget = PlannedBudget(
            max_thinking=limit, num_waits=options.num_waits, wait_thinking=options.wait_thinking
        )
        fitting = _fitting(requests, engine.placement, budget)
        left_out = max(left_out, len(requests) - len(fitting))
        for rate in rates:
            paced = workload.pace_requests(fitting, rate, config.seed)
            cases += list(_cases(engine, paced, options, budget, gpus, rate))
    mean = fmean(workload.max_len(request, PlannedBudget()) for request in requests)
    return {
        "engine": _placement_facts(engine, mean) | engine.facts,
        "workload": _workload_facts(requests, options) | {"left_out": left_out},
        "assumptions": [*engine.assumptions, *SCRIPTS],
        "cases": cases,
    }


def load_requests(options: PlanOptions, seed: int) -> list[PlannedRequest]:
    """The requests of the trace, or random ones. Raises RequestError."""
    if options.trace is not None:
        arrivals = workload.read_trace(Path(options.trace))[: options.requests]
        if not arrivals:
            raise RequestError(f"trace: {options.trace} is empty", param="trace")
    else:
        lengths = (options.input_len, options.output_len)
        arrivals = workload.random_arrivals(options.requests, *lengths, options.spread, seed)
    return workload.plan_requests(arrivals, options.thinking_share)


def _fitting(
    requests: Sequence[PlannedRequest], placement: Placement, budget: PlannedBudget
) -> list[PlannedRequest]:
    """The requests that fit the context."""
    fitting = [
        request
        for request in requests
        if workload.max_len(request, budget) <= placement.max_model_len
    ]
    if not fitting:
        raise RequestError(
            f"no request fits the context of {placement.max_model_len} tokens; the shortest needs "
            f"{min(workload.max_len(request, budget) for request in requests)}",
            param="input_len" if placement.max_model_len else "max_model_len",
        )
    start = fitting[0].at
    return [replace(request, at=request.at - start) for request in fitting]


def _cases(
    engine: PlannedEngine,
    requests: Sequence[PlannedRequest],
    options: PlanOptions,
    budget: PlannedBudget,
    gpus: Sequence[int],
    rate: float | None,
) -> Iterator[dict[str, Any]]:
    """The cases of one rate and budget, one for each number of GPUs."""
    place, time = engine.placement, engine.time
    for number in gpus:
        replicas = number // place.footprint.ranks
        logger.info("simulating %d requests on %d GPUs", len(requests), number)
        simulation = simulate(
            requests, place, time, budget=budget, replicas=replicas, routing=options.routing
        )
        yield {
            "gpus": number,
            "replicas": replicas,
            "requests_per_s": None if rate in (None, float("inf")) else rate,
            "thinking_budget": budget.max_thinking,
            "roofline": roofline(requests, place, time, budget=budget, replicas=replicas),
            "simulated": simulation.summary(),
        }


def _on_gpus(config: EngineConfig, model: ModelConfig, options: PlanOptions) -> PlannedEngine:
    gpu = options.device()
    dtype = resolve_dtype(config.dtype, "cuda", model.torch_dtype)
    weights = config.quantization or options.weights
    if options.weights not in ("auto", weights):
        raise RequestError(
            f"weights {options.weights} and quantization {weights} are both given", param="weights"
        )
    if weights == "auto":
        weights = model.quantization(None) or "auto"  # a checkpoint in fp8
    place = place_on_gpus(config, model, dtype, gpu, weights=weights)
    facts: dict[str, Any] = {"gpu": asdict(gpu), "weights": weights}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    time: StepTimeModel = GpuTimeModel(gpu, place.footprint)
    assumptions: tuple[str, ...] = SHARES
    if config.tensor_parallel_size > 1:
        assumptions += (LINKS.format(gb=gpu.link_gb_per_s, us=gpu.link_us),)
    if most := config.num_speculative_tokens:
        time = SpeculativeTimeModel(time, draft_choices(most, options.acceptance_probability()))
        facts |= {"num_speculative_tokens": most, "acceptance": options.acceptance}
        assumptions += (DRAFTS,)
    return PlannedEngine(place, time, facts, assumptions)


def _calibrated(config: EngineConfig, model: ModelConfig) -> PlannedEngine:
    """This machine's CPU. Raises RequestError for options that calibration does not cover."""
    for name, most in (("tensor_parallel_size", 1), ("num_speculative_tokens", 0)):
        if getattr(config, name) > most:
            raise RequestError(f"{name}: calibration of a CPU does not cover it", param=name)
    from s1engine.plan.calibration import (
        PASSES,
        calibration_engine,
        fit_calibration,
        measure_steps,
        warm_up,
    )

    config = resolve_config(replace(config, device="cpu"))
    dtype = resolve_dtype(config.dtype, "cpu", model.torch_dtype)
    measuring = calibration_engine(config, model)
    warm_up(measuring)
    step_time, error = fit_calibration([measure_steps(measuring) for _ in range(PASSES)])
    weights = config.quantization or "auto"
    foot = footprint(model, dtype, weights=weights, kv_cache_dtype=config.kv_cache_dtype)
    place = placement_of(config, model, foot)
    facts = {
        "gpu": {"name": hardware.CPU},
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "time_model": step_time.to_json(),
        "fit_error": error,
    }
    fit = f"steps as measured here, kernels compiled; the largest error of the fit is {error:.0%}"
    return PlannedEngine(
        place, step_time, facts, (fit, "several CPUs are several machines like this one")
    )


def _placement_facts(engine: PlannedEngine, mean: float) -> dict[str, Any]:
    place, foot = engine.placement, engine.placement.footprint
    alone = engine.time.seconds(decode_step(1, mean / 2))
    return {
        "tensor_parallel_size": foot.ranks,
        "kv_cache_dtype": str(foot.cache_dtype).removeprefix("torch."),
        "weight_bytes": round(foot.weight_bytes),
        "weight_bytes_per_gpu": round(foot.weight_bytes_per_rank),
        "step_bytes_per_gpu": round(foot.activation_bytes),
        "kv_bytes_per_token": foot.kv_bytes_per_token,
        "kv_cache_tokens": place.kv_cache_tokens,
        "max_model_len": place.max_model_len,
        "largest_batch": place.largest_batch(mean),
        "largest_batch_at_max_model_len": place.largest_batch(place.max_model_len),
        "tokens_per_s_alone": 1 / alone,
    }


def _workload_facts(requests: Sequence[PlannedRequest], options: PlanOptions) -> dict[str, Any]:
    return {
        "trace": options.trace,
        "requests": len(requests),
        "mean_input": fmean(request.prompt_len for request in requests),
        "mean_output": fmean(request.answer + (request.thinking or 0) for request in requests),
        "thinking_share": options.thinking_share,
        "num_waits": options.num_waits,
        "routing": options.routing,
    }
