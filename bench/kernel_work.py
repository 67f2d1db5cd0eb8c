"""Operations of ``Ops`` at a model's shapes, each with its bytes, its FLOPs and a torch baseline.

Each has its own buffers. The baseline is the same operation of torch; for attention that is
``scaled_dot_product_attention`` over contiguous keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.bench.device_time import Launch
from s1engine.bench.shapes import matrix_shapes
from s1engine.models.model_config import ModelConfig
from s1engine.ops import AttentionMetadata, Matrix, Ops, SamplingMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.resolved_config import BLOCK_SIZES

SHORT_PART = 32  # a ragged batch has one long row, and others of this part of it


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """Model, data type and device of a measurement; creates operands."""

    model: ModelConfig
    dtype: torch.dtype
    device: str

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class KernelWork:
    """A launch of an operation, of its baseline, and the least bytes and FLOPs that it needs."""

    ours: Launch
    baseline: Launch
    nbytes: float
    flops: float = 0


WorkFactory = Callable[[BenchSetup, Ops, int, int], KernelWork]


def _rms_norm(at: BenchSetup, ops: Ops, tokens: int, context: int) -> KernelWork:
    x, residual = (at.normal(tokens, at.model.hidden_size) for _ in range(2))
    weight = at.normal(at.model.hidden_size)
    plain = TorchOps()
    return KernelWork(
        lambda: ops.add_rms_norm(x, residual, weight, 1e-6),
        lambda: plain.add_rms_norm(x, residual, weight, 1e-6),
        4 * x.nbytes,
    )


def _silu_and_mul(at: BenchSetup, ops: Ops, tokens: int, context: int) -> KernelWork:
    x = at.normal(tokens, 2 * at.model.intermediate_size)
    return KernelWork(
        lambda: ops.silu_and_mul(x), lambda: TorchOps().silu_and_mul(x), 1.5 * x.nbytes
    )


def _linear(at: BenchSetup, ops: Ops, tokens: int, context: int, *, matrix: str) -> KernelWork:
    n, k = matrix_shapes(at.model)[matrix]
    x, weight = at.normal(tokens, k), at.normal(n, k)
    packed = ops.pack(weight)
    return KernelWork(
        lambda: ops.linear(x, packed),
        lambda: functional.linear(x, weight),
        weight.nbytes + x.nbytes + tokens * n * x.itemsize,
        2.0 * tokens * n * k,
    )


def _norm_gate_up(at: BenchSetup, ops: Ops, tokens: int, context: int) -> KernelWork:
    m = at.model
    residual, norm = at.normal(tokens, m.hidden_size), at.normal(m.hidden_size)
    weight = at.normal(2 * m.intermediate_size, m.hidden_size)
    packed = ops.pack(weight)
    plain = TorchOps()
    return KernelWork(
        lambda: ops.norm_gate_up(None, residual, norm, 1e-6, packed),
        lambda: plain.norm_gate_up(None, residual, norm, 1e-6, weight),
        weight.nbytes + residual.nbytes + tokens * m.intermediate_size * residual.itemsize,
        2.0 * tokens * weight.numel(),
    )


def _norm_qkv(at: BenchSetup, ops: Ops, tokens: int, context: int) -> KernelWork:
    """Everything before attention; each token is the first of its sequence."""
    m, block = at.model, BLOCK_SIZES[at.device]
    residual, norm = at.normal(tokens, m.hidden_size), at.normal(m.hidden_size)
    weight = at.normal((m.num_heads + 2 * m.num_kv_heads) * m.head_dim, m.hidden_size)
    packed = ops.pack(weight)
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

    def call(ops: Ops, matrix: Matrix) -> Tensor:
        return ops.norm_qkv_rope_write(
            None, residual, norm, 1e-6, matrix, None, None, None, cos_sin, k, v, meta
        )

    return KernelWork(
        lambda: call(ops, packed),
        lambda: call(plain, weight),
        weight.nbytes + residual.nbytes + tokens * weight.shape[0] * residual.itemsize,
        2.0 * tokens * weight.numel(),
    )


def _cache(at: BenchSetup, rows: int, context: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """K, V and a block table with shuffled blocks for ``rows`` sequences."""
    per_row = -(-context // block)
    size = (rows * per_row, at.model.num_kv_heads, block, at.model.head_dim)
    table = torch.randperm(rows * per_row, device=at.device).view(rows, per_row).to(torch.int32)
    spare = torch.zeros((rows, 1), dtype=torch.int32, device=at.device)
    return at.normal(*size), at.normal(*size), torch.cat((table, spare), dim=1)


def _attention(at: BenchSetup, ops: Ops, rows: int, context: int, *, new: int) -> KernelWork:
    """``new`` tokens a row at the end of ``context``; 1 is decode."""
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
    whole = 1 < new == context
    mask = None
    if 1 < new < context:
        mask = torch.ones(new, context, device=at.device).tril(context - new) > 0
    pairs = new * (context - (new - 1) / 2)
    return KernelWork(
        lambda: ops.paged_attention(q, k, v, m.head_dim**-0.5, meta),
        lambda: functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=True
        ),
        2 * keys.nbytes + 2 * q.nbytes,
        4.0 * rows * m.num_heads * m.head_dim * pairs,
    )


def _decode_ragged(at: BenchSetup, ops: Ops, rows: int, context: int) -> KernelWork:
    """Decode attention of one row over ``context`` and of the others over a part of it. The
    baseline is ours too: the same number of tokens in equal rows."""
    others = -(-context // SHORT_PART)
    lens = [context, *[others] * (rows - 1)]
    equal = [sum(lens) // rows + (i < sum(lens) % rows) for i in range(rows)]
    m = at.model
    k, v, table = _cache(at, rows, context, BLOCK_SIZES[at.device])
    q = at.normal(rows, m.num_heads, m.head_dim)

    def call(lens: list[int]) -> Launch:
        meta = AttentionMetadata(
            positions=at.ints(lens) - 1,
            slot_mapping=at.ints(lens, torch.int64) - 1,
            cu_seqlens_q=at.ints(range(rows + 1)),
            context_lens=at.ints(lens),
            block_table=table,
            max_seqlen_q=1,
        )
        return lambda: ops.paged_attention(q, k, v, m.head_dim**-0.5, meta)

    kv = 2 * m.num_kv_heads * m.head_dim * sum(lens)
    flops = 4.0 * m.num_heads * m.head_dim * sum(lens)
    return KernelWork(call(lens), call(equal), kv * q.itemsize + 2 * q.nbytes, flops)


def _sample(at: BenchSetup, ops: Ops, rows: int, context: int, *, filtered: bool) -> KernelWork:
    """``filtered``: temperature 0.6, top-k 20 and top-p 0.95."""
    logits = torch.randn(rows, at.model.vocab_size, device=at.device)
    ones = torch.ones(rows, device=at.device)
    meta = SamplingMetadata(
        temperature=ones * (0.6 if filtered else 1),
        top_k=at.ints([20 * filtered] * rows),
        top_p=ones * (0.95 if filtered else 1),
        min_p=0 * ones,
        seeds=at.ints(range(rows), torch.int64),
        positions=at.ints(range(rows), torch.int64),
        all_greedy=False,
        filtered=filtered,
    )

    def baseline() -> Tensor:
        values, ids = logits.topk(20) if filtered else (logits, None)
        drawn = torch.multinomial(values.softmax(-1), 1)
        return drawn if ids is None else ids.gather(1, drawn)

    return KernelWork(lambda: ops.sample(logits, meta), baseline, logits.nbytes)


KERNELS: dict[str, WorkFactory] = {
    "rms_norm": _rms_norm,
    "silu_and_mul": _silu_and_mul,
    **{f"linear_{matrix}": partial(_linear, matrix=matrix)
       for matrix in ("qkv", "o", "gate_up", "down", "lm_head")},
    "norm_qkv": _norm_qkv,
    "norm_gate_up": _norm_gate_up,
    "decode": partial(_attention, new=1),
    "extend": partial(_attention, new=2048),
    "decode_ragged": _decode_ragged,
    "sample": partial(_sample, filtered=False),
    "sample_filtered": partial(_sample, filtered=True),
}  # fmt: skip
CONTEXT_MATTERS = ("decode", "decode_ragged", "extend")
