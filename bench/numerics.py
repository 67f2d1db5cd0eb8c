"""Every operation of a device against the same in torch: error, repeatability, untouched poison.

The rule has no tolerance of its own: against an oracle in float64, an operation may err twice as
much as torch's in the low type, and two units of the low type's rounding. Memory that torch hands
out is filled with NaN, so what was never written shows; a second run must give the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from s1engine.bench.kernel_speed import Place
from s1engine.ops import AttentionMetadata, Ops
from s1engine.ops.torch_ops import TorchOps

CONTEXTS = (1, 63, 64, 65, 4097)
Call = Callable[[Ops, Callable[[Tensor], Tensor]], Tensor]
"""Runs an operation on fresh copies of its inputs, each cast by the second argument."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def norm_call(at: Place, tokens: int) -> Call:
    x, residual = (at.normal(tokens, at.model.hidden_size) for _ in range(2))
    weight = at.normal(at.model.hidden_size)
    return lambda ops, cast: ops.add_rms_norm(cast(x), cast(residual), cast(weight), 1e-6)


def silu_call(at: Place, tokens: int) -> Call:
    x = at.normal(tokens, 2 * at.model.intermediate_size)
    return lambda ops, cast: ops.silu_and_mul(cast(x))


def attention_call(at: Place, lens_q: list[int], contexts: list[int], block: int) -> Call:
    """Rows of ``lens_q`` new tokens at the ends of ``contexts``, over shuffled blocks."""
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
    return lambda ops, cast: ops.paged_attention(cast(q), cast(k), cast(v), scale, meta)


def calls(at: Place, block: int) -> dict[str, Call]:
    """The cases by name, at corners of their shapes."""
    found = {f"add_rms_norm T={t}": norm_call(at, t) for t in (1, 7, 513)}
    found |= {f"silu_and_mul T={t}": silu_call(at, t) for t in (1, 65)}
    found |= {
        f"decode B={b}": attention_call(at, [1] * b, [CONTEXTS[i % 5] for i in range(b)], block)
        for b in (1, 5, 64)
    }
    found["extend mixed"] = attention_call(at, [1, 63, 200, 5], [65, 63, 900, 4097], block)
    found["extend few"] = attention_call(at, [4, 3, 1], [64, 1000, 1], block)
    return found


def check(call: Call, ops: Ops, dtype: torch.dtype) -> dict[str, Any]:
    """Errors against the oracle and whether the rule holds."""
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
    """Largest absolute error; NaN counts as infinite."""
    return float((got.double() - exact).abs().nan_to_num(nan=float("inf")).max())
