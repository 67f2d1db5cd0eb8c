"""The skinny linears on odd shapes: rows and columns that fill no tile, any number of K splits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from s1engine.kernels import launch_table
from s1engine.kernels.linear import linear
from s1engine.kernels.norm_gate_up import norm_gate_up
from s1engine.kernels.norm_qkv_rope_write import norm_qkv_rope_write
from s1engine.ops.torch_ops import TorchOps
from tests.kernels.oracle import assert_as_good_as
from tests.ops.test_torch_ops import randn, rotated
from tests.paged import make_meta

TORCH = TorchOps()
DTYPES = st.sampled_from([torch.float32, torch.float16])
TOKENS = st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33, 64])
WIDTHS = st.sampled_from([8, 97, 128, 300, 520])
EPS = 1e-5


def workspace() -> tuple[Tensor, Tensor]:
    """Partial sums full of NaN, and counters."""
    floats, counters = launch_table.SPLIT_K_WORKSPACE
    return torch.full((floats,), math.nan), torch.zeros(counters, dtype=torch.int32)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def check(actual: Tensor, by_torch: Tensor, truth: Tensor, k: int) -> None:
    """Allow for sums of k products in another order than torch's."""
    slack = 2.0 if actual.dtype == torch.float16 else math.sqrt(k)
    assert_as_good_as(actual, by_torch, truth, slack)


@settings(max_examples=15)
@given(
    tokens=TOKENS,
    n=st.sampled_from([1, 7, 65, 97]),
    k=WIDTHS,
    residual=st.booleans(),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_linear(
    tokens: int, n: int, k: int, residual: bool, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    x = randn(tokens, k + 3, seed=seed, dtype=dtype)[:, :k]
    w, b = randn(n, k, seed=seed + 1, dtype=dtype), randn(n, seed=seed + 2, dtype=dtype)
    old = randn(tokens, n, seed=seed + 3, dtype=dtype)
    by_torch = functional.linear(x, w, b if bias else None) + (old if residual else 0)
    truth = x.double() @ w.double().T + (b.double() if bias else 0)
    truth += old.double() if residual else 0
    space = workspace()
    out = linear(x, w, b if bias else None, space, old if residual else None)
    check(out, by_torch, truth, k)
    assert (out is old) == residual and not space[1].any()


@settings(max_examples=10)
@given(
    tokens=TOKENS, f=st.sampled_from([1, 30, 65]), k=WIDTHS, dtype=DTYPES, seed=st.integers(0, 99)
)
def test_norm_gate_up(tokens: int, f: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x, norm = randn(tokens, k, seed=seed, dtype=dtype) * 3, randn(k, seed=1, dtype=dtype)
    w = randn(2 * f, k, seed=seed + 1, dtype=dtype)
    gate, up = (normed(x, norm) @ w.double().T).chunk(2, dim=-1)
    truth = gate / (1 + torch.exp(-gate)) * up
    by_torch = TORCH.silu_and_mul(functional.linear(TORCH.rms_norm(x, norm, EPS), w))
    space = workspace()
    check(norm_gate_up(x, norm, EPS, w, space), by_torch, truth, k)
    assert not space[1].any()


@settings(max_examples=8)
@given(
    tokens=TOKENS,
    heads=st.sampled_from([(2, 1), (3, 1), (2, 2)]),
    dim=st.sampled_from([16, 32]),
    k=st.sampled_from([8, 97, 300]),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_norm_qkv_rope_write(
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    k: int,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    num_heads, num_kv = heads
    meta = make_meta([1] * tokens, [7 * i % 41 + 1 for i in range(tokens)], 16, 3 * tokens, seed)
    angles = randn(64, dim // 2, seed=1)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    x, norm = randn(tokens, k, seed=seed, dtype=dtype), randn(k, seed=1, dtype=dtype)
    w = randn((num_heads + 2 * num_kv) * dim, k, seed=seed + 1, dtype=dtype)
    b = randn(len(w), seed=seed + 2, dtype=dtype) if bias else None
    sizes = [num_heads, num_kv, num_kv]

    exact = (normed(x, norm) @ w.double().T + (0 if b is None else b.double())).view(
        tokens, -1, dim
    )
    q, keys, values = torch.split(exact, sizes, dim=1)
    q, keys = (rotated(part, table, meta.positions) for part in (q, keys))
    fresh = torch.full((3 * tokens, num_kv, 16, dim), math.nan, dtype=dtype)
    k_torch, v_torch, k_cache, v_cache = (fresh.clone() for _ in range(4))
    by_torch = functional.linear(TORCH.rms_norm(x, norm, EPS), w, b).view(tokens, -1, dim)
    q_torch, *kv_torch = torch.split(by_torch, sizes, dim=1)
    TORCH.rope_write(q_torch, *kv_torch, table, k_torch, v_torch, meta)

    space = workspace()
    out = norm_qkv_rope_write(
        x, norm, EPS, w, b, table, k_cache, v_cache, meta.positions, meta.slot_mapping, space
    )
    check(out, q_torch, q, k)
    blocks, offsets = meta.slot_mapping // 16, meta.slot_mapping % 16
    for cache, theirs, truth in ((k_cache, k_torch, keys), (v_cache, v_torch, values)):
        check(cache[blocks, :, offsets], theirs[blocks, :, offsets], truth, k)
        assert torch.equal(cache.isnan(), theirs.isnan())
    assert not space[1].any()


@pytest.mark.parametrize("tokens", [1, 20])
def test_split_sums_are_the_same_bits_again(tokens: int) -> None:
    x, w = randn(tokens, 2048, dtype=torch.float16), randn(9, 2048, seed=1, dtype=torch.float16)
    space = workspace()
    assert launch_table.skinny_gemm_tiles(tokens, 9, 2048, 2).split_k > 1
    first = linear(x, w, None, space)
    assert torch.equal(linear(x, w, None, space), first)


def test_a_norm_in_front_of_a_product_does_not_overflow() -> None:
    """float16: x times the norm's weight exceeds the type, the normed x does not."""
    x, norm = torch.full((5, 64), 9000.0).half(), torch.full((64,), 20.0).half()
    w = torch.full((2, 64), 2.0**-7).half()
    out = norm_gate_up(x, norm, EPS, w, workspace())
    torch.testing.assert_close(out, torch.full((5, 1), 100.0).half())


@settings(max_examples=200)
@given(
    tokens=st.integers(1, 64),
    n=st.integers(1, 200_000),
    k=st.integers(1, 60_000),
    itemsize=st.sampled_from([1, 2, 4]),
)
def test_every_split_has_work_and_fits_into_the_workspace(
    tokens: int, n: int, k: int, itemsize: int
) -> None:
    tiles = launch_table.skinny_gemm_tiles(tokens, n, k, itemsize)
    blocks, programs = launch_table.cdiv(k, tiles.block_k), launch_table.cdiv(n, tiles.block_n)
    share = launch_table.cdiv(blocks, tiles.split_k)
    assert (tiles.split_k - 1) * share < blocks and tiles.block_t >= tokens
    if tiles.split_k > 1:
        floats, counters = launch_table.SPLIT_K_WORKSPACE
        assert programs <= counters
        assert programs * tiles.split_k * (tiles.block_n + 1) * tiles.block_t <= floats
