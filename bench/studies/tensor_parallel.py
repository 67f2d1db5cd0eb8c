"""Tensor parallelism on this CPU: one rank on all cores against several ranks.

Times an all-reduce between processes, and the decoding of whole engines with the same threads in
total, in turns. A ratio above 1 favours several ranks.
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s1engine.bench.random_checkpoint import random_checkpoint
from s1engine.bench.shapes import NAMES, shape
from s1engine.bench.throughput import tokens_per_second
from s1engine.engine.llm import LLM
from s1engine.models.collective import SharedCollective
from s1engine.models.shard import Shard

SERIES, CALLS = 10, 200  # all-reduces in a row; a step has two for each layer


def all_reduce_us(ranks: int, rows: int, width: int) -> float:
    """Microseconds of an all-reduce of bfloat16 [rows, width], median of series."""
    memory = torch.zeros(SharedCollective.memory_bytes(ranks), dtype=torch.uint8).share_memory_()
    others = [
        multiprocessing.get_context("fork").Process(
            target=_all_reduces, args=(memory, rank, ranks, rows, width)
        )
        for rank in range(1, ranks)
    ]
    for other in others:
        other.start()
    times = _all_reduces(memory, 0, ranks, rows, width)
    for other in others:
        other.join()
    return statistics.median(times)


def _all_reduces(memory: Tensor, rank: int, ranks: int, rows: int, width: int) -> list[float]:
    collective = SharedCollective(Shard(rank, ranks), memory)
    x = torch.zeros(rows, width, dtype=torch.bfloat16)
    residual = torch.zeros_like(x)
    times = []
    for _ in range(SERIES):
        begin = time.perf_counter()
        for _ in range(CALLS):
            collective.all_reduce_residual(x, residual)
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return times


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time of an all-reduce, then decoding rates for each number of ranks and of rows."""
    model = shape(args.shape)
    path = random_checkpoint(model, args.shape, args.work)
    rows = [int(text) for text in args.rows.split(",")]
    all_reduces = {str(n): round(all_reduce_us(args.ranks, n, model.hidden_size), 2) for n in rows}
    rates: dict[tuple[int, int], list[float]] = {}
    for _ in range(args.rounds):
        for ranks in (1, args.ranks):
            llm = LLM(str(path), progress=False, device="cpu", tensor_parallel_size=ranks)
            for n in rows:
                tokens_per_second(llm, n, 8)  # warm-up: records the steps of this size
                rate = tokens_per_second(llm, n, args.max_tokens)
                rates.setdefault((ranks, n), []).append(rate)
            llm.close()
    medians = {key: statistics.median(values) for key, values in rates.items()}
    return {
        "shape": args.shape,
        "ranks": args.ranks,
        "sum_us": all_reduces,
        "tokens_per_s": {
            f"{ranks}x{max(torch.get_num_threads() // ranks, 1)}": {
                str(n): round(medians[ranks, n], 1) for n in rows
            }
            for ranks in (1, args.ranks)
        },
        "ratio": {str(n): round(medians[args.ranks, n] / medians[1, n], 2) for n in rows},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--shape", default="25M", choices=NAMES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,16", help="sequences at a time, comma-separated")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/bench_cpu"), help="models")
