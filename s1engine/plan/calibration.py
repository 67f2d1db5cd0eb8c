"""A time model of this machine: steps of the real engine, measured and fitted.

    step = fixed + f(tokens) + s * samples + d * decode_context + e * extend_context
                 + p * extend_pairs + a * admitted + x if any row extends + m if others also decode

f is piecewise linear between powers of two, because a product's speed depends on its rows. No
coefficient is negative, so more work never takes less time. The fit minimizes relative errors.
Weights are random, because the time of a step depends on shapes only. Requests, scheduler, runner
and sampling are the engine's own; no text is decoded.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.models.loader import random_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops import select_ops
from s1engine.plan.step_time import StepShape
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.resolved_config import resolve_config, resolve_dtype
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import SamplingParams

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
LINEAR_TERMS = (
    "samples", "decode_context", "extend_context", "extend_pairs", "admitted", "extends", "mixed"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FittedTimeModel:
    """Seconds of a step, see the module's docstring."""

    at_knots: tuple[float, ...]
    """fixed + f at each of KNOTS."""
    each: tuple[float, ...]
    """The coefficient of each of LINEAR_TERMS."""

    def seconds(self, step: StepShape) -> float:
        linear: float = sum(
            cost * getattr(step, name) for name, cost in zip(LINEAR_TERMS, self.each, strict=True)
        )
        return self._token_seconds(step.tokens) + linear

    def _token_seconds(self, tokens: float) -> float:
        """fixed + f(tokens); the last slope continues beyond the last knot."""
        knots, values = KNOTS, self.at_knots
        for i in range(1, len(knots)):
            if tokens <= knots[i] or i == len(knots) - 1:
                slope = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
                return values[i - 1] + slope * (max(tokens, 1) - knots[i - 1])
        raise AssertionError("there are knots")

    def to_json(self) -> dict[str, Any]:
        return {"knots": list(KNOTS), **asdict(self)}


def fit_steps(steps: Sequence[StepShape], seconds: Sequence[float]) -> FittedTimeModel:
    """Fits measured steps by least squares of relative errors."""
    weights = 1 / np.array(seconds)
    columns = np.array([_columns(step) for step in steps])  # [points, coefficients]
    x = non_negative_least_squares(columns * weights[:, None], np.ones(len(steps)))
    slopes = x[1 : len(KNOTS)]
    at_knots = x[0] + np.concatenate([[0.0], np.cumsum(slopes * np.diff(KNOTS))])
    return FittedTimeModel(tuple(at_knots.tolist()), tuple(x[len(KNOTS) :].tolist()))


def _columns(step: StepShape) -> list[float]:
    ramps = [
        max(min(step.tokens, high) - low, 0.0)
        for low, high in zip(KNOTS, (*KNOTS[1:-1], float("inf")), strict=False)
    ]
    return [1.0, *ramps, *(getattr(step, name) for name in LINEAR_TERMS)]


def non_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 that minimizes |a x - b|, by Lawson and Hanson's active sets. a: [m, n], b: [m]."""
    scale = np.maximum(np.linalg.norm(a, axis=0), 1e-300)
    a = a / scale
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(10 * len(x)):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        best = int(gradient.argmax())
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        x = _solve_free(a, b, x, free)
    return np.asarray(x / scale)


def _solve_free(a: np.ndarray, b: np.ndarray, x: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Least squares over the free variables; one that would turn negative leaves the free set."""
    while True:
        wanted = np.zeros_like(x)
        wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        negative = free & (wanted <= 0)
        if not negative.any():
            return wanted
        share = (x[negative] / np.maximum(x[negative] - wanted[negative], 1e-300)).min()
        x = x + share * (wanted - x)
        free &= x > 1e-12
        x = np.where(free, x, 0.0)


# --- measuring ---

MAX_MODEL_LEN = 2048
WARM_TOKENS = 320
DECODE_STEPS = 16
FIRST_ID, LAST_ID = 10, 250  # token ids of prompts, inside every vocabulary
ROUNDS = 2
PASSES = 3
# decode points: sequences, and tokens of their prompts
DECODES = ((1, 16), (1, 512), (2, 16), (4, 16), (4, 512), (8, 16), (16, 16), (16, 512), (32, 16),
           (32, 128), (64, 16), (64, 128))  # fmt: skip
# prefill points: prompts in one step, and their tokens
EXTENDS = ((1, 4), (1, 16), (1, 64), (1, 256), (1, 1024), (4, 64), (8, 16), (16, 64))
BESIDE = (0, 12)  # sequences that decode in the same step


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step and its duration, the median of several equal steps."""

    step: StepShape
    seconds: float


def calibration_engine(config: EngineConfig, model: ModelConfig) -> LLMEngine:
    """An engine of this shape with random weights and the bundled tokenizer. Contexts have at most
    2,048 tokens; there is no prefix caching; no text is decoded."""
    longest = min(MAX_MODEL_LEN, model.max_position_embeddings)
    bounds: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": longest}
    config = resolve_config(replace(config, model=str(BUNDLED_MODEL), **bounds))
    dtype = resolve_dtype(config.dtype, config.device, model.torch_dtype)
    ops = select_ops(config.device)
    decoder = random_decoder(model, dtype, config.device, ops, quantization=config.quantization)
    runner = ModelRunner(
        config,
        model,
        decoder,
        vocab_limit=model.vocab_size,
        ends=ThinkingEnds(),
        newlines=np.zeros(model.vocab_size, np.uint8),
        progress=False,
    )
    return LLMEngine(config, runner=runner, detokenize=False)


def warm_up(engine: LLMEngine) -> None:
    """Runs steps of all common sizes. torch compiles a product's kernel when a size first occurs,
    which takes longer than the product of a small model. A server soon has all of them."""
    for length in range(1, WARM_TOKENS + 1):
        _add_requests(engine, 1, length, 1)
        _run_step(engine)
    for max_tokens in range(1, engine.config.max_num_seqs + 1):  # a batch that shrinks by one
        _add_requests(engine, 1, 4, max_tokens)
    while engine.has_unfinished:
        _run_step(engine)


def measure_steps(engine: LLMEngine) -> list[MeasuredStep]:
    """Measures all points once; 15 seconds for a model of 25 million weights."""
    longest, most = engine.runner.max_model_len, engine.config.max_num_seqs
    points = []
    for rows, length in DECODES:
        if rows <= most and length + DECODE_STEPS <= longest:
            points.append(_measure_decode(engine, rows, length))
    for count, length in EXTENDS:
        for beside in BESIDE:
            tokens = count * length + beside
            fits = count + beside <= most and length < longest
            if fits and tokens <= engine.config.max_num_batched_tokens:
                points.append(_measure_extend(engine, count, length, beside))
    return points


def _measure_decode(engine: LLMEngine, rows: int, length: int) -> MeasuredStep:
    """Decode steps of ``rows`` sequences after prompts of ``length`` tokens."""
    _add_requests(engine, rows, length, DECODE_STEPS)
    steps = []
    while engine.has_unfinished:
        steps.append(_run_step(engine))
    return _median([one for one in steps if one.step.tokens == one.step.samples == rows])


def _measure_extend(engine: LLMEngine, count: int, length: int, beside: int) -> MeasuredStep:
    """The first step of ``count`` prompts, in which ``beside`` other sequences decode."""
    steps = []
    for _ in range(ROUNDS):
        if beside:
            _add_requests(engine, beside, 64, 3)
            _run_step(engine)
        begin = time.perf_counter()
        _add_requests(engine, count, length, 1)
        steps.append(_run_step(engine, begin))
        while engine.has_unfinished:
            _run_step(engine)
    return _median(steps)


_rng = random.Random(0)


def _add_requests(engine: LLMEngine, count: int, length: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for _ in range(count):
        prompt = [_rng.randrange(FIRST_ID, LAST_ID) for _ in range(length)]
        engine.add_request(engine.make_request(prompt, params))


def _run_step(engine: LLMEngine, begin: float | None = None) -> MeasuredStep:
    """Runs one step; its time starts at ``begin`` if given."""
    begin = time.perf_counter() if begin is None else begin
    outputs = engine.step_core()
    seconds = time.perf_counter() - begin
    assert outputs is not None
    return MeasuredStep(StepShape.from_batch(engine.runner.batch, len(outputs.admitted)), seconds)


def _median(steps: list[MeasuredStep]) -> MeasuredStep:
    """Mean shape and median time."""
    sizes = zip(*(astuple(one.step) for one in steps), strict=True)
    step = StepShape(*(statistics.fmean(size) for size in sizes))
    return MeasuredStep(step, statistics.median(one.seconds for one in steps))


def fit_calibration(passes: Sequence[list[MeasuredStep]]) -> tuple[FittedTimeModel, float]:
    """Fits the median of each point over all passes; returns the largest relative error too."""
    points = [_median(list(same)) for same in zip(*passes, strict=True)]
    model = fit_steps([point.step for point in points], [point.seconds for point in points])
    errors = [abs(model.seconds(point.step) / point.seconds - 1) for point in points]
    return model, max(errors)
