"""Norms, SwiGLU and rotation: kernels that treat each token independently."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.rope_write import rope_write
from s1engine.kernels.silu_and_mul import silu_and_mul
from s1engine.ops.torch_ops import TorchOps
from tests.kernels.oracle import assert_as_good_as
from tests.ops.test_torch_ops import randn, rotated
from tests.paged import make_meta

TORCH = TorchOps()
DTYPES = st.sampled_from([torch.float32, torch.float16])
WIDTHS = st.sampled_from([1, 2, 97, 128, 1025])


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


@settings(max_examples=20)
@given(rows=st.integers(1, 9), width=WIDTHS, dtype=DTYPES, seed=st.integers(0, 99))
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = randn(rows, width, seed=seed, dtype=dtype) * 3, randn(width, seed=1, dtype=dtype)
    out = rms_norm(x, weight, 1e-5)
    assert_as_good_as(out, TORCH.rms_norm(x, weight, 1e-5), normed(x, weight))


@settings(max_examples=20)
@given(rows=st.integers(1, 9), width=WIDTHS, dtype=DTYPES, seed=st.integers(0, 99))
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    wide = randn(rows, width + 3, seed=seed, dtype=dtype)
    x, weight = wide[:, :width], randn(width, seed=1, dtype=dtype)
    residual = randn(rows, width, seed=seed + 1, dtype=dtype)
    total = residual + x
    out = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    assert_as_good_as(out, TORCH.rms_norm(total, weight, 1e-5), normed(total, weight))


def test_rms_norm_of_heads_in_a_wider_buffer() -> None:
    buffer = randn(5, 7, 24, dtype=torch.float16)
    before, view, weight = buffer.clone(), buffer[:, 2:5], randn(24, seed=1, dtype=torch.float16)
    out = rms_norm(view, weight, 1e-5)
    assert torch.equal(buffer, before) and out.is_contiguous()
    assert_as_good_as(out, TORCH.rms_norm(view, weight, 1e-5), normed(view, weight))


@settings(max_examples=15)
@given(rows=st.integers(1, 5), width=WIDTHS, dtype=DTYPES, seed=st.integers(0, 99))
def test_silu_and_mul(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = randn(rows, 2 * width, seed=seed, dtype=dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    truth = gate / (1 + torch.exp(-gate)) * up
    assert_as_good_as(silu_and_mul(gate_up), TORCH.silu_and_mul(gate_up), truth)


@settings(max_examples=12)
@given(
    heads=st.sampled_from([(4, 2), (14, 2), (9, 9)]),
    dim=st.sampled_from([16, 64]),
    block_size=st.sampled_from([16, 32]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_rope_write(
    heads: tuple[int, int], dim: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    meta = make_meta([2, 1, 3], [40, 7, 3], block_size, num_blocks=9, seed=seed)
    slots, positions = meta.slot_mapping, meta.positions
    num_heads, num_kv = heads
    buffer = randn(6, num_heads + 2 * num_kv, dim, seed=seed, dtype=dtype)
    q, k, v = torch.split(buffer, [num_heads, num_kv, num_kv], dim=1)
    angles = randn(64, dim // 2, seed=1)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    k_cache = torch.full((9, num_kv, block_size, dim), math.nan, dtype=dtype)
    v_cache = k_cache.clone()
    by_torch = [q.clone(), k.clone(), v.clone()]
    TORCH.rope_write(*by_torch, table, k_cache.clone(), v_cache.clone(), meta)  # type: ignore[call-arg]
    truth_q, truth_k = rotated(q, table, positions), rotated(k, table, positions)
    values = v.clone()

    rope_write(q, k, v, table, k_cache, v_cache, positions, slots)
    assert_as_good_as(q, by_torch[0], truth_q)
    assert_as_good_as(k, by_torch[1], truth_k)
    assert torch.equal(v, values)
    assert torch.equal(k_cache[slots // block_size, :, slots % block_size], k)
    assert torch.equal(v_cache[slots // block_size, :, slots % block_size], values)
    written = torch.zeros(9 * block_size, dtype=torch.bool)
    written[slots] = True
    for cache in (k_cache, v_cache):
        assert cache.transpose(1, 2).flatten(0, 1)[~written].isnan().all()
