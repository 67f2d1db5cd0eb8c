"""Every operation at the shapes of a model, against its ceiling and against torch.

An operation is what the engine calls through ``Ops``: Triton kernels on CUDA, C++ on the CPU. Its
ceiling is the larger of bytes over the measured read bandwidth and operations over the measured
matrix speed; its baseline the same operation of torch on the same buffers, for attention
``scaled_dot_product_attention`` over contiguous keys and values.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from s1engine.bench.device_time import Launch, ceilings, copies, seconds
from s1engine.bench.shapes import NAMES, shape
from s1engine.errors import RequestError
from s1engine.models.config import ModelConfig
from s1engine.ops import AttentionMetadata, Ops, SamplingMetadata, select_ops
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.device import BLOCK_SIZES, resolve_device, resolve_dtype


@dataclass(frozen=True, slots=True)
class Place:
    """Where and in which type to measure."""

    model: ModelConfig
    dtype: torch.dtype
    device: str

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Work:
    """One launch of an operation: ours, torch's, and what it must move and compute at least."""

    ours: Launch
    baseline: Launch
    nbytes: float
    flops: float = 0


Make = Callable[[Place, Ops, int, int], Work]


def _rms_norm(at: Place, ops: Ops, tokens: int, context: int) -> Work:
    x, residual = (at.normal(tokens, at.model.hidden_size) for _ in range(2))
    weight = at.normal(at.model.hidden_size)
    plain = TorchOps()
    return Work(
        lambda: ops.add_rms_norm(x, residual, weight, 1e-6),
        lambda: plain.add_rms_norm(x, residual, weight, 1e-6),
        4 * x.nbytes,
    )


def _silu_and_mul(at: Place, ops: Ops, tokens: int, context: int) -> Work:
    x = at.normal(tokens, 2 * at.model.intermediate_size)
    return Work(lambda: ops.silu_and_mul(x), lambda: TorchOps().silu_and_mul(x), 1.5 * x.nbytes)


def _linear(at: Place, ops: Ops, tokens: int, context: int, *, rows: str) -> Work:
    m = at.model
    n, k = {
        "qkv": ((m.num_heads + 2 * m.num_kv_heads) * m.head_dim, m.hidden_size),
        "o": (m.hidden_size, m.num_heads * m.head_dim),
        "gate_up": (2 * m.intermediate_size, m.hidden_size),
        "down": (m.hidden_size, m.intermediate_size),
        "lm_head": (m.vocab_size, m.hidden_size),
    }[rows]
    x, weight = at.normal(tokens, k), at.normal(n, k)
    return Work(
        lambda: ops.linear(x, weight),
        lambda: functional.linear(x, weight),
        weight.nbytes + x.nbytes + tokens * n * x.itemsize,
        2.0 * tokens * n * k,
    )


def _norm_gate_up(at: Place, ops: Ops, tokens: int, context: int) -> Work:
    m = at.model
    residual, norm = at.normal(tokens, m.hidden_size), at.normal(m.hidden_size)
    weight = at.normal(2 * m.intermediate_size, m.hidden_size)
    plain = TorchOps()
    return Work(
        lambda: ops.norm_gate_up(None, residual, norm, 1e-6, weight),
        lambda: plain.norm_gate_up(None, residual, norm, 1e-6, weight),
        weight.nbytes + residual.nbytes + tokens * m.intermediate_size * residual.itemsize,
        2.0 * tokens * weight.numel(),
    )


def _norm_qkv(at: Place, ops: Ops, tokens: int, context: int) -> Work:
    """Everything before attention; each token is the first of a sequence of its own."""
    m, block = at.model, BLOCK_SIZES[at.device]
    residual, norm = at.normal(tokens, m.hidden_size), at.normal(m.hidden_size)
    weight = at.normal((m.num_heads + 2 * m.num_kv_heads) * m.head_dim, m.hidden_size)
    k, v, table = _cache(at, tokens, 1, block)
    meta = AttentionMetadata(
        positions=at.ints([0] * tokens),
        slot_mapping=table[:, 0].long() * block,
        cu_seqlens_q=at.ints(range(tokens + 1)),
        context_lens=at.ints([1] * tokens),
        block_table=table,
        max_seqlen_q=1,
    )
    cos_sin = torch.ones(1, m.head_dim, device=at.device)
    plain = TorchOps()

    def call(ops: Ops) -> Tensor:
        return ops.norm_qkv_rope_write(
            None, residual, norm, 1e-6, weight, None, None, None, cos_sin, k, v, meta
        )

    return Work(
        lambda: call(ops),
        lambda: call(plain),
        weight.nbytes + residual.nbytes + tokens * weight.shape[0] * residual.itemsize,
        2.0 * tokens * weight.numel(),
    )


def _cache(at: Place, rows: int, context: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """K, V and a block table whose blocks are shuffled, for so many sequences."""
    per_row = -(-context // block)
    size = (rows * per_row, at.model.num_kv_heads, block, at.model.head_dim)
    table = torch.randperm(rows * per_row, device=at.device).view(rows, per_row).to(torch.int32)
    spare = torch.zeros((rows, 1), dtype=torch.int32, device=at.device)
    return at.normal(*size), at.normal(*size), torch.cat((table, spare), dim=1)


def _attention(at: Place, ops: Ops, rows: int, context: int, *, new: int) -> Work:
    """``new`` tokens a row at the end of ``context``: 1 is decode."""
    m, block = at.model, BLOCK_SIZES[at.device]
    new = min(new, context)
    k, v, table = _cache(at, rows, context, block)
    q = at.normal(rows * new, m.num_heads, m.head_dim)
    positions = torch.arange(context - new, context).repeat(rows)
    meta = AttentionMetadata(
        positions=at.ints(positions),
        slot_mapping=at.ints(positions, torch.int64),
        cu_seqlens_q=at.ints(torch.arange(rows + 1) * new),
        context_lens=at.ints([context] * rows),
        block_table=table,
        max_seqlen_q=new,
    )
    keys, values = (at.normal(rows, m.num_kv_heads, context, m.head_dim) for _ in range(2))
    queries = at.normal(rows, m.num_heads, new, m.head_dim)
    mask = None if new == 1 else torch.ones(new, context, device=at.device).tril(context - new) > 0
    pairs = new * (context - (new - 1) / 2)
    return Work(
        lambda: ops.paged_attention(q, k, v, m.head_dim**-0.5, meta),
        lambda: functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        ),
        2 * keys.nbytes + 2 * q.nbytes,
        4.0 * rows * m.num_heads * m.head_dim * pairs,
    )


def _sample(at: Place, ops: Ops, rows: int, context: int) -> Work:
    logits = torch.randn(rows, at.model.vocab_size, device=at.device)
    ones = torch.ones(rows, device=at.device)
    meta = SamplingMetadata(
        temperature=ones,
        top_k=at.ints([0] * rows),
        top_p=ones,
        min_p=0 * ones,
        seeds=at.ints(range(rows), torch.int64),
        positions=at.ints(range(rows), torch.int64),
        all_greedy=False,
        filtered=False,
    )
    return Work(
        lambda: ops.sample(logits, meta),
        lambda: torch.multinomial(logits.softmax(-1), 1),
        logits.nbytes,
    )


KERNELS: dict[str, Make] = {
    "rms_norm": _rms_norm,
    "silu_and_mul": _silu_and_mul,
    **{f"linear_{rows}": partial(_linear, rows=rows)
       for rows in ("qkv", "o", "gate_up", "down", "lm_head")},
    "norm_qkv": _norm_qkv,
    "norm_gate_up": _norm_gate_up,
    "decode": partial(_attention, new=1),
    "extend": partial(_attention, new=2048),
    "sample": _sample,
}  # fmt: skip
CONTEXT_MATTERS = ("decode", "extend")
MAX_BYTES = 16 * 2**30  # of one case's operands


def measure(
    name: str, at: Place, batch: int, context: int, limits: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table: seconds of ours and of the baseline, share of the ceiling."""
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
    names: Sequence[str], batches: Sequence[int], contexts: Sequence[int], at: Place
) -> Iterator[tuple[str, int, int]]:
    """Kernel, batch and context of each row; those whose operands are too large are left out."""
    kv = 2 * at.model.num_kv_heads * at.model.head_dim * at.dtype.itemsize
    for name in names:
        for batch in batches:
            for context in contexts if name in CONTEXT_MATTERS else contexts[:1]:
                if name not in CONTEXT_MATTERS or 2 * kv * batch * context < MAX_BYTES:
                    yield name, batch, context


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All cases, with a table on stderr."""
    names = list(KERNELS) if args.kernels == "all" else args.kernels.split(",")
    for name in names:
        if name not in KERNELS:
            raise RequestError(
                f"kernels: {name!r} is unknown; there are {', '.join(KERNELS)}", param="kernels"
            )
    device = resolve_device(args.device)
    model = shape(args.shape)
    at = Place(model, resolve_dtype(args.dtype, device, torch.bfloat16), device)
    limits = ceilings(device)
    batches, contexts = numbers("batch", args.batch), numbers("context", args.context)
    todo = list(cases(names, batches, contexts, at))
    rows = [
        measure(name, at, batch, context, limits)
        for name, batch, context in tqdm(todo, unit="case")
    ]
    print(table(rows), file=sys.stderr)
    if args.plot is not None:
        from s1engine.bench.roofline import draw

        draw(rows, limits, args.plot, f"{args.shape}, {device}")
    return {"shape": args.shape, "dtype": str(at.dtype), "ceilings": limits, "rows": rows}


def numbers(param: str, text: str) -> list[int]:
    """Comma-separated positive integers. Raises RequestError naming the flag."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{param} must be integers; got {text!r}", param=param) from error
    if not all(number > 0 for number in found):
        raise RequestError(f"{param} must be positive; got {text!r}", param=param)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
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
