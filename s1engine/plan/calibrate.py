"""Steps of the real engine on this machine, measured at points that span what a workload does.

Weights are random: what a step costs depends on shapes alone. Requests, scheduler, runner and
sampling are the engine's own; text is not made.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.models.config import ModelConfig
from s1engine.models.loader import random_decoder
from s1engine.ops import select_ops
from s1engine.plan.fitted import FittedTime, fit
from s1engine.plan.step import Step
from s1engine.runner.device import resolve_config, resolve_dtype
from s1engine.runner.model_runner import ModelRunner
from s1engine.sampling_params import SamplingParams

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
class Measured:
    """A step and how long it took: the median of several alike."""

    step: Step
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


def calibrate(engine: LLMEngine) -> list[Measured]:
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


def _decode(engine: LLMEngine, rows: int, length: int) -> Measured:
    """Steps of ``rows`` sequences behind prompts of ``length`` tokens."""
    _add(engine, rows, length, DECODE_STEPS)
    found = []
    while engine.has_unfinished:
        found.append(_step(engine))
    return _median([one for one in found if one.step.tokens == one.step.samples == rows])


def _extend(engine: LLMEngine, count: int, length: int, beside: int) -> Measured:
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


def _step(engine: LLMEngine, begin: float | None = None) -> Measured:
    """One step; its time counts from ``begin``, where that is given."""
    begin = time.perf_counter() if begin is None else begin
    taken = engine.step_core()
    seconds = time.perf_counter() - begin
    assert taken is not None
    return Measured(Step.of(engine.runner.batch, len(taken.admitted)), seconds)


def _median(found: list[Measured]) -> Measured:
    sizes = zip(*(astuple(one.step) for one in found), strict=True)
    step = Step(*(statistics.fmean(size) for size in sizes))
    return Measured(step, statistics.median(one.seconds for one in found))


def fitted(passes: Sequence[list[Measured]]) -> tuple[FittedTime, float]:
    """The time model of the points' medians over all passes, and its largest relative error at
    them."""
    points = [_median(list(alike)) for alike in zip(*passes, strict=True)]
    model = fit([point.step for point in points], [point.seconds for point in points])
    errors = [abs(model.seconds(point.step) / point.seconds - 1) for point in points]
    return model, max(errors)
