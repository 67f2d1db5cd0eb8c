"""Head and sampling in one: the tokens are those of the unfused way on the same logits.

Inputs are such that every sum is exact in any order: +-1 with a mean square of 1, small integers as
weights. So logits are equal bit by bit, and many of them to each other.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.norm_head_sample import norm_head_sample
from s1engine.ops import SamplingMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.ops.test_sampling import make_sampling

TORCH = TorchOps()
ROWS = st.sampled_from([1, 3, 4, 5, 20, 64])
SIZES = st.sampled_from([1, 7, 97, 200])
DTYPES = st.sampled_from([torch.float32, torch.float16])


def case(rows: int, size: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, 40], the norm's weight, and the head [size, 40]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2, (rows, 40), generator=generator) * 2 - 1
    head = torch.randint(-1, 2, (size, 40), generator=generator)
    return x.to(dtype), torch.ones(40, dtype=dtype), head.to(dtype)


def run(x: Tensor, norm: Tensor, head: Tensor, meta: SamplingMetadata, **ban: Tensor) -> list[int]:
    columns = (meta.temperature, meta.seeds, meta.positions)
    return norm_head_sample(x, norm, 0.0, head, *columns, **ban).tolist()


@settings(max_examples=12)
@given(rows=ROWS, size=SIZES, seed=st.integers(0, 999), dtype=DTYPES, greedy=st.booleans())
def test_tokens(rows: int, size: int, seed: int, dtype: torch.dtype, greedy: bool) -> None:
    x, norm, head = case(rows, size, seed, dtype)
    temperatures = torch.tensor([0.0, 0.7, 3.0, 1e-9])[torch.arange(rows) % 4]
    meta = make_sampling(
        rows,
        temperature=0.0 if greedy else temperatures,
        seeds=seed - torch.arange(rows) * 2**40,
        positions=torch.arange(rows) + 2**33 * (seed % 2),
    )
    expected = TORCH.norm_head_sample(x, norm, 0.0, head, meta).tolist()
    assert run(x, norm, head, meta) == expected
    assert TritonOps().norm_head_sample(x, norm, 0.0, head, meta).tolist() == expected


@pytest.mark.parametrize("rows", [2, 6])
def test_what_is_no_number_is_never_the_best(rows: int) -> None:
    x, norm, head = case(rows, 30, 0, torch.float32)
    head[3:20] = math.nan
    for temperature in (0.0, 1.0):
        meta = make_sampling(rows, temperature=temperature, positions=torch.arange(rows))
        got = run(x, norm, head, meta)
        assert got == TORCH.norm_head_sample(x, norm, 0.0, head, meta).tolist()
        assert not set(got) & set(range(3, 20))


@pytest.mark.parametrize("rows", [4, 6])
def test_triggers_are_banned_row_by_row(rows: int) -> None:
    x, norm, head = case(rows, 90, 1, torch.float16)
    x[:, :9] = 1
    triggers = torch.tensor([3, 77], dtype=torch.int32)
    head[triggers] = torch.arange(40).lt(9).half() * 30  # certain, if allowed
    flags = (torch.arange(rows) < rows // 2).to(torch.int32)
    meta = make_sampling(rows, temperature=[0.0, 1.0] * (rows // 2), positions=torch.arange(rows))
    got = run(x, norm, head, meta, banned=flags, triggers=triggers)
    logits = TORCH.linear(x, head).float()
    logits[: rows // 2, triggers] = -math.inf
    assert got[: rows // 2] == TORCH.sample(logits, meta).tolist()[: rows // 2]
    assert set(got[rows // 2 :]) <= {3, 77}


def test_rows_with_filters_or_bans_go_the_unfused_way() -> None:
    x, norm, head = case(5, 50, 2, torch.float32)
    first = TORCH.linear(x, head).argmax(-1)
    filtered = make_sampling(5, temperature=4.0, top_k=1)
    banned = make_sampling(5, temperature=0.0, banned=(torch.arange(5), first))
    for meta in (filtered, banned):
        got = TritonOps().norm_head_sample(x, norm, 0.0, head, meta)
        assert torch.equal(got, TORCH.norm_head_sample(x, norm, 0.0, head, meta))
    assert torch.equal(TritonOps().norm_head_sample(x, norm, 0.0, head, filtered), first)
