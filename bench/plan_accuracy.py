"""Predicted against measured: the simulation of ``s1engine info --plan`` beside the real engine.

A real engine with random weights is calibrated and answers requests, in turns. Then the same
requests are simulated in virtual time, with step times from the calibrations, and the error of each
figure is reported.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.engine.core_output import request_number
from s1engine.engine.llm_engine import LLMEngine
from s1engine.models.model_config import ModelConfig
from s1engine.plan.calibration import (
    FIRST_ID,
    LAST_ID,
    MAX_MODEL_LEN,
    FittedTimeModel,
    calibration_engine,
    fit_calibration,
    measure_steps,
    warm_up,
)
from s1engine.plan.placement import Placement, footprint, placement_of
from s1engine.plan.request_metrics import RequestMetrics, summarize_requests
from s1engine.plan.simulation import simulate
from s1engine.plan.workload import (
    PlannedBudget,
    PlannedRequest,
    pace_requests,
    plan_requests,
    random_arrivals,
)
from s1engine.runner.resolved_config import resolve_config, resolve_dtype
from s1engine.sampling_params import SamplingParams

COMPARED = ("tokens_per_s", "ttft_s", "tpot_s", "e2e_s")
PROMISED = ("tokens_per_s", "tpot_s", "e2e_s")
NO_BUDGET = PlannedBudget()


def small() -> ModelConfig:
    """25 million weights: in bfloat16 more than a processor's caches."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 4096,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    return replace(shape("nano"), **sizes)


SHAPES = {"nano": lambda: shape("nano"), "25M": small}


def workloads(rate: float, count: int) -> dict[str, list[PlannedRequest]]:
    """Requests of each workload; ``rate``: arrivals a second of the Poisson one."""
    mixed = plan_requests(random_arrivals(count, 128, 96, 0.75, seed=1), 0.0)
    return {
        "1": plan_requests(random_arrivals(1, 64, 256, 0.0, seed=1), 0.0),
        "16": plan_requests(random_arrivals(16, 64, 128, 0.0, seed=1), 0.0),
        "64 mixed": plan_requests(random_arrivals(64, 128, 96, 0.75, seed=1), 0.0),
        "Poisson": pace_requests(mixed, rate, seed=1),
    }


def answer_requests(engine: LLMEngine, planned: Sequence[PlannedRequest]) -> list[RequestMetrics]:
    """Add each request at its time and step until all are answered."""
    rng = random.Random(0)
    prompts = [[rng.randrange(FIRST_ID, LAST_ID) for _ in range(p.prompt_len)] for p in planned]
    metrics: dict[int, RequestMetrics] = {}
    waiting, begin = list(reversed(list(enumerate(planned)))), time.perf_counter()
    while waiting or engine.has_unfinished:
        now = time.perf_counter() - begin
        while waiting and waiting[-1][1].at <= now:
            number, one = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=one.answer, ignore_eos=True)
            request = engine.make_request(prompts[number], params)
            metrics[request.number] = RequestMetrics(number, one, output_tokens=one.answer)
            engine.add_request(request)
        if not engine.has_unfinished:
            time.sleep(max(waiting[-1][1].at - now, 0.0))
            continue
        engine.step_core()
        now = time.perf_counter() - begin
        for sequence, _ in engine.scheduler.outputs:
            own = metrics[request_number(sequence)]
            own.first = own.first or now
        for sequence in engine.scheduler.finished:
            metrics[request_number(sequence)].end = now
    return sorted(metrics.values(), key=lambda own: own.number)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare every workload of every shape."""
    return {name: compare_shape(SHAPES[name](), args) for name in args.shapes.split(",")}


def compare_shape(model: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """One shape: the fit error of the calibration, and the error of each prediction."""
    config = EngineConfig(
        device="cpu",
        dtype=args.dtype,
        max_num_seqs=64,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
    )
    engine = calibration_engine(config, model)
    warm_up(engine)
    first, _ = fit_calibration([measure_steps(engine)])
    placement = engine_placement(config, model, engine)
    rate = args.load * _capacity(placement, first, args.requests)
    loads = workloads(rate, args.requests)
    passes, rounds = [], []
    for _ in range(args.rounds):  # in turns, so that both see the same machine load
        passes.append(measure_steps(engine))
        rounds.append(
            {
                name: summarize_requests(answer_requests(engine, planned))
                for name, planned in loads.items()
            }
        )
    step_time, fit_error = fit_calibration(passes)
    rows = {
        name: _row(
            simulate(planned, placement, step_time, budget=NO_BUDGET).summary(),
            [measured[name] for measured in rounds],
        )
        for name, planned in loads.items()
    }
    worst = max(abs(row["error"][name]) for row in rows.values() for name in PROMISED)
    return {
        "parameters": model.num_parameters,
        "dtype": str(_dtype(config, model)).removeprefix("torch."),
        "fit_error": round(fit_error, 3),
        "time_model": step_time.to_json(),
        "poisson_requests_per_s": round(rate, 3),
        "workloads": rows,
        "largest_error": round(worst, 3),
    }


def engine_placement(config: EngineConfig, model: ModelConfig, engine: LLMEngine) -> Placement:
    """The engine's placement, with its number of blocks."""
    foot = footprint(model, _dtype(config, model))
    place = placement_of(resolve_config(config), model, foot)
    return replace(place, num_blocks=engine.runner.num_blocks)


def _dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    return resolve_dtype(config.dtype, config.device, model.torch_dtype)


def _capacity(placement: Placement, step_time: FittedTimeModel, count: int) -> float:
    """Requests a second if all arrive at once."""
    planned = workloads(1.0, count)["64 mixed"]
    summary = simulate(planned, placement, step_time, budget=NO_BUDGET).summary()
    return float(summary["requests_per_s"])


def _row(predicted: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of one workload, in seconds; measured: the median of the rounds."""
    predicted_means = {name: _mean(predicted, name) for name in COMPARED}
    measured = {name: statistics.median(_mean(r, name) for r in rounds) for name in COMPARED}
    return {
        "predicted": {name: float(f"{value:.4g}") for name, value in predicted_means.items()},
        "measured": {name: float(f"{value:.4g}") for name, value in measured.items()},
        "error": {name: round(predicted_means[name] / measured[name] - 1, 3) for name in COMPARED},
    }


def _mean(summary: dict[str, Any], name: str) -> float:
    value = summary[name]
    return float(value["mean"] if isinstance(value, dict) else value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench plan``."""
    parser.add_argument("--shapes", default="nano,25M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--requests", type=int, default=96, help="of the Poisson workload")
    parser.add_argument(
        "--load", type=float, default=0.4, help="its rate, as a share of the capacity"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each workload")
