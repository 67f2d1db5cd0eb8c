"""Every operation of a device against torch's: error, repeatability, uninitialized memory.

No tolerances: against an oracle in float64, an operation's error is at most twice that of torch in
the low type, plus two units of that type's rounding. New memory is filled with NaN, so values that
are never written show. A second run must give the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from s1engine.bench.kernel_work import BenchSetup
from s1engine.models.rope_table import cos_sin_table
from s1engine.ops import AttentionMetadata, Matrix, Ops
from s1engine.ops.quantization import FP8, quantize
from s1engine.ops.torch_ops import TorchOps

CONTEXTS = (1, 63, 64, 65, 4097)
Call = Callable[[Ops, Callable[[Tensor], Tensor]], Tensor]
"""Calls an operation on fresh copies of its inputs, each cast by the second argument."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, uninitialized memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def norm_call(at: BenchSetup, tokens: int) -> Call:
    x, residual = (at.normal(tokens, at.model.hidden_size) for _ in range(2))
    weight = at.normal(at.model.hidden_size)
    return lambda ops, cast: ops.add_rms_norm(cast(x), cast(residual), cast(weight), 1e-6)


def silu_call(at: BenchSetup, tokens: int) -> Call:
    x = at.normal(tokens, 2 * at.model.intermediate_size)
    return lambda ops, cast: ops.silu_and_mul(cast(x))


def matrix(
    ops: Ops, cast: Callable[[Tensor], Tensor], weight: Tensor, quantization: str | None
) -> Matrix:
    """weight packed for ``ops``; quantized before the cast, so equal in every type."""
    if quantization is None:
        return ops.pack(cast(weight))
    return ops.pack(replace(quantize(weight, quantization), dtype=cast(weight[:1]).dtype))


def gate_up_call(at: BenchSetup, tokens: int, quantization: str | None = None) -> Call:
    m = at.model
    residual, norm = at.normal(tokens, m.hidden_size), at.normal(m.hidden_size)
    weight = at.normal(2 * m.intermediate_size, m.hidden_size) * m.hidden_size**-0.5
    return lambda ops, cast: ops.norm_gate_up(
        None, cast(residual), cast(norm), 1e-6, matrix(ops, cast, weight, quantization)
    )


def residual_call(at: BenchSetup, tokens: int, quantization: str | None = None) -> Call:
    m = at.model
    x, residual = at.normal(tokens, m.intermediate_size), at.normal(tokens, m.hidden_size)
    weight = at.normal(m.hidden_size, m.intermediate_size) * m.intermediate_size**-0.5

    def call(ops: Ops, cast: Callable[[Tensor], Tensor]) -> Tensor:
        total = cast(residual)
        w = matrix(ops, cast, weight, quantization)
        pending_residual = ops.linear_residual(cast(x), w, None, total)
        return total if pending_residual is None else total + pending_residual

    return call


def qkv_call(at: BenchSetup, tokens: int, block: int, quantization: str | None = None) -> Call:
    """Queries as returned, keys and values as stored in the cache."""
    m = at.model
    residual, norm = at.normal(tokens, m.hidden_size), at.normal(m.hidden_size)
    rows = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    weight, bias = at.normal(rows, m.hidden_size) * m.hidden_size**-0.5, at.normal(rows)
    size = (tokens // block + 1, m.num_kv_heads, block, m.head_dim)
    meta = AttentionMetadata(
        positions=at.ints(range(tokens)),
        slot_mapping=at.ints(range(tokens), torch.int64),
        cu_seqlens_q=at.ints([0, tokens]),
        context_lens=at.ints([tokens]),
        block_table=at.ints([list(range(size[0]))]),
        max_seqlen_q=tokens,
    )
    cos_sin = cos_sin_table(m.head_dim, m.rope, tokens).to(at.device)

    def call(ops: Ops, cast: Callable[[Tensor], Tensor]) -> Tensor:
        k, v = (cast(torch.zeros(size, dtype=at.dtype, device=at.device)) for _ in range(2))
        q = ops.norm_qkv_rope_write(
            None, cast(residual), cast(norm), 1e-6, matrix(ops, cast, weight, quantization),
            cast(bias), None, None, cos_sin, k, v, meta,
        )  # fmt: skip
        return torch.cat((q.flatten(), k.flatten(), v.flatten()))

    return call


def attention_call(
    at: BenchSetup, lens_q: list[int], contexts: list[int], block: int, window: int = 0
) -> Call:
    """Rows of ``lens_q`` new tokens at the ends of ``contexts``, in shuffled blocks; with a
    ``window`` each head has a sink as well."""
    m = at.model
    columns = max(-(-context // block) for context in contexts) + 1
    table = torch.randperm(len(contexts) * columns, device=at.device).view(len(contexts), columns)
    q = at.normal(sum(lens_q), m.num_heads, m.head_dim)
    k, v = (at.normal(table.numel(), m.num_kv_heads, block, m.head_dim) for _ in range(2))
    starts = torch.tensor([0, *lens_q]).cumsum(0)
    meta = AttentionMetadata(
        positions=at.ints([0] * sum(lens_q)),
        slot_mapping=at.ints([0] * sum(lens_q), torch.int64),
        cu_seqlens_q=at.ints(starts),
        context_lens=at.ints(contexts),
        block_table=table.to(torch.int32),
        max_seqlen_q=max(lens_q),
    )
    scale = m.head_dim**-0.5
    sinks = at.normal(m.num_heads).to(torch.float32) if window else None
    return lambda ops, cast: ops.paged_attention(
        cast(q), cast(k), cast(v), scale, meta, window, sinks
    )


def numeric_cases(at: BenchSetup, block: int) -> dict[str, Call]:
    """Calls by name, at corners of their shapes."""
    cases = {f"add_rms_norm T={t}": norm_call(at, t) for t in (1, 7, 513)}
    cases |= {f"silu_and_mul T={t}": silu_call(at, t) for t in (1, 65)}
    for tokens in (1, 4, 5, 64, 65):
        cases[f"norm_gate_up T={tokens}"] = gate_up_call(at, tokens)
        cases[f"linear_residual T={tokens}"] = residual_call(at, tokens)
        cases[f"norm_qkv_rope_write T={tokens}"] = qkv_call(at, tokens, block)
    if at.device == "cuda":  # the numbers of tokens for which inputs are not quantized
        for tokens in (1, 4, 5, 64):
            cases[f"norm_gate_up fp8 T={tokens}"] = gate_up_call(at, tokens, FP8)
            cases[f"linear_residual fp8 T={tokens}"] = residual_call(at, tokens, FP8)
            cases[f"norm_qkv_rope_write fp8 T={tokens}"] = qkv_call(at, tokens, block, FP8)
    cases |= {
        f"decode B={b}": attention_call(at, [1] * b, [CONTEXTS[i % 5] for i in range(b)], block)
        for b in (1, 5, 64)
    }
    cases["extend mixed"] = attention_call(at, [1, 63, 200, 5], [65, 63, 900, 4097], block)
    cases["extend few"] = attention_call(at, [4, 3, 1], [64, 1000, 1], block)
    for window in (1, 128, 1000):
        cases[f"decode W={window}"] = attention_call(at, [1] * 5, list(CONTEXTS), block, window)
        cases[f"extend W={window}"] = attention_call(
            at, [1, 63, 200], [65, 63, 4097], block, window
        )
    return cases


def compare_with_oracle(call: Call, ops: Ops, dtype: torch.dtype) -> dict[str, Any]:
    """Errors against the oracle, and whether they are within the rule."""
    plain = TorchOps()
    with torch.inference_mode(), poisoned():
        exact = call(plain, lambda t: t.to(torch.float64))
        torchs = call(plain, lambda t: t.to(dtype, copy=True))
        ours, again = (call(ops, lambda t: t.to(dtype, copy=True)) for _ in range(2))
    error, allowed = _error(ours, exact), _error(torchs, exact)
    rounding = torch.finfo(dtype).eps * float(exact.abs().max())
    return {
        "error": error,
        "torch_error": allowed,
        "repeats": bool(torch.equal(ours, again)),
        "ok": error <= 2 * allowed + 2 * rounding and bool(torch.equal(ours, again)),
    }


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute error; NaN counts as infinity."""
    return float((got.double() - exact).abs().nan_to_num(nan=float("inf")).max())
