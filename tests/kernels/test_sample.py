"""Sampling against its definition: the same noise gives the same tokens, with filters and ties."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.noise import exponential_noise
from s1engine.kernels.sample import sample
from s1engine.ops import SamplingMetadata, torch_sampling
from s1engine.ops.triton_ops import TritonOps
from tests.ops.test_sampling import make_penalties, make_sampling

SIZES = st.sampled_from([1, 7, 1023, 1025, 2500])  # tiles hold 1024


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, position_ptr, first, TILE: tl.constexpr):
    noise = exponential_noise(tl.load(seed_ptr), tl.load(position_ptr), first, TILE)
    tl.store(out_ptr + tl.arange(0, TILE), noise)


@settings(max_examples=25)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    first=st.integers(0, 40_000).map(lambda n: 4 * n),
)
def test_noise_is_that_of_the_definition(seed: int, position: int, first: int) -> None:
    out = torch.full((64,), math.nan)
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    _noise_kernel[(1,)](out, seeds, positions, first, TILE=64)
    expected = torch_sampling.exponential_noise(seeds, positions, first + 64)[0, first:]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def logits_of(rows: int, size: int, seed: int, rounded: bool) -> Tensor:
    """Random logits, many of them equal if ``rounded``."""
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if rounded else logits


def sample_ids(logits: Tensor, meta: SamplingMetadata, **options: Tensor) -> list[int]:
    columns = (meta.temperature, meta.top_k, meta.top_p, meta.min_p, meta.seeds, meta.positions)
    before = logits.clone()
    out = sample(logits, *columns, filtered=meta.filtered, logits_sanitized=False, **options)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return out.tolist()


@settings(max_examples=20)
@given(size=SIZES, seed=st.integers(0, 999), rounded=st.booleans())
def test_without_filters(size: int, seed: int, rounded: bool) -> None:
    logits = logits_of(4, size, seed, rounded)
    meta = make_sampling(
        4,
        temperature=[0.0, 0.7, 1.0, 1e-9],
        seeds=[seed, -seed, 2**62, seed],
        positions=[0, 5, 2**33, seed],
    )
    assert sample_ids(logits, meta) == torch_sampling.sample(logits.clone(), meta).tolist()


@settings(max_examples=15)
@given(
    size=SIZES,
    seed=st.integers(0, 999),
    rounded=st.booleans(),
    top_k=st.sampled_from([0, 1, 3, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.83, 0.31, 1e-4]),
    min_p=st.sampled_from([0.0, 0.03, 0.7, 1.0]),
)
def test_filters(
    size: int, seed: int, rounded: bool, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(4, size, seed, rounded)
    meta = make_sampling(
        4,
        temperature=[1.3, 0.0, 0.9, 2.0],
        top_k=[top_k, top_k, 0, 0],
        top_p=[top_p, top_p, top_p, 1.0],
        min_p=[min_p, min_p, 0.0, min_p],
        seeds=seed,
        positions=torch.arange(4) + seed,
    )
    assert sample_ids(logits, meta) == torch_sampling.sample(logits.clone(), meta).tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.6}])
def test_draws_reach_every_kept_token_and_no_other(filters: dict[str, float]) -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -1.0, 0.5]]).repeat(24, 1)
    meta = make_sampling(24, temperature=2.0, positions=torch.arange(24), **filters)
    kept = torch_sampling.kept_tokens(
        logits[:1] / 2, meta.top_k[:1], meta.top_p[:1], meta.min_p[:1]
    )
    assert set(sample_ids(logits, meta)) == set(kept[0].nonzero().flatten().tolist())


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}])
def test_nan_and_infinity(filters: dict[str, float]) -> None:
    logits = torch.tensor(
        [
            [math.nan, 1.0, math.inf, 0.0],
            [-math.inf, -math.inf, -math.inf, -math.inf],
            [math.nan, math.nan, math.nan, math.nan],
            [-0.0, 0.0, -0.0, -1.0],
        ]
    )
    for temperature in (0.0, 1.0):
        meta = make_sampling(4, temperature=temperature, seeds=3, **filters)
        assert sample_ids(logits, meta) == torch_sampling.sample(logits.clone(), meta).tolist()


@settings(max_examples=5)
@given(seed=st.integers(0, 999), filters=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.5}]))
def test_banned_triggers(seed: int, filters: dict[str, float]) -> None:
    logits = logits_of(4, 1030, seed, rounded=False)
    triggers = [3, 1026]
    logits[:, triggers] = 60.0  # certain, if allowed
    meta = make_sampling(4, temperature=[0.0, 1.0, 0.0, 1.0], seeds=seed, **filters)
    flags = torch.tensor([1, 1, 0, 0], dtype=torch.int32)
    got = sample_ids(logits, meta, banned=flags, triggers=torch.tensor(triggers, dtype=torch.int32))
    masked = logits.clone()
    masked[:2, triggers] = -math.inf
    assert got[:2] == torch_sampling.sample(masked, meta)[:2].tolist()
    assert set(got[2:]) <= set(triggers)


def test_bias_penalties_and_bans_come_first() -> None:
    logits = logits_of(3, 50, 0, rounded=False)
    counts = torch.zeros(3, 50, dtype=torch.int32)
    counts[:, int(logits[0].argmax())] = 3
    meta = make_sampling(
        3,
        temperature=[0.0, 1.0, 0.0],
        bias=(torch.tensor([0]), torch.tensor([7]), torch.tensor([2.5])),
        penalties=make_penalties(3, 50, presence=1.5, output_counts=counts),
        banned=(torch.tensor([2]), logits[2].argmax().unsqueeze(0)),
    )
    expected = torch_sampling.sample(logits.clone(), meta)
    assert torch.equal(TritonOps().sample(logits.clone(), meta), expected)
    assert expected[2] != logits[2].argmax()
