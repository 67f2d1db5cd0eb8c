"""Tokens a second of our decoder over those of the same model computed by transformers.

Two engines of one process take steps in turns, so that both see the same machine load: the bundled
model, and one of 26 million random weights.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from s1engine.bench.random_checkpoint import random_checkpoint
from s1engine.bench.shapes import shape
from s1engine.bench.studies.draft_speedup import Contender, Workload, generate_work
from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.models.model_config import ModelConfig
from s1engine.options import Prompt
from s1engine.sampling_params import SamplingParams

PROMPT = 64  # tokens
FIRST_ID = 8  # of the prompts; the ids before are special


def small_model() -> ModelConfig:
    """26 million weights."""
    return replace(
        shape("0.5B"),
        hidden_size=512,
        intermediate_size=1536,
        num_layers=8,
        layer_windows=(0,) * 8,
        num_heads=8,
        vocab_size=4096,
        max_position_embeddings=2048,
    )


def decode_work(engine: LLMEngine, batch: int, tokens: int) -> Workload:
    """``batch`` sequences of ``tokens`` tokens after different prompts."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    vocab = engine.model_config.vocab_size
    prompts: list[Prompt] = [
        [FIRST_ID + (7 * row + at) % (vocab - FIRST_ID) for at in range(PROMPT)]
        for row in range(batch)
    ]
    return generate_work(engine, prompts, params)


def compare(
    engines: tuple[LLMEngine, LLMEngine], batch: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Rates of both; the ratio is the median of the rounds' ratios."""
    rates: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        sides = [Contender(decode_work(engine, batch, tokens)()) for engine in engines]
        running = list(sides)
        while running:
            running = [side for side in running if side.step()]
        if turn:  # the first warms up
            for side, own in zip(sides, rates, strict=True):
                own.append(side.tokens / side.seconds)
    ratios = [native / other for native, other in zip(*rates, strict=True)]
    return {
        "native_tokens_per_s": round(statistics.median(rates[0]), 1),
        "transformers_tokens_per_s": round(statistics.median(rates[1]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both models at every batch."""
    result: dict[str, Any] = {"tokens": args.tokens, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            "s1-nano": BUNDLED_MODEL,
            "26M": random_checkpoint(small_model(), "26M", Path(folder)),
        }
        for name, path in paths.items():
            native, other = (
                LLMEngine(EngineConfig(model=str(path), model_impl=impl, dtype=args.dtype,
                          device="cpu", max_num_seqs=64, reasoning_format="none"))
                for impl in ("native", "transformers")
            )  # fmt: skip
            for batch in map(int, args.batch.split(",")):
                row = compare((native, other), batch, args.tokens, args.rounds)
                result[f"{name}, batch {batch}"] = row
                print(f"{name}, batch {batch}: {row}", file=sys.stderr)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--batch", default="1,16", help="comma-separated")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=128, help="to decode in each sequence")
    parser.add_argument("--rounds", type=int, default=5)
