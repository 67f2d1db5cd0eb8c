"""Kernels over an fp8 KV cache write and read the same values as torch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter

from s1engine.kernels import launch_table
from s1engine.ops import AttentionMetadata, kv_quant
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.kernels.oracle import assert_as_good_as, in_double
from tests.ops.test_kv_quant import attention_case, values
from tests.ops.test_torch_ops import randn
from tests.paged import make_meta

TORCH, TRITON = TorchOps(), TritonOps()
FP8 = torch.float8_e4m3fn
DTYPES = st.sampled_from([torch.float32, torch.float16])
HEADS = st.sampled_from([(4, 4), (7, 1), (10, 2)])
SCALE = 0.2


@pytest.fixture(autouse=True)
def a_small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer splits to interpret; test_attention covers any number."""
    monkeypatch.setattr(launch_table, "NUM_SMS", 4)


@pytest.fixture
def rounded_as_by_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch rounds to fp8: the interpreter loses the carry (1.99 becomes 1). It also clamps values
    that are too large, on which a kernel must not rely; here they become NaN."""
    theirs = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.float8e4nv:
            return theirs(data, source, target, rounding)
        floats = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        floats[floats.abs() > torch.finfo(FP8).max] = torch.nan
        return floats.to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def caches(num_kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    empty = torch.full((9, num_kv_heads, 16, dim), 0x7F, dtype=torch.uint8).view(FP8)  # NaN
    return empty, empty.clone()


def as_bytes(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack([cache.view(torch.uint8) for cache in pair])


@pytest.mark.usefixtures("rounded_as_by_hardware")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64])
def test_rope_write_writes_the_same_bytes(dtype: torch.dtype, dim: int) -> None:
    """Rotated by angle 0, since sums of products may be fused or not; some values exceed 448."""
    meta = make_meta([2, 1, 3], [40, 7, 3], 16, num_blocks=9)
    turn = torch.zeros(64, dim)
    turn[:, : dim // 2] = 1
    wanted, got = caches(2, dim), caches(2, dim)
    for ops, pair in ((TORCH, wanted), (TRITON, got)):
        q, k, v = (values(6, heads, dim, seed=heads, dtype=dtype) for heads in (6, 2, 2))
        ops.rope_write(q, k, v, turn, *pair, meta)
    assert torch.equal(as_bytes(got), as_bytes(wanted))
    assert float(kv_quant.dequantize(got[1]).nan_to_num(0).max()) == 448


@pytest.mark.usefixtures("rounded_as_by_hardware")
@pytest.mark.parametrize("tokens", [2, 20])
def test_the_fused_kernel_writes_what_torch_does(tokens: int) -> None:
    """A value between two fp8 values may differ by one place: an earlier rounding decides."""
    heads, kv_heads, dim, hidden = 3, 1, 16, 32
    meta = make_meta([tokens], [tokens + 3], 16, 9)
    table = torch.cat([f(randn(80, dim // 2, seed=7)) for f in (torch.cos, torch.sin)], dim=-1)
    norm, weight = randn(hidden, seed=1), randn((heads + 2 * kv_heads) * dim, hidden, seed=2)
    wanted, got = caches(kv_heads, dim), caches(kv_heads, dim)
    for ops, pair in ((TORCH, wanted), (TRITON, got)):
        x = randn(tokens, hidden)
        ops.norm_qkv_rope_write(
            None, x, norm, 1e-6, weight, None, None, None, table, *pair, meta
        )  # fmt: skip
    apart = (as_bytes(got).int() - as_bytes(wanted).int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.01
    assert int((as_bytes(wanted) != 0x7F).sum()) == 2 * tokens * dim


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, meta: AttentionMetadata, slack: float = 2
) -> None:
    out = TRITON.paged_attention(q, k, v, SCALE, meta)
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta)
    truth = in_double(q, kv_quant.dequantize(k), kv_quant.dequantize(v), SCALE, meta)
    assert_as_good_as(out, by_torch, truth, slack)


@settings(max_examples=5)
@given(
    contexts=st.lists(st.integers(1, 150), min_size=1, max_size=2),
    heads=HEADS,
    dim=st.sampled_from([16, 64]),
    block_size=st.sampled_from([16, 64]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_decode(
    contexts: list[int],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    lens = [(1, n) for n in contexts]
    check_attention(*attention_case(lens, block_size, (*heads, dim), dtype, FP8, seed))


@settings(max_examples=4)
@given(
    lens=st.lists(
        st.integers(2, 90).flatmap(lambda n: st.tuples(st.integers(2, n), st.just(n))),
        min_size=1,
        max_size=3,
    ),
    heads=HEADS,
    dim=st.sampled_from([16, 64]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_prefill(
    lens: list[tuple[int, int]], heads: tuple[int, int], dim: int, dtype: torch.dtype, seed: int
) -> None:
    check_attention(*attention_case(lens, 16, (*heads, dim), dtype, FP8, seed))


def test_queries_in_bf16_meet_keys_in_fp16() -> None:
    """Both types hold every e4m3; only the output is rounded to bf16, by the interpreter."""
    q, k, v, meta = attention_case([(1, 40), (1, 70)], 16, (6, 2, 16), torch.bfloat16, FP8, 3)
    truth = in_double(q, kv_quant.dequantize(k), kv_quant.dequantize(v), SCALE, meta)
    out = TRITON.paged_attention(q, k, v, SCALE, meta)
    torch.testing.assert_close(out.double(), truth, rtol=2**-7, atol=1e-3)
