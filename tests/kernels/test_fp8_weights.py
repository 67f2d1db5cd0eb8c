"""Kernels over fp8 weights against torch over the dequantized weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from s1engine.errors import RequestError
from s1engine.kernels import launch_table
from s1engine.ops.fp8_linear import fp8_linear
from s1engine.ops.quantization import QuantizedMatrix, quantize
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.kernels.test_linear import check
from tests.ops.test_torch_ops import randn
from tests.paged import make_meta

TORCH, TRITON = TorchOps(), TritonOps()
TOKENS = st.sampled_from([1, 2, 4, 5, 17, 64])
WIDTHS = st.sampled_from([8, 97, 300, 1040])
DTYPES = st.sampled_from([torch.float32, torch.float16])
EPS = 1e-5


def matrix(n: int, k: int, seed: int, dtype: torch.dtype) -> tuple[QuantizedMatrix, Tensor]:
    """fp8 rows of very different magnitudes, and their exact values in float64."""
    rows = torch.logspace(-2, 1, n).to(dtype)[:, None]
    weight = quantize(randn(n, k, seed=seed, dtype=dtype) * rows / math.sqrt(k), "fp8")
    return weight, weight.values.double() * weight.scales.double()


@settings(max_examples=12)
@given(
    tokens=TOKENS,
    n=st.sampled_from([1, 7, 97]),
    k=WIDTHS,
    residual=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_linear(tokens: int, n: int, k: int, residual: bool, dtype: torch.dtype, seed: int) -> None:
    x, bias = randn(tokens, k, seed=seed, dtype=dtype), randn(n, seed=seed + 2, dtype=dtype)
    weight, exact = matrix(n, k, seed + 1, dtype)
    truth = x.double() @ exact.T + bias.double()
    if residual:
        old = randn(tokens, n, seed=seed + 3, dtype=dtype)
        truth += old.double()
        by_torch = TORCH.linear(x, weight, bias) + old
        assert TRITON.linear_residual(x, TRITON.pack(weight), bias, old) is None
        check(old, by_torch, truth, k)
    else:
        check(TRITON.linear(x, weight, bias), TORCH.linear(x, weight, bias), truth, k)


@settings(max_examples=8)
@given(
    tokens=TOKENS, f=st.sampled_from([1, 30, 65]), k=WIDTHS, dtype=DTYPES, seed=st.integers(0, 99)
)
def test_norm_gate_up(tokens: int, f: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x, norm = randn(tokens, k, seed=seed, dtype=dtype) * 3, randn(k, seed=1, dtype=dtype)
    weight, exact = matrix(2 * f, k, seed + 1, dtype)
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
    gate, up = (normed @ exact.T).chunk(2, dim=-1)
    by_torch = TORCH.norm_gate_up(None, x, norm, EPS, weight)
    check(TRITON.norm_gate_up(None, x, norm, EPS, weight), by_torch,
          gate / (1 + torch.exp(-gate)) * up, k)  # fmt: skip


@settings(max_examples=4)
@given(
    tokens=st.sampled_from([2, 5, 17]),
    heads=st.sampled_from([(2, 1), (3, 1), (2, 2)]),
    k=st.sampled_from([8, 97]),
    seed=st.integers(0, 99),
)
def test_norm_qkv_rope_write(tokens: int, heads: tuple[int, int], k: int, seed: int) -> None:
    """Every row of the weight gets its own scale, though rows are paired across a head."""
    (num_heads, num_kv), dim = heads, 16
    meta = make_meta([1] * tokens, [7 * i % 41 + 1 for i in range(tokens)], 16, 3 * tokens, seed)
    angles = randn(64, dim // 2, seed=1)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    x, norm = randn(tokens, k, seed=seed), randn(k, seed=1)
    weight, exact = matrix((num_heads + 2 * num_kv) * dim, k, seed + 1, torch.float32)
    bias = randn(len(exact), seed=seed + 2)
    results = []
    for ops, at, w in (
        (TRITON, torch.float32, weight),
        (TORCH, torch.float32, weight),
        (TORCH, torch.float64, exact),
    ):
        caches = [torch.zeros(3 * tokens, num_kv, 16, dim, dtype=at) for _ in range(2)]
        q = ops.norm_qkv_rope_write(
            None, x.to(at), norm.to(at), EPS, w, bias.to(at), None, None, table.to(at),
            *caches, meta,
        )  # fmt: skip
        results.append((q, *caches))
    for got, by_torch, truth in zip(*results, strict=True):
        check(got, by_torch, truth, k)


@settings(max_examples=25)
@given(
    tokens=st.integers(65, 90),
    n=st.sampled_from([16, 48]),
    k=st.sampled_from([16, 64, 272]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_many_tokens_are_rounded_to_fp8_each_with_its_own_scale(
    tokens: int, n: int, k: int, bias: bool, seed: int
) -> None:
    """torch's scaled product equals that of the exact values. Tokens differ widely in magnitude."""
    sizes = torch.logspace(-6, 6, tokens)[:, None]
    x = (randn(tokens, k, seed=seed) * sizes).bfloat16()
    x[3] = 0
    weight, exact = matrix(n, k, seed + 1, torch.bfloat16)
    b = randn(n, seed=seed + 2).bfloat16() if bias else None
    rounded = quantize(x, "fp8")
    assert float((rounded.values.float() * rounded.scales - x).abs().max()) > 0
    left = rounded.values.double() * rounded.scales.double()
    product = left @ exact.T
    truth = product + (0 if b is None else b.double())
    out = TRITON.linear(x, weight, b)
    assert out.dtype == torch.bfloat16 and not launch_table.fits_skinny_gemm(tokens, n, k)
    # product and sum are rounded to bfloat16, the terms are added in float32
    unit = 2**-8 * (1 + 2**-8)
    bound = unit * (product.abs() + truth.abs()) + k * 2**-23 * (left.abs() @ exact.abs().T)
    assert bool(((out.double() - truth).abs() <= bound).all())
    torch.testing.assert_close(out[3].double(), torch.zeros(n).double() + (0 if b is None else b))


@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(24, 64, torch.bfloat16), (16, 40, torch.bfloat16),
                          (16, 64, torch.float16), (16, 64, torch.float32)]
)  # fmt: skip
def test_what_the_scaled_product_does_not_take_is_dequantised(
    n: int, k: int, dtype: torch.dtype
) -> None:
    x, (weight, _) = randn(70, k, dtype=dtype), matrix(n, k, 1, dtype)
    expected = functional.linear(x, weight.dequantize())
    assert torch.equal(fp8_linear(x, weight, None), expected)
    assert torch.equal(TRITON.linear(x, weight), expected)


def test_a_token_that_is_not_finite_harms_no_other() -> None:
    x, (weight, _) = randn(70, 64, dtype=torch.bfloat16), matrix(16, 64, 1, torch.bfloat16)
    clean = fp8_linear(x, weight, None)
    x[7, 5] = math.inf
    out = fp8_linear(x, weight, None)
    assert out[7].isnan().all() and torch.equal(out[:7], clean[:7])
    assert torch.equal(out[8:], clean[8:])


def test_other_formats_are_refused_on_cuda() -> None:
    shapes = {"head_dim": 64, "num_heads": 14, "num_kv_heads": 2, "block_size": 64}
    types = {"dtype": torch.bfloat16, "cache_dtype": torch.bfloat16}
    TRITON.check_model(**shapes, **types, quantization="fp8")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="quantization int8 is not covered on CUDA"):
        TRITON.check_model(**shapes, **types, quantization="int8")  # type: ignore[arg-type]
