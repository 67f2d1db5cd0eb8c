"""fp8 matrices: rounding errors, exact values, independence of rows. test_cpu_linear tests the
integer formats."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.quantization import (
    FP8_LIMIT,
    HEAD_FORMATS,
    bytes_per_weight,
    quantize,
)
from tests.ops.test_torch_ops import randn

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.integers(1, 9), st.integers(1, 70), DTYPES, st.integers(-3, 3), st.integers(0, 999))
def test_fp8_is_within_half_a_step(
    n: int, k: int, dtype: torch.dtype, power: int, seed: int
) -> None:
    """Three bits of mantissa: the error is at most 1/16 of a value or half of the smallest step,
    2^-9 of a scale. The largest of a row is exact."""
    weight = (randn(n, k, seed=seed) * 10.0**power).to(dtype)
    made = quantize(weight, "fp8")
    assert made.values.dtype == torch.float8_e4m3fn and made.scales.shape == (n, 1)
    assert made.shape == weight.shape and made.group == k and made.dtype == dtype
    wide, back = weight.double(), made.values.double() * made.scales.double()
    assert torch.all((back - wide).abs() <= (wide.abs() / 16 + made.scales / 1024) * (1 + 1e-6))
    peak = made.values.float().abs().amax(1)
    assert torch.all((peak == FP8_LIMIT) | (wide.abs().amax(1) == 0))
    assert torch.equal(made.dequantize(), (made.values.float() * made.scales).to(dtype))


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 999))
def test_a_row_does_not_depend_on_the_others(n: int, k: int, seed: int) -> None:
    weight = randn(n, k, seed=seed)
    alone = quantize(weight[1:2], "fp8").dequantize()
    weight[0] *= 1e6
    assert torch.equal(quantize(weight, "fp8").dequantize()[1:2], alone)
    assert torch.equal(quantize(weight, "fp8")[1:2].dequantize(), alone)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 999))
def test_quantizing_twice_changes_nothing(n: int, k: int, seed: int) -> None:
    once = quantize(randn(n, k, seed=seed), "fp8")
    again = quantize(once.dequantize(), "fp8")
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


def test_rows_of_zeros_are_zeros() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = 2.0
    assert torch.equal(quantize(weight, "fp8").dequantize(), weight)


def test_large_matrices_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(7, 20)
    whole = quantize(weight, "fp8").dequantize()
    monkeypatch.setattr("s1engine.ops.quantization._rows_at_once", lambda columns: 2)
    assert torch.equal(quantize(weight, "fp8").dequantize(), whole)


def test_bytes_per_weight() -> None:
    assert bytes_per_weight("fp8", 1000) == 1.004
    assert HEAD_FORMATS["fp8"] is None


def test_the_cpu_rejects_fp8() -> None:
    with pytest.raises(RequestError, match="quantization fp8 is not for the CPU"):
        CpuOps().check_model(
            head_dim=64,
            num_heads=4,
            num_kv_heads=2,
            block_size=16,
            dtype=torch.bfloat16,
            cache_dtype=torch.bfloat16,
            quantization="fp8",
        )
