"""Times every operation at a model's shapes, against its ceiling and against torch.

An operation is one of ``Ops``: Triton kernels on CUDA, C++ on the CPU. Its ceiling is the larger of
two times: bytes over the measured read bandwidth, and FLOPs over the measured matrix speed. Its
baseline is ``kernel_work``'s torch operation.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from s1engine.bench.device_time import ceilings, copies, seconds
from s1engine.bench.kernel_work import CONTEXT_MATTERS, KERNELS, BenchSetup
from s1engine.bench.shapes import NAMES, shape
from s1engine.errors import RequestError
from s1engine.extras import require_extra
from s1engine.ops import select_ops
from s1engine.runner.resolved_config import resolve_device, resolve_dtype

MAX_BYTES = 16 * 2**30  # of one case's operands
MAX_EXTEND_TOKENS = 2**15  # cached, of all rows: the baseline may store all of its scores


def measure(
    name: str, at: BenchSetup, batch: int, context: int, limits: dict[str, Any]
) -> dict[str, Any]:
    """One case: times of ours and of the baseline, share of the ceiling."""
    ops = select_ops(at.device)
    work = KERNELS[name](at, ops, batch, context)
    more = copies(work.nbytes, at.device) - 1
    works = [work, *(KERNELS[name](at, ops, batch, context) for _ in range(more))]
    with torch.inference_mode():
        ours = seconds([w.ours for w in works], at.device)
        baseline = seconds([w.baseline for w in works], at.device)
    bound = max(work.nbytes / limits["read_bytes_per_s"], work.flops / limits["matmul_flop_per_s"])
    return {
        "kernel": name,
        "batch": batch,
        "context": context if name in CONTEXT_MATTERS else None,
        "us": round(1e6 * ours, 2),
        "baseline_us": round(1e6 * baseline, 2),
        "speedup": round(baseline / ours, 3),
        "gb_per_s": round(work.nbytes / ours / 1e9, 1),
        "tflop_per_s": round(work.flops / ours / 1e12, 3),
        "flop_per_byte": round(work.flops / work.nbytes, 3),
        "share_of_ceiling": round(bound / ours, 3),
    }


def cases(
    names: Sequence[str], batches: Sequence[int], contexts: Sequence[int], at: BenchSetup
) -> Iterator[tuple[str, int, int]]:
    """Kernel, batch and context of each case; cases whose operands are too large are left out."""
    kv = 2 * at.model.num_kv_heads * at.model.head_dim * at.dtype.itemsize
    for name in names:
        for batch in batches:
            for context in contexts if name in CONTEXT_MATTERS else contexts[:1]:
                tokens = batch * context
                if name == "extend" and tokens > MAX_EXTEND_TOKENS:
                    continue
                if name not in CONTEXT_MATTERS or 2 * kv * tokens < MAX_BYTES:
                    yield name, batch, context


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases; print a table on stderr."""
    names = list(KERNELS) if args.kernels == "all" else args.kernels.split(",")
    for name in names:
        if name not in KERNELS:
            raise RequestError(
                f"kernels: {name!r} is unknown; there are {', '.join(KERNELS)}", param="kernels"
            )
    device = resolve_device(args.device)
    model = shape(args.shape)
    at = BenchSetup(model, resolve_dtype(args.dtype, device, torch.bfloat16), device)
    if args.plot is not None:
        require_extra("eval", param="plot")
    limits = ceilings(device)
    batches, contexts = parse_integers("batch", args.batch), parse_integers("context", args.context)
    todo = list(cases(names, batches, contexts, at))
    rows = [
        measure(name, at, batch, context, limits)
        for name, batch, context in tqdm(todo, unit="case")
    ]
    print(markdown_table(rows), file=sys.stderr)
    if args.plot is not None:
        from s1engine.bench.roofline import draw

        draw(rows, limits, args.plot, f"{args.shape}, {device}")
    return {"shape": args.shape, "dtype": str(at.dtype), "ceilings": limits, "rows": rows}


def parse_integers(param: str, text: str) -> list[int]:
    """Comma-separated positive integers. Raises RequestError naming the flag."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{param} must be integers; got {text!r}", param=param) from error
    if not all(number > 0 for number in numbers):
        raise RequestError(f"{param} must be positive; got {text!r}", param=param)
    return numbers


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """``rows`` as a Markdown table."""
    names = list(rows[0]) if rows else []
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = ("" if row[name] is None else str(row[name]) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench kernels``."""
    parser.add_argument("--kernels", default="all", help=f"comma-separated: {', '.join(KERNELS)}")
    parser.add_argument("--shape", default="0.5B", choices=NAMES, help="Qwen2.5 of that size")
    parser.add_argument("--batch", default="1,16", help="rows, comma-separated")
    parser.add_argument("--context", default="1024", help="cached tokens of attention")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--plot", type=Path, help="write a roofline to this PNG")
