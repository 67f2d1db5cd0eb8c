"""Decoding without text: step time, tokens a second and share of the memory bandwidth.

A random model of a Qwen2.5 shape decodes with the real scheduler, budgets, and multi-step decode as
in production. The limit is the time to read every weight and every cached key and value once a
step. Mixed steps compute a part of a prompt beside the decoding rows, as on every admission.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from s1engine.bench.bare_engine import GREEDY, BareEngine, Job, make_decoder
from s1engine.bench.device_time import ceilings
from s1engine.bench.kernel_speed import parse_integers
from s1engine.bench.shapes import NAMES, shape, step_bytes
from s1engine.config import QUANTIZATIONS, EngineConfig
from s1engine.errors import RequestError
from s1engine.sampling_params import SamplingParams

WARM_UP_STEPS = 16
RECOMMENDED = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)  # by Qwen3, and R1 without k
SAMPLINGS = {
    "greedy": GREEDY,
    "plain": SamplingParams(temperature=1.0),
    "recommended": RECOMMENDED,
    "penalties": replace(RECOMMENDED, presence_penalty=0.5, repetition_penalty=1.05),
    "logprobs": replace(RECOMMENDED, logprobs=5),
}


def decode(
    engine: BareEngine,
    *,
    batch: int,
    prompt: int,
    steps: int,
    thinks: bool,
    params: SamplingParams = SAMPLINGS["plain"],
    chunk: int = 0,
) -> dict[str, Any]:
    """Figures of one batch: seconds of a step (mean, and median over groups of steps), seconds of
    the prefill of all prompts, and wall time over device time, above 1 if the device waits for the
    host; None where no step is multi-step.

    ``chunk``: tokens of a prompt that every step computes besides; the engine's
    ``max_num_batched_tokens`` must be ``batch + chunk``, so that they fit exactly. It answers one
    token, in the same step."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, engine.model.vocab_size, (count,), generator=generator).tolist()

    begin = time.perf_counter()
    for seed in range(batch):
        options: dict[str, Any] = {"thinks": thinks, "params": params, "seed": seed}
        last = engine.add(Job(prompt=ids(prompt), max_new=steps + 200, **options))
    engine.wait_for_first_token(last)
    prefill = time.perf_counter() - begin
    prompts = [ids(chunk) for _ in range(WARM_UP_STEPS + steps)] if chunk else []

    def step() -> int:
        if prompts:
            engine.add(Job(prompt=prompts.pop(), max_new=1, params=params))
        return engine.step()

    try:
        warm = 0
        while warm < WARM_UP_STEPS:
            warm += step()
        times = _timed(engine, step, steps)
    finally:
        engine.end_jobs()
    return {"prefill_s": prefill, **times, "tokens_per_s": batch / times["step_s"]}


def _timed(engine: BareEngine, step: Callable[[], int], steps: int) -> dict[str, Any]:
    """Times of ``steps`` steps."""
    multi_step = engine.runner.multi_step
    device_begin = multi_step.device_seconds if multi_step else 0.0
    done, times, all_begin = 0, [], time.perf_counter()
    while done < steps:
        begin = time.perf_counter()
        count = step()
        times.append((time.perf_counter() - begin) / max(count, 1))
        done += count
    seconds = (time.perf_counter() - all_begin) / done
    on_device = (multi_step.device_seconds if multi_step else 0.0) - device_begin
    return {
        "step_s": seconds,
        "median_step_s": statistics.median(times),
        "wall_over_device": done * seconds / on_device if on_device else None,
    }


def decode_all(
    engine: BareEngine, batch: int, prompt: int, steps: int, samplings: list[str]
) -> list[dict[str, Any]]:
    """A row for each way of sampling: with budgets, over the same without, and over the first."""
    rows: list[dict[str, Any]] = []
    for name in samplings:
        sizes: dict[str, Any] = {"batch": batch, "prompt": prompt, "steps": steps}
        sizes["params"] = SAMPLINGS[name]
        plain = decode(engine, thinks=False, **sizes)
        row = decode(engine, thinks=True, **sizes)
        row["budgets_on_off"] = row["tokens_per_s"] / plain["tokens_per_s"]
        first = rows[0] if rows else row
        row["over_first_sampling"] = row["tokens_per_s"] / first["tokens_per_s"]
        rows.append({"batch": batch, "sampling": name, **row})
    return rows


def decode_mixed(
    engine: BareEngine, batch: int, prompt: int, steps: int, chunk: int
) -> dict[str, Any]:
    """A row for steps that compute ``chunk`` tokens of a prompt beside ``batch`` decoding rows."""
    # No budgets: a forced phrase would take the place of a part of the chunk.
    sizes: dict[str, Any] = {"batch": batch, "prompt": prompt, "steps": steps, "thinks": False}
    row = decode(engine, **sizes, chunk=chunk)
    return {"batch": batch, "chunk": chunk, **row, "prompt_tokens_per_s": chunk / row["step_s"]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every batch size and way of sampling, then mixed steps if they are asked for."""
    batches, samplings = parse_integers("batch", args.batch), args.sampling.split(",")
    for name in samplings:
        if name not in SAMPLINGS:
            known = ", ".join(SAMPLINGS)
            raise RequestError(f"sampling: {name!r} is none of {known}", param="sampling")
    chunks = parse_integers("mixed", args.mixed) if args.mixed else []
    config = EngineConfig(
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=max(batches) + bool(chunks),
        max_num_batched_tokens=max(args.prompt, max(batches) + bool(chunks), 2048),
        max_model_len=max(args.prompt + args.steps + 256, *chunks, 0),
        enable_prefix_caching=False,
        run_ahead=args.run_ahead,
        enforce_eager=args.enforce_eager,
        kv_cache_memory_gb=args.kv_cache_memory_gb,
        quantization=args.quantization,
        max_step_ms=0,
    )
    model = shape(args.shape)
    decoder = make_decoder(model, config)
    limits = ceilings(decoder.device.type)
    sizes = {"prompt": args.prompt, "steps": args.steps}
    engine = BareEngine(config, model, decoder)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        context = args.prompt + args.steps // 2
        nbytes = step_bytes(model, decoder.dtype.itemsize, batch, context, args.quantization)
        for row in decode_all(engine, batch, samplings=samplings, **sizes):
            share = nbytes / limits["read_bytes_per_s"] / row["step_s"]
            rows.append({**rounded(row), "share_of_read": round(share, 3)})
    del engine  # its KV cache
    mixed = []
    for batch in batches:
        for chunk in chunks:
            engine = BareEngine(
                replace(config, max_num_batched_tokens=batch + chunk), model, decoder
            )
            mixed.append(rounded(decode_mixed(engine, batch, chunk=chunk, **sizes)))
            del engine
    return {
        "shape": args.shape,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "quantization": args.quantization,
        "prompt": args.prompt,
        "ceilings": limits,
        "rows": rows,
        "mixed": mixed,
    }


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Floats to six places."""
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench latency``."""
    parser.add_argument("--shape", default="nano", choices=NAMES, help="Qwen2.5 of that size")
    parser.add_argument("--batch", default="1,16,64", help="sequences at once, comma-separated")
    parser.add_argument(
        "--sampling", default="plain", help=f"comma-separated: {', '.join(SAMPLINGS)}"
    )
    parser.add_argument(
        "--mixed",
        metavar="TOKENS",
        help="also steps with so many tokens of a prompt beside the batch, comma-separated",
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=128, help="decode steps to time")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="default: none")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--run-ahead", type=int, help="steps; default as for serving")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--kv-cache-memory-gb", type=float, help="default as for serving")
