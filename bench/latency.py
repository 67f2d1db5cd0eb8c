"""Decoding without text: step time, tokens a second and share of the memory bandwidth.

A random model of a Qwen2.5 shape decodes with the real scheduler, budgets, and multi-step decode as
in production. The limit is the time to read every weight and every cached key and value once a
step.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.device_time import ceilings
from s1engine.bench.kernel_speed import parse_integers
from s1engine.bench.shapes import NAMES, shape, step_bytes
from s1engine.config import QUANTIZATIONS, EngineConfig
from s1engine.models.decoder import Decoder
from s1engine.models.model_config import ModelConfig

WARM_UP_STEPS = 16


def decode(
    config: EngineConfig,
    model: ModelConfig,
    decoder: Decoder,
    *,
    batch: int,
    prompt: int,
    steps: int,
    thinks: bool,
) -> dict[str, Any]:
    """Figures of one batch: seconds of a step (mean, and median over groups of steps), seconds of
    the prefill of all prompts, and wall time over device time, above 1 if the device waits for the
    host."""
    engine = BareEngine(config, model, decoder)
    generator = torch.Generator().manual_seed(0)
    for seed in range(batch):
        ids = torch.randint(10, model.vocab_size, (prompt,), generator=generator).tolist()
        engine.add(Job(prompt=ids, max_new=steps + 200, thinks=thinks, temperature=1.0, seed=seed))
    begin = time.perf_counter()
    while engine.scheduler.stats().num_sampled_tokens < batch:
        engine.step()
    prefill = time.perf_counter() - begin
    warm = 0
    while warm < WARM_UP_STEPS:
        warm += engine.step()
    multi_step = engine.runner.multi_step
    device_begin = multi_step.device_seconds if multi_step else 0.0
    done, times, all_begin = 0, [], time.perf_counter()
    while done < steps:
        begin = time.perf_counter()
        count = engine.step()
        times.append((time.perf_counter() - begin) / max(count, 1))
        done += count
    seconds = (time.perf_counter() - all_begin) / done
    on_device = (multi_step.device_seconds if multi_step else 0.0) - device_begin
    return {
        "prefill_s": prefill,
        "step_s": seconds,
        "median_step_s": statistics.median(times),
        "tokens_per_s": batch / seconds,
        "wall_over_device": done * seconds / on_device if on_device else None,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every batch size, with and without budgets."""
    batches = parse_integers("batch", args.batch)
    config = EngineConfig(
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(args.prompt, max(batches), 2048),
        max_model_len=args.prompt + args.steps + 256,
        enable_prefix_caching=False,
        run_ahead=args.run_ahead,
        enforce_eager=args.enforce_eager,
        kv_cache_memory_gb=args.kv_cache_memory_gb,
        quantization=args.quantization,
    )
    model = shape(args.shape)
    decoder = make_decoder(model, config)
    limits = ceilings(decoder.device.type)
    rows = []
    for batch in batches:
        sizes = {"batch": batch, "prompt": args.prompt, "steps": args.steps}
        plain = decode(config, model, decoder, thinks=False, **sizes)
        row = decode(config, model, decoder, thinks=True, **sizes)
        context = args.prompt + args.steps // 2
        nbytes = step_bytes(model, decoder.dtype.itemsize, batch, context, args.quantization)
        rows.append(
            {
                "batch": batch,
                **{name: value and round(value, 6) for name, value in row.items()},
                "share_of_read": round(nbytes / limits["read_bytes_per_s"] / row["step_s"], 3),
                "budgets_on_off": round(row["tokens_per_s"] / plain["tokens_per_s"], 4),
            }
        )
    return {
        "shape": args.shape,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "quantization": args.quantization,
        "prompt": args.prompt,
        "ceilings": limits,
        "rows": rows,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench latency``."""
    parser.add_argument("--shape", default="nano", choices=NAMES, help="Qwen2.5 of that size")
    parser.add_argument("--batch", default="1,16,64", help="sequences at once, comma-separated")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=128, help="decode steps to time")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="default: none")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--run-ahead", type=int, help="steps; default as for serving")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--kv-cache-memory-gb", type=float, help="default as for serving")
