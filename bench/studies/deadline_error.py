"""How late deadlines are kept: alone, beside eight running requests, while a long prompt arrives.

For each situation and each ``max_step_ms``, by turns: requests with a deadline, one after another,
and the time from the deadline to the step's end at which the request had ended (``request``), or at
which its answer had begun (``thinking``). Negative: earlier than the deadline. The first turn warms
up, and the scheduler learns the times of steps in it.
"""

import argparse
import random
import statistics
import time
from typing import Any

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.outputs import Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

SITUATIONS = {"alone": (0, False), "eight_running": (8, False), "long_prompt": (1, True)}
KINDS = ("request", "thinking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--max-step-ms", default="0,40", help="values to compare, by turns")
    parser.add_argument("--deadline-ms", type=int, default=300)
    parser.add_argument("--input-len", type=int, default=1900, help="of the long prompt")
    parser.add_argument("--rounds", type=int, default=10, help="at least 2")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Errors in milliseconds (p50, p99, largest) by situation, kind and ``max_step_ms``."""
    limits = [float(value) for value in args.max_step_ms.split(",")]
    engines = {limit: _engine(args.model or str(BUNDLED_MODEL), limit) for limit in limits}
    rng = random.Random(0)
    errors: dict[tuple[str, str, float], list[float]] = {}
    for turn in range(max(args.rounds, 2) + 1):
        for situation, (others, prompt) in SITUATIONS.items():
            for kind in KINDS:
                for limit, engine in engines.items():
                    length = args.input_len if prompt else 0
                    error = _measure(engine, rng, kind, args.deadline_ms, others, length)
                    if turn:
                        errors.setdefault((situation, kind, limit), []).append(1e3 * error)
    for engine in engines.values():
        engine.close()
    return {
        situation: {
            kind: {f"{limit:g}": _summary(errors[situation, kind, limit]) for limit in limits}
            for kind in KINDS
        }
        for situation in SITUATIONS
    }


def _engine(model: str, max_step_ms: float) -> LLMEngine:
    return LLMEngine(
        EngineConfig(
            model=model, max_step_ms=max_step_ms, enable_prefix_caching=False, max_num_seqs=16
        )
    )


def _measure(
    engine: LLMEngine, rng: random.Random, kind: str, deadline_ms: int, others: int, prompt: int
) -> float:
    """Seconds from the deadline to what it ends. The long prompt arrives shortly before."""
    running = [_endless(engine, rng, 16) for _ in range(others)]
    for _ in range(3 * others):
        engine.step()
    request = engine.make_request("a=3 b=a+4 c=b*2 c?", _params(kind, deadline_ms), stream=True)
    engine.add_request(request)
    deadline = request.arrival + deadline_ms / 1000
    arrives = deadline - rng.uniform(0.05, 0.9) * deadline_ms / 1000
    ended = 0.0
    while not ended:
        if prompt and time.monotonic() >= arrives:
            running.append(_endless(engine, rng, prompt))
            prompt = 0
        events = [event for name, event in engine.step() if name == request.request_id]
        if any(_is_end(kind, event) for event in events):
            ended = time.monotonic()
    for request_id in (*running, request.request_id):
        engine.abort(request_id)
    return ended - deadline


def _params(kind: str, deadline_ms: int) -> SamplingParams:
    """Output that would go on far beyond the deadline."""
    if kind == "request":
        return SamplingParams(temperature=0, ignore_eos=True, deadline_ms=deadline_ms)
    thinking = ThinkingBudget(num_waits=1000, wait_text="", deadline_ms=deadline_ms)
    return SamplingParams(temperature=0, thinking=thinking)


def _is_end(kind: str, event: object) -> bool:
    if kind == "request":
        return isinstance(event, RequestOutput)
    return isinstance(event, RequestOutput) or (isinstance(event, Chunk) and any(event.forced))


def _endless(engine: LLMEngine, rng: random.Random, length: int) -> str:
    """Adds a streamed request of random tokens. Returns its id."""
    low, high = 10, engine.model_config.vocab_size // 2
    prompt = [rng.randrange(low, high) for _ in range(length)]
    params = SamplingParams(temperature=0, ignore_eos=True)
    request = engine.make_request(prompt, params, enable_thinking=False, stream=True)
    engine.add_request(request)
    return request.request_id


def _summary(errors: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(errors, n=100, method="inclusive")
    values = {"p50": cuts[49], "p99": cuts[98], "largest": max(errors)}
    return {name: round(value, 2) for name, value in values.items()}
