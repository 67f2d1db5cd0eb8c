"""Matrix products and row look-ups on the CPU: correct for every shape, dtype and instruction set,
and independent of the other rows."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s1engine._core import cpu
from s1engine.errors import RequestError
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.packed import PackedMatrix, pack
from s1engine.ops.quantization import FORMATS, quantize
from s1engine.ops.torch_ops import TorchOps
from tests.ops.test_torch_ops import DTYPES, randn

OPS, TORCH = CpuOps(), TorchOps()
ISAS = ("avx512_bf16", "avx512", "avx2", "neon_dot", "neon", "portable")
SETTINGS = [None, *FORMATS]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        cpu.set_isa(request.param)
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    cpu.set_isa("auto")


def rows_of(fmt: str | None, columns: int) -> int:
    """A number of columns that the format supports."""
    return columns if fmt is None else 32 * columns


def matrix(n: int, k: int, dtype: torch.dtype, fmt: str | None) -> tuple[Tensor, Tensor]:
    """Weights [n, k], and their values in the format as float64."""
    weight = randn(n, k, seed=1, dtype=dtype)
    return weight, (weight if fmt is None else quantize(weight, fmt).dequantize()).double()


def packed(weight: Tensor, fmt: str | None) -> PackedMatrix:
    return pack(weight if fmt is None else quantize(weight, fmt))


def tolerance(x: Tensor, fmt: str | None) -> Tensor:
    """Tolerance of a row's sums, [T, 1]: their rounding, and that of x to 8 bits."""
    row = x.double().abs().amax(1, keepdim=True) * x.shape[1] ** 0.5
    return row * (2e-6 if fmt is None else 0.02)


@given(
    tokens=st.integers(1, 20),
    n=st.integers(1, 90),
    columns=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    fmt=st.sampled_from(SETTINGS),
)
@pytest.mark.parametrize("name", ISAS)
def test_a_product_of_any_shape(
    name: str, tokens: int, n: int, columns: int, dtype: torch.dtype, fmt: str | None
) -> None:
    try:
        cpu.set_isa(name)
    except ValueError:
        pytest.skip(f"this CPU has no {name}")
    try:
        k = rows_of(fmt, columns)
        x = randn(tokens, k, dtype=dtype)
        weight, meant = matrix(n, k, dtype, fmt)
        exact = x.double() @ meant.T
        got = OPS.linear(x, packed(weight, fmt), randn(n, seed=3, dtype=dtype))
        exact += randn(n, seed=3, dtype=dtype).double()
        rounding = torch.finfo(dtype).eps * exact.abs()
        assert ((got.double() - exact).abs() <= tolerance(x, fmt) + rounding).all()
    finally:
        cpu.set_isa("auto")


@pytest.mark.parametrize("fmt", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(isa: str, dtype: torch.dtype, fmt: str | None) -> None:
    """Added to a residual, gated, or float32 logits: consistent with the plain product."""
    k, width = 96, 48
    x, residual = randn(7, k, dtype=dtype), randn(7, width, seed=5, dtype=dtype)
    norm = randn(k, seed=6, dtype=dtype)
    weight = randn(2 * width, k, seed=1, dtype=dtype)
    whole = packed(weight, fmt)
    both = OPS.logits(x, norm, 1e-6, whole)
    normed = OPS.rms_norm(x, norm, 1e-6)
    plain = OPS.linear(normed, whole)
    assert both.dtype is torch.float32 and torch.equal(both.to(dtype), plain)

    total = residual.clone()
    assert OPS.linear_residual(normed, packed(weight[:width], fmt), None, total) is None
    assert torch.equal(total, (residual.float() + both[:, :width]).to(dtype))

    gated = OPS.norm_gate_up(None, x, norm, 1e-6, whole)
    meant = torch.nn.functional.silu(both[:, :width].double()) * both[:, width:].double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gated.double(), meant, rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("fmt", SETTINGS)
def test_a_row_is_the_same_alone_and_among_others(isa: str, fmt: str | None) -> None:
    x, weight = randn(200, 160, dtype=torch.bfloat16), randn(75, 160, seed=1, dtype=torch.bfloat16)
    whole = packed(weight, fmt)
    expected = OPS.linear(x, whole)
    threads = cpu.num_threads()
    try:
        for count in (1, 2, 3, 8):
            cpu.set_num_threads(count)
            for begin, end in ((0, 200), (0, 1), (199, 200), (3, 9), (50, 173)):
                assert torch.equal(OPS.linear(x[begin:end], whole), expected[begin:end])
    finally:
        cpu.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_twice_the_error_of_torch(isa: str, dtype: torch.dtype) -> None:
    x, weight = randn(16, 512, dtype=dtype), randn(64, 512, seed=1, dtype=dtype)
    exact = x.double() @ weight.double().T
    ours = (OPS.linear(x, pack(weight)).double() - exact).abs().mean()
    theirs = (TORCH.linear(x, weight).double() - exact).abs().mean()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", SETTINGS)
def test_row_look_ups(isa: str, dtype: torch.dtype, fmt: str | None) -> None:
    weight = randn(37, 96, seed=1, dtype=dtype)
    whole = packed(weight, fmt)
    ids = torch.tensor([36, 0, 17, 17], dtype=torch.int32)
    meant = weight if fmt is None else quantize(weight, fmt).dequantize()
    assert torch.equal(OPS.embed(ids, whole), meant[ids.long()])
    assert torch.equal(OPS.gather_rows(weight, ids), weight[ids.long()])
    beyond = torch.tensor([37, -1], dtype=torch.int32)
    assert not OPS.embed(beyond, whole).any()
    for part in whole, weight:  # as if the first row had id 3
        rows = OPS.embed_shard(torch.cat((ids + 3, ids[:1] - len(weight))), part, 3)
        assert torch.equal(rows[:-1], OPS.embed(ids, part)) and not rows[-1].any()


def test_the_first_rows_of_a_matrix() -> None:
    x, weight = randn(3, 64), randn(40, 64, seed=1)
    whole = pack(weight)
    for n in (1, 16, 17, 40):
        assert torch.equal(OPS.linear(x, whole[:n]), OPS.linear(x, whole)[:, :n])


@given(st.sampled_from(FORMATS), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_quantizing_rounds_to_the_nearest(fmt: str, n: int, groups: int, seed: int) -> None:
    weight = randn(n, 32 * groups, seed=seed)
    weight[0, :32] = 0
    quantized = quantize(weight, fmt)
    step = quantized.scales.float().abs().repeat_interleave(quantized.group, 1)
    # Where a scale was rounded down, the largest values are clipped, by 2^-9 relatively.
    slack = weight.abs() * 2**-8 + (step / 2 if fmt == "int4" else 0)
    assert ((quantized.dequantize() - weight).abs() <= step / 2 + slack).all()
    assert not quantized.dequantize()[0, :32].any()


def test_columns_that_no_group_divides_are_rejected() -> None:
    with pytest.raises(RequestError, match="40 columns, which is no multiple of 32") as caught:
        quantize(randn(2, 40), "int8")
    assert caught.value.param == "quantization"
