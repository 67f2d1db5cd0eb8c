"""An 8-bit KV cache: its definition, and that the CPU's kernels store the same bytes."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine._core import cpu
from s1engine.errors import RequestError
from s1engine.ops import AttentionMetadata, Ops, kv_quant
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.kernels.oracle import assert_as_good_as, in_double
from tests.ops.test_torch_ops import randn
from tests.paged import make_meta

TORCH, CPU = TorchOps(), CpuOps()
FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = st.sampled_from([2, 6, 16, 34, 64, 128])
SCALE = 0.2


def usable_isas() -> list[str]:
    names = []
    for name in ("portable", "avx2", "avx512", "avx512_bf16", "neon", "neon_dot"):
        try:
            cpu.set_isa(name)
        except ValueError:
            continue
        names.append(name)
    cpu.set_isa("auto")
    return names


@pytest.fixture(params=usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa("auto")


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors of very different magnitudes, some zero, with a few large elements."""
    x = randn(*shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-12, 9, (*shape[:-1], 1), generator=generator)
    x[torch.rand(shape, generator=generator) < 0.03] *= 50
    return (x * 2.0**size * (size > -12)).to(dtype)


@given(rows=st.integers(1, 6), dim=DIMS, seed=st.integers(0, 999))
def test_an_int8_vector_is_off_by_half_a_step(rows: int, dim: int, seed: int) -> None:
    x = values(rows, dim, seed=seed)
    stored = kv_quant.quantize(x, torch.int8)
    assert stored.shape == (rows, kv_quant.stored_dim(dim, torch.int8)) == (rows, dim + 4)
    back = kv_quant.dequantize(stored)
    largest = x.abs().amax(-1, keepdim=True)
    assert bool(((back - x).abs() <= largest / 127 * 0.5001).all())
    torch.testing.assert_close(back.abs().amax(-1, keepdim=True), largest)


@given(rows=st.integers(1, 6), dim=DIMS, seed=st.integers(0, 999))
def test_an_fp8_vector_is_off_by_a_sixteenth_and_ends_at_448(
    rows: int, dim: int, seed: int
) -> None:
    x = values(rows, dim, seed=seed)
    back = kv_quant.dequantize(kv_quant.quantize(x, FP8))
    wanted = x.clamp(-448, 448)
    assert bool(((back - wanted).abs() <= wanted.abs() / 16 + 2.0**-10).all())
    assert kv_quant.stored_dim(dim, FP8) == dim


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 3e38])
def test_sizes_at_the_ends_of_float32_stay_finite(tiny: float) -> None:
    back = kv_quant.dequantize(kv_quant.quantize(torch.tensor([[tiny, -tiny]]), torch.int8))
    torch.testing.assert_close(back, torch.tensor([[tiny, -tiny]]), rtol=1e-6, atol=1e-38)


def test_other_types_are_kept_as_they_are() -> None:
    x = randn(3, 8, dtype=torch.bfloat16)
    assert kv_quant.quantize(x, torch.bfloat16) is x
    assert torch.equal(kv_quant.dequantize(x), x.float())
    assert kv_quant.dequantize(x.double()).dtype is torch.float64


def written(
    ops: Ops,
    x: tuple[Tensor, ...],
    table: Tensor,
    cache_dtype: torch.dtype,
    meta: AttentionMetadata,
) -> tuple[Tensor, Tensor]:
    """Caches full of 85 after a write of copies of q, k and v."""
    q, k, v = (part.clone() for part in x)
    row = kv_quant.stored_dim(q.shape[2], cache_dtype)
    k_cache = torch.full((9, k.shape[1], 16, row), 85).to(cache_dtype)
    v_cache = k_cache.clone()
    ops.rope_write(q, k, v, table, k_cache, v_cache, meta)
    return k_cache, v_cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 6, 34, 64, 128])
def test_the_kernels_write_the_same_bytes(isa: str, dtype: torch.dtype, dim: int) -> None:
    meta = make_meta([2, 1, 3], [40, 7, 3], 16, num_blocks=9)
    x = tuple(values(6, heads, dim, seed=heads, dtype=dtype) for heads in (4, 2, 2))
    turn = torch.zeros(64, dim)
    turn[:, : dim // 2] = 1  # by no angle: a product in float32 may be fused with a sum, or not
    wanted = written(TORCH, x, turn, torch.int8, meta)
    got = written(CPU, x, turn, torch.int8, meta)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
    slots = meta.slot_mapping
    back = kv_quant.dequantize(got[1][slots // 16, :, slots % 16])
    assert torch.equal(back, kv_quant.dequantize(kv_quant.quantize(x[2], torch.int8)))
    assert int((got[0] != 85).any(-1).any(1).sum()) == len(slots)


def attention_case(
    lens: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    """q, caches with NaN (or NaN scales) in every slot without a token, and metadata."""
    counts, contexts = [count for count, _ in lens], [context for _, context in lens]
    num_heads, num_kv_heads, dim = heads
    blocks = len(lens) * -(-max(contexts) // block_size) + 1
    slots = make_meta(contexts, contexts, block_size, blocks, seed=seed).slot_mapping
    row = kv_quant.stored_dim(dim, cache_dtype)
    caches = []
    for salt in (1, 2):
        raw = torch.full((blocks, num_kv_heads, block_size, row * cache_dtype.itemsize), 0xFF)
        cache = raw.to(torch.uint8).view(cache_dtype)
        filled = randn(len(slots), num_kv_heads, dim, seed=seed + salt, dtype=dtype)
        cache[slots // block_size, :, slots % block_size] = kv_quant.quantize(filled, cache_dtype)
        caches.append(cache)
    q = randn(sum(counts), num_heads, dim, seed=seed + 3, dtype=dtype)
    meta = make_meta(counts, contexts, block_size, blocks, seed=seed)
    return q, caches[0], caches[1], meta


LENS = st.integers(1, 90).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
HEADS = st.sampled_from([(4, 4), (6, 1), (10, 2)])


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@settings(max_examples=10)
@given(
    lens=st.lists(LENS, min_size=1, max_size=4).filter(lambda rows: any(n for n, _ in rows)),
    heads=HEADS,
    dim=DIMS,
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention_reads_the_stored_values(
    cache_dtype: torch.dtype | None,
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    stored = cache_dtype or dtype
    q, k, v, meta = attention_case(lens, block_size, (*heads, dim), dtype, stored, seed)
    truth = in_double(q, kv_quant.dequantize(k), kv_quant.dequantize(v), SCALE, meta)
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta)
    for name in usable_isas():
        cpu.set_isa(name)
        out = CPU.paged_attention(q, k, v, SCALE, meta)
        assert_as_good_as(out, by_torch, truth, slack=2)
    cpu.set_isa("auto")


@pytest.mark.parametrize("threads", [1, 3])
def test_long_contexts_are_the_same_alone_batched_and_cut(isa: str, threads: int) -> None:
    lens = [(1, 1700), (1, 3), (9, 900), (1, 600)]
    q, k, v, meta = attention_case(lens, 16, (14, 2, 64), torch.bfloat16, torch.int8, seed=5)
    before = cpu.num_threads()
    cpu.set_num_threads(threads)
    try:
        together = CPU.paged_attention(q, k, v, SCALE, meta)
        starts = meta.cu_seqlens_q.tolist()
        for row, (count, context) in enumerate(lens):
            tokens = slice(starts[row], starts[row + 1])
            alone = AttentionMetadata(
                positions=meta.positions[tokens],
                slot_mapping=meta.slot_mapping[tokens],
                cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
                context_lens=torch.tensor([context], dtype=torch.int32),
                block_table=meta.block_table[row : row + 1],
                max_seqlen_q=count,
            )
            assert torch.equal(CPU.paged_attention(q[tokens], k, v, SCALE, alone), together[tokens])
    finally:
        cpu.set_num_threads(before)
    truth = in_double(q, kv_quant.dequantize(k), kv_quant.dequantize(v), SCALE, meta)
    assert_as_good_as(together, TORCH.paged_attention(q, k, v, SCALE, meta), truth, slack=2)


@pytest.mark.parametrize(
    ("ops", "refused", "name", "covered"),
    [(CPU, FP8, "fp8", "auto, int8"), (TritonOps(), torch.int8, "int8", "auto, fp8")],
)
def test_a_format_that_a_device_lacks_is_rejected_by_name(
    ops: Ops, refused: torch.dtype, name: str, covered: str
) -> None:
    shapes = {"head_dim": 64, "num_heads": 14, "num_kv_heads": 2, "block_size": 64}
    with pytest.raises(
        RequestError, match=f"kv_cache_dtype {name} .*covered: {covered}$"
    ) as caught:
        ops.check_model(**shapes, dtype=torch.float16, cache_dtype=refused)
    assert caught.value.param == "kv_cache_dtype"
    for kept in (torch.float16, {"fp8": torch.int8, "int8": FP8}[name]):
        ops.check_model(**shapes, dtype=torch.float16, cache_dtype=kept)


def test_nan_behind_a_context_is_really_there() -> None:
    _, k, _, _ = attention_case([(1, 5)], 4, (4, 2, 8), torch.float32, torch.int8, seed=0)
    assert math.isnan(float(kv_quant.dequantize(k).sum()))
