"""Time of a decode step under each sampling rule over that of plain greedy decoding.

Random weights in the shape of SmolLM2-135M, whose 49,152 tokens are many beside its layers, or
``--model``. The rules take turns on one engine, a streamed request each, so that all see the same
machine load; a ratio compares runs of one round, by wall time and by processor time of all threads,
which other load hardly changes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from s1engine.bench.random_checkpoint import random_checkpoint
from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.models.model_config import ModelConfig
from s1engine.options import Prompt
from s1engine.sampling_params import SamplingParams

PROMPT = 256  # tokens
FIRST_ID = 300  # of the prompt: words, not bytes, if there are so many
SPARE_IDS = 64  # at the end of a vocabulary: special tokens
GRAMMAR = "start: /[ -~]*/"


def smollm2_shape() -> ModelConfig:
    """The shape of SmolLM2-135M."""
    return replace(
        shape("0.5B"),
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        layer_windows=(0,) * 30,
        num_heads=9,
        num_kv_heads=3,
        vocab_size=49_152,
        max_position_embeddings=2048,
    )


def untouched(token_ids: Iterable[int], logits: np.ndarray) -> None:
    """A logits processor that only costs its call."""


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 0.7},
    "top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top_k 50": {"temperature": 0.7, "top_k": 50},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    "logit_bias of one id": {"logit_bias": {500: -1.0}},
    "logprobs 0": {"logprobs": 0},
    "logprobs 5": {"logprobs": 5},
    "logprobs 20": {"logprobs": 20},
    "grammar": {"grammar": GRAMMAR},
    "logits processor": {"logits_processors": untouched},
}


def step_seconds(
    engine: LLMEngine, batch: int, tokens: int, rule: dict[str, Any]
) -> tuple[float, float]:
    """Medians of the decode steps of ``batch`` streams under one rule: wall and processor time."""
    params = SamplingParams(
        max_tokens=tokens, ignore_eos=True, seed=1, **({"temperature": 0.0} | rule)
    )
    for row in range(batch):
        size = engine.model_config.vocab_size - SPARE_IDS
        prompt: Prompt = [(FIRST_ID + 13 * row + at) % size for at in range(PROMPT)]
        engine.add_request(engine.make_request(prompt, params, stream=True))
    walls, used = [], []
    while engine.has_unfinished:
        began, before = time.perf_counter(), time.process_time()
        engine.step()
        walls.append(time.perf_counter() - began)
        used.append(time.process_time() - before)
    last = slice(-(tokens - 2), None)  # without the prompt's steps
    return statistics.median(walls[last]), statistics.median(used[last])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every rule, by turns."""
    rules = {name: RULES[name] for name in RULES if args.rules is None or name in args.rules}
    rules = {"plain": {}} | rules
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or random_checkpoint(smollm2_shape(), "135M", Path(folder))
        engine = LLMEngine(
            EngineConfig(model=str(path), device="cpu", dtype=args.dtype,
                         max_num_seqs=max(args.batch, 1), reasoning_format="none")
        )  # fmt: skip
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rules}
        for turn in range(args.rounds + 1):
            for name, rule in rules.items():
                taken = step_seconds(engine, args.batch, args.tokens, rule)
                if turn:  # the first warms up
                    seconds[name].append(taken)
    result: dict[str, Any] = {
        "model": args.model or "135M",
        "tokens": args.tokens,
        "batch": args.batch,
        "dtype": args.dtype,
    }
    for name, times in seconds.items():
        pairs = list(zip(times, seconds["plain"], strict=True))
        result[name] = {
            "step_ms": round(1e3 * statistics.median(wall for wall, _ in times), 3),
            "ratio": round(statistics.median(own[0] / plain[0] for own, plain in pairs), 3),
            "cpu_ratio": round(statistics.median(own[1] / plain[1] for own, plain in pairs), 3),
        }
        print(f"{name}: {result[name]}", file=sys.stderr)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", help="default: random weights in the shape of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rules", nargs="*", choices=list(RULES), help="default: all")
    parser.add_argument("--tokens", type=int, default=64, help="of each request")
