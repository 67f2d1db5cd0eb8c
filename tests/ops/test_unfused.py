"""Operations that span part of a layer, and their effect on the residual, on every device."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from s1engine.kernels import launch_table
from s1engine.ops import Activation, Ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.ops.test_torch_ops import randn
from tests.paged import make_meta

TORCH = TorchOps()
DEVICES = [TorchOps(), CpuOps(), TritonOps()]
EPS = 1e-6
H, D = 32, 16
HEADS, KV_HEADS = 3, 1


@pytest.fixture(autouse=True)
def few_tokens_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens are too many to fuse."""
    monkeypatch.setattr(launch_table, "MAX_SKINNY_TOKENS", 4)


def devices(*, tokens: list[int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("ops", "tokens"),
        [pytest.param(ops, n, id=f"{ops.name}-{n}") for ops in DEVICES for n in tokens],
    )


@devices(tokens=[1, 4, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_reaches_the_residual_at_once_or_later(
    ops: Ops, tokens: int, with_bias: bool
) -> None:
    x, weight, residual = randn(tokens, 48), randn(H, 48, seed=1), randn(tokens, H, seed=2)
    bias = randn(H, seed=3) if with_bias else None
    total = residual + TORCH.linear(x, weight, bias)
    pending_residual = ops.linear_residual(x, ops.pack(weight), bias, residual)
    torch.testing.assert_close(
        residual if pending_residual is None else residual + pending_residual, total
    )
    fused = ops.name == "cpu" or (ops.name == "triton" and tokens <= launch_table.MAX_SKINNY_TOKENS)
    assert (pending_residual is None) == fused


@devices(tokens=[2, 5])
@pytest.mark.parametrize("with_pending_residual", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("with_norm", [True, False])
def test_norm_gate_up(
    ops: Ops, tokens: int, with_pending_residual: bool, activation: Activation, with_norm: bool
) -> None:
    residual, norm, weight = randn(tokens, H), randn(H, seed=1), randn(40, H, seed=2)
    pending_residual = randn(tokens, H, seed=3) if with_pending_residual else None
    total = residual + pending_residual if pending_residual is not None else residual.clone()
    out = ops.norm_gate_up(
        pending_residual, residual, norm if with_norm else None, EPS, ops.pack(weight), activation
    )
    x = TORCH.linear(TORCH.rms_norm(total, norm, EPS) if with_norm else total, weight)
    gate, up = x.chunk(2, dim=-1)
    gelu = functional.gelu(gate, approximate="tanh")
    expected = (functional.silu(gate) if activation == "silu" else gelu) * up
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(residual, total)


@devices(tokens=[2, 5])
@pytest.mark.parametrize("with_pending_residual", [False, True])
@pytest.mark.parametrize("with_norms", [False, True])
def test_norm_qkv_rope_write(
    ops: Ops, tokens: int, with_pending_residual: bool, with_norms: bool
) -> None:
    residual, norm = randn(tokens, H), randn(H, seed=1)
    weight, bias = randn((HEADS + 2 * KV_HEADS) * D, H, seed=2), randn(80, seed=3)
    pending_residual = randn(tokens, H, seed=4) if with_pending_residual else None
    norms = (randn(D, seed=5), randn(D, seed=6)) if with_norms else (None, None)
    meta = make_meta([tokens], [tokens + 3], 16, 8)
    angles = randn(80, D // 2, seed=7)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)

    def caches() -> tuple[Tensor, Tensor]:
        return tuple(torch.full((8, KV_HEADS, 16, D), math.nan) for _ in range(2))  # type: ignore[return-value]

    total = residual + pending_residual if pending_residual is not None else residual.clone()
    x = TORCH.linear(TORCH.rms_norm(total, norm, EPS), weight, bias).view(tokens, -1, D)
    q, k, v = torch.split(x, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    if norms[0] is not None and norms[1] is not None:
        q, k = TORCH.rms_norm(q, norms[0], EPS), TORCH.rms_norm(k, norms[1], EPS)
    expected, got = caches(), caches()
    TORCH.rope_write(q, k, v, table, *expected, meta)
    out = ops.norm_qkv_rope_write(
        pending_residual, residual, norm, EPS, ops.pack(weight), bias, *norms, table, *got, meta
    )
    torch.testing.assert_close(out, q, rtol=1e-4, atol=1e-4)
    for cache, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(residual, total)


@devices(tokens=[5])
def test_norm_residual(ops: Ops, tokens: int) -> None:
    x, norm, residual = randn(tokens, H), randn(H, seed=1), randn(tokens, H, seed=2)
    expected = residual + TORCH.rms_norm(x, norm, EPS)
    ops.norm_residual(x, norm, EPS, residual)
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


@devices(tokens=[5])
def test_scale_rows_of_heads_in_a_wider_buffer(ops: Ops, tokens: int) -> None:
    buffer, scales = randn(tokens, HEADS + 2, D), randn(9, seed=1)
    positions = torch.tensor([3, 0, 8, 3, 1], dtype=torch.int32)
    expected = buffer.clone()
    expected[:, :HEADS] *= scales[positions.long()][:, None, None]
    ops.scale_rows(buffer[:, :HEADS], scales, positions)
    torch.testing.assert_close(buffer, expected)


def test_a_product_in_the_table_is_left_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, residual = randn(7, 48), randn(H, 48, seed=1), randn(7, H)
    monkeypatch.setattr(launch_table, "MAX_SKINNY_TOKENS", 64)
    monkeypatch.setattr(launch_table, "CUBLAS_SHAPES", frozenset({(16, H, 48)}))
    assert TritonOps().linear_residual(x, weight, None, residual) is not None
    assert TritonOps().linear_residual(x[:2], weight, None, residual[:2]) is None
