"""Steps of the real engine on this machine, measured at points that span what a workload does.

Weights are random: what a step costs depends on shapes alone. Requests, scheduler, runner and
sampling are the engine's own; text is not made.
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
from s1engine.sampling_params import SamplingParams

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
OTHERS = (
    "samples", "decode_context", "extend_context", "extend_pairs", "admitted", "extends", "mixed"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FittedTimeModel:
    """``at_knots``: seconds of a step of so many tokens and nothing else; ``each``: of one unit of
    the others."""

    at_knots: tuple[float, ...]
    each: tuple[float, ...]

    def seconds(self, step: StepShape) -> float:
        """Of one step."""
        each: float = sum(
            cost * getattr(step, name) for name, cost in zip(OTHERS, self.each, strict=True)
        )
        return self._of_tokens(step.tokens) + each

    def _of_tokens(self, tokens: float) -> float:
        """Beyond the last knot the last slope goes on."""
        knots, values = KNOTS, self.at_knots
        for i in range(1, len(knots)):
            if tokens <= knots[i] or i == len(knots) - 1:
                slope = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
                return values[i - 1] + slope * (max(tokens, 1) - knots[i - 1])
        raise AssertionError("there are knots")

    def to_json(self) -> dict[str, Any]:
        return {"knots": list(KNOTS), **asdict(self)}


def fit(steps: Sequence[StepShape], seconds: Sequence[float]) -> FittedTimeModel:
    """By least squares of relative errors."""
    weights = 1 / np.array(seconds)
    columns = np.array([_columns(step) for step in steps])  # [points, coefficients]
    found = non_negative(columns * weights[:, None], np.ones(len(steps)))
    slopes = found[1 : len(KNOTS)]
    at_knots = found[0] + np.concatenate([[0.0], np.cumsum(slopes * np.diff(KNOTS))])
    return FittedTimeModel(tuple(at_knots.tolist()), tuple(found[len(KNOTS) :].tolist()))


def _columns(step: StepShape) -> list[float]:
    ramps = [
        max(min(step.tokens, high) - low, 0.0)
        for low, high in zip(KNOTS, (*KNOTS[1:-1], float("inf")), strict=False)
    ]
    return [1.0, *ramps, *(getattr(step, name) for name in OTHERS)]


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |a x - b|: Lawson and Hanson's active sets. a: [m, n], b: [m]."""
    scale = np.maximum(np.linalg.norm(a, axis=0), 1e-300)
    a = a / scale
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(10 * len(x)):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        best = int(gradient.argmax())
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        x = _step_inside(a, b, x, free)
    return np.asarray(x / scale)


def _step_inside(a: np.ndarray, b: np.ndarray, x: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The least squares over the free ones; those that would turn negative are freed no more."""
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


MAX_MODEL_LEN = 2048
WARM_TOKENS = 320
DECODE_STEPS = 16
FIRST_ID, LAST_ID = 10, 250  # prompts; within every vocabulary
ROUNDS = 2
PASSES = 3
# sequences, and tokens of their prompts, before the steps that decode
DECODES = ((1, 16), (1, 512), (2, 16), (4, 16), (4, 512), (8, 16), (16, 16), (16, 512), (32, 16),
           (32, 128), (64, 16), (64, 128))  # fmt: skip
# prompts that come together, and their tokens
EXTENDS = ((1, 4), (1, 16), (1, 64), (1, 256), (1, 1024), (4, 64), (8, 16), (16, 64))
BESIDE = (0, 12)  # sequences that decode meanwhile


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step and how long it took: the median of several alike."""

    step: StepShape
    seconds: float


def random_engine(config: EngineConfig, model: ModelConfig) -> LLMEngine:
    """An engine of that shape with random weights; its tokenizer is the bundled model's, and no
    text is made."""
    config = resolve_config(replace(config, model=str(BUNDLED_MODEL)))
    dtype = resolve_dtype(config.dtype, config.device, model.torch_dtype)
    ops = select_ops(config.device)
    decoder = random_decoder(model, dtype, config.device, ops, quantization=config.quantization)
    runner = ModelRunner(
        config,
        model,
        decoder,
        vocab_limit=model.vocab_size,
        triggers=(),
        newlines=np.zeros(model.vocab_size, np.uint8),
        progress=False,
    )
    return LLMEngine(config, runner=runner, detokenize=False)


def calibration_engine(config: EngineConfig, model: ModelConfig) -> LLMEngine:
    """An engine to measure with: contexts of 2,048 tokens at most, no prefixes found again."""
    longest = min(MAX_MODEL_LEN, model.max_position_embeddings)
    config = replace(config, enable_prefix_caching=False, max_model_len=longest)
    return random_engine(config, model)


def warm_up(engine: LLMEngine) -> None:
    """Steps of every size that is usual. torch compiles a product's kernel when it first meets a
    size, which takes a small model longer than the product; a server that has run for a while has
    met them all."""
    for length in range(1, WARM_TOKENS + 1):
        _add(engine, 1, length, 1)
        _step(engine)
    for max_tokens in range(1, engine.config.max_num_seqs + 1):  # a batch that shrinks by one
        _add(engine, 1, 4, max_tokens)
    while engine.has_unfinished:
        _step(engine)


def calibrate(engine: LLMEngine) -> list[MeasuredStep]:
    """One pass over all points; a quarter of a minute for a model of 25 million weights."""
    longest, most = engine.runner.max_model_len, engine.config.max_num_seqs
    points = []
    for rows, length in DECODES:
        if rows <= most and length + DECODE_STEPS <= longest:
            points.append(_decode(engine, rows, length))
    for count, length in EXTENDS:
        for beside in BESIDE:
            tokens = count * length + beside
            fits = count + beside <= most and length < longest
            if fits and tokens <= engine.config.max_num_batched_tokens:
                points.append(_extend(engine, count, length, beside))
    return points


def _decode(engine: LLMEngine, rows: int, length: int) -> MeasuredStep:
    """Steps of ``rows`` sequences behind prompts of ``length`` tokens."""
    _add(engine, rows, length, DECODE_STEPS)
    found = []
    while engine.has_unfinished:
        found.append(_step(engine))
    return _median([one for one in found if one.step.tokens == one.step.samples == rows])


def _extend(engine: LLMEngine, count: int, length: int, beside: int) -> MeasuredStep:
    """The first step of ``count`` prompts, beside sequences that decode."""
    found = []
    for _ in range(ROUNDS):
        if beside:
            _add(engine, beside, 64, 3)
            _step(engine)
        begin = time.perf_counter()
        _add(engine, count, length, 1)
        found.append(_step(engine, begin))
        while engine.has_unfinished:
            _step(engine)
    return _median(found)


_chance = random.Random(0)


def _add(engine: LLMEngine, count: int, length: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for _ in range(count):
        prompt = [_chance.randrange(FIRST_ID, LAST_ID) for _ in range(length)]
        engine.add_request(engine.make_request(prompt, params))


def _step(engine: LLMEngine, begin: float | None = None) -> MeasuredStep:
    """One step; its time counts from ``begin``, where that is given."""
    begin = time.perf_counter() if begin is None else begin
    taken = engine.step_core()
    seconds = time.perf_counter() - begin
    assert taken is not None
    return MeasuredStep(StepShape.of(engine.runner.batch, len(taken.admitted)), seconds)


def _median(found: list[MeasuredStep]) -> MeasuredStep:
    sizes = zip(*(astuple(one.step) for one in found), strict=True)
    step = StepShape(*(statistics.fmean(size) for size in sizes))
    return MeasuredStep(step, statistics.median(one.seconds for one in found))


def fit_calibration(passes: Sequence[list[MeasuredStep]]) -> tuple[FittedTimeModel, float]:
    """The time model of the points' medians over all passes, and its largest relative error at
    them."""
    points = [_median(list(alike)) for alike in zip(*passes, strict=True)]
    model = fit([point.step for point in points], [point.seconds for point in points])
    errors = [abs(model.seconds(point.step) / point.seconds - 1) for point in points]
    return model, max(errors)
