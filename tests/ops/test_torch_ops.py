"""The torch operations against definitions computed one number at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.ops import AttentionMetadata
from s1engine.ops.torch_ops import TorchOps
from tests.paged import UNDEFINED_BLOCK, hide_blocks_before_windows, make_meta

OPS = TorchOps()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """``actual`` equals ``expected`` (float64) up to the rounding of its type."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=4 * eps, atol=4 * eps)


def test_linear_adds_the_bias_to_each_token() -> None:
    x, weight, bias = randn(3, 5), randn(4, 5, seed=1), randn(4, seed=2)
    close(OPS.linear(x, weight), x.double() @ weight.double().T)
    close(OPS.linear(x, weight, bias), x.double() @ weight.double().T + bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = randn(3, 2, 10, dtype=dtype), randn(10, seed=1, dtype=dtype)
    scale = (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    out = OPS.rms_norm(x, weight, 1e-3)
    assert out.dtype == dtype
    close(out, x.double() / scale * weight.double())


def test_rms_norm_of_a_view_leaves_it_alone() -> None:
    buffer = randn(3, 24)
    before = buffer.clone()
    view = buffer.view(3, 6, 4)[:, 1:3]
    out = OPS.rms_norm(view, torch.ones(4), 1e-6)
    assert torch.equal(out, OPS.rms_norm(view.clone(), torch.ones(4), 1e-6))
    assert torch.equal(buffer, before)


def test_add_rms_norm_updates_the_residual() -> None:
    x, residual, weight = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    total = x + residual
    out = OPS.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(out, OPS.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = randn(5, 14, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    close(OPS.silu_and_mul(x), gate / (1 + torch.exp(-gate)) * up)


def rope_case(
    dtype: torch.dtype, meta: AttentionMetadata, blocks: int, block_size: int
) -> tuple[Tensor, ...]:
    """q, k, v as views of one buffer, a table of angles, and caches full of NaN."""
    tokens, heads, kv_heads, dim = len(meta.positions), 4, 2, 6
    q, k, v = torch.split(randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype), [4, 2, 2], dim=1)
    angles = randn(64, dim // 2, seed=1)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    cache = torch.full((blocks, kv_heads, block_size, dim), math.nan, dtype=dtype)
    return q, k, v, table, cache, cache.clone()


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Each pair as a complex number times that of its angle, [T, heads, D] float64."""
    half = x.shape[-1] // 2
    turn = torch.complex(table[:, :half].double(), table[:, half:].double())[positions.long()]
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_write_rotates_and_stores(dtype: torch.dtype) -> None:
    meta = make_meta([3, 1, 5], [9, 7, 5], block_size=4, num_blocks=12, seed=1)
    q, k, v, table, k_cache, v_cache = rope_case(dtype, meta, 12, 4)
    expected_q, expected_k = rotated(q, table, meta.positions), rotated(k, table, meta.positions)
    values = v.clone()
    OPS.rope_write(q, k, v, table, k_cache, v_cache, meta)
    close(q, expected_q)
    close(k, expected_k)
    assert torch.equal(v, values)
    written = set()
    for token, slot in enumerate(meta.slot_mapping.tolist()):
        assert torch.equal(k_cache[slot // 4, :, slot % 4], k[token])
        assert torch.equal(v_cache[slot // 4, :, slot % 4], v[token])
        written.add(slot)
    for slot in set(range(48)) - written:
        assert k_cache[slot // 4, :, slot % 4].isnan().all()
        assert v_cache[slot // 4, :, slot % 4].isnan().all()


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    meta: AttentionMetadata,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query and one head at a time, in double precision, token by token from the cache."""
    size, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    starts = meta.cu_seqlens_q.tolist()
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, table in enumerate(meta.block_table.tolist()):
        for token in range(starts[row], starts[row + 1]):
            position = int(meta.positions[token])
            seen = range(max(position - window + 1, 0) if window else 0, position + 1)
            for head in range(q.shape[1]):
                at = [(table[p // size], head // group, p % size) for p in seen]
                keys = torch.stack([k_cache[a] for a in at]).double()
                values = torch.stack([v_cache[a] for a in at]).double()
                logits = keys @ q[token, head].double() * scale
                if sinks is not None:
                    logits = torch.cat((logits, sinks[head : head + 1].double()))
                out[token, head] = logits.softmax(0)[: len(seen)] @ values
    return out.flatten(1)


def attention_case(
    lens: list[tuple[int, int]], block_size: int, heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    """Caches with numbers in the contexts' slots and NaN in all others."""
    counts, contexts = [count for count, _ in lens], [context for _, context in lens]
    blocks = len(lens) * -(-max(contexts) // block_size) + 1
    everything = make_meta(contexts, contexts, block_size, blocks, seed=2)
    meta = make_meta(counts, contexts, block_size, blocks, seed=2)
    caches = []
    for seed in (3, 4):
        cache = torch.full((blocks, heads[1], block_size, 8), math.nan, dtype=dtype)
        slots = everything.slot_mapping
        filled = randn(len(slots), heads[1], 8, seed=seed, dtype=dtype)
        cache[slots // block_size, :, slots % block_size] = filled
        caches.append(cache)
    q = randn(sum(counts), heads[0], 8, seed=5, dtype=dtype)
    return q, caches[0], caches[1], meta


ROWS = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))


@settings(deadline=None, max_examples=40)
@given(
    lens=st.lists(ROWS, min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 8, 16]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
)
def test_paged_attention(
    lens: list[tuple[int, int]], block_size: int, heads: tuple[int, int]
) -> None:
    q, k_cache, v_cache, meta = attention_case(lens, block_size, heads, torch.float32)
    out = OPS.paged_attention(q, k_cache, v_cache, 0.3, meta)
    torch.testing.assert_close(
        out.double(), attention_reference(q, k_cache, v_cache, 0.3, meta), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_rounds_once(dtype: torch.dtype) -> None:
    q, k_cache, v_cache, meta = attention_case([(3, 17), (1, 9), (5, 5)], 4, (4, 2), dtype)
    out = OPS.paged_attention(q, k_cache, v_cache, 0.3, meta)
    assert out.dtype == dtype
    expected = attention_reference(q, k_cache, v_cache, 0.3, meta)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=eps)


def test_paged_attention_of_rows_without_tokens() -> None:
    q, k_cache, v_cache, meta = attention_case(
        [(2, 6), (0, 4), (1, 3), (0, 0)], 4, (4, 2), torch.float32
    )
    out = OPS.paged_attention(q, k_cache, v_cache, 0.3, meta)
    close(out, attention_reference(q, k_cache, v_cache, 0.3, meta))


@settings(deadline=None, max_examples=40)
@given(
    lens=st.lists(ROWS, min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 8]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.integers(0, 22),
    with_sinks=st.booleans(),
)
def test_paged_attention_with_a_window_and_sinks(
    lens: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    window: int,
    with_sinks: bool,
) -> None:
    q, k_cache, v_cache, meta = attention_case(lens, block_size, heads, torch.float32)
    sinks = randn(heads[0], seed=6) if with_sinks else None
    expected = attention_reference(q, k_cache, v_cache, 0.3, meta, window, sinks)
    hide_blocks_before_windows(meta, block_size, window)
    out = OPS.paged_attention(q, k_cache, v_cache, 0.3, meta, window, sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_metadata_is_undefined_behind_the_context() -> None:
    meta = make_meta([2, 1], [3, 9], block_size=4, num_blocks=6)
    assert meta.block_table[0].tolist()[1:] == [UNDEFINED_BLOCK] * 2
    assert meta.positions.tolist() == [1, 2, 8]
    assert meta.cu_seqlens_q.tolist() == [0, 2, 3]
    assert len(set(meta.block_table[meta.block_table != UNDEFINED_BLOCK].tolist())) == 4


def test_logprobs() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, -math.inf, 5.0]])
    chosen, values, ids = OPS.logprobs(logits, torch.tensor([2, 0]), 3)
    expected = logits.double().log_softmax(-1)
    close(chosen, expected[[0, 1], [2, 0]])
    assert ids.tolist() == [[1, 3, 2], [3, 0, 1]]  # equal ones by id
    close(values, expected.gather(1, ids))


def test_logprobs_of_none_besides() -> None:
    chosen, values, ids = OPS.logprobs(torch.zeros(2, 4), torch.tensor([2, 0]), 0)
    close(chosen, torch.full((2,), -math.log(4), dtype=torch.float64))
    assert values.shape == ids.shape == (2, 0)
