"""Head and sampling in one kernel give the tokens of the unfused operations on the same logits.

Inputs make every sum exact in any order: +-1 with a mean square of 1, and small integers as
weights. So logits agree bit for bit, and many of them are equal.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine import _core
from s1engine.kernels.norm_head_sample import best_of_shard, norm_head_sample
from s1engine.ops import SamplingMetadata, torch_sampling
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from s1engine.runner.device_batch import DeviceBatchBuffer, DeviceBatchFormat
from s1engine.runner.thinking_ends import EndTables, ThinkingEnds
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


def fused(
    x: Tensor, norm: Tensor, head: Tensor, meta: SamplingMetadata, **ban: Tensor
) -> list[int]:
    columns = (meta.temperature, meta.seeds, meta.positions)
    return norm_head_sample(x, norm, 0.0, head, *columns, **ban).tolist()


def unfused(x: Tensor, norm: Tensor, head: Tensor, meta: SamplingMetadata) -> list[int]:
    logits = TORCH.linear(TORCH.rms_norm(x, norm, 0.0), head).float()
    return TORCH.sample(logits, meta).tolist()


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
    assert fused(x, norm, head, meta) == unfused(x, norm, head, meta)


@pytest.mark.parametrize("rows", [2, 6])
def test_what_is_no_number_is_never_the_best(rows: int) -> None:
    x, norm, head = case(rows, 30, 0, torch.float32)
    head[3:20] = math.nan
    for temperature in (0.0, 1.0):
        meta = make_sampling(rows, temperature=temperature, positions=torch.arange(rows))
        got = fused(x, norm, head, meta)
        assert got == unfused(x, norm, head, meta)
        assert not set(got) & set(range(3, 20))


@pytest.mark.parametrize("rows", [4, 6])
def test_triggers_are_banned_row_by_row(rows: int) -> None:
    x, norm, head = case(rows, 90, 1, torch.float16)
    x[:, :9] = 1
    triggers = torch.tensor([3, 77], dtype=torch.int32)
    head[triggers] = torch.arange(40).lt(9).half() * 30  # certain, if allowed
    flags = (torch.arange(rows) < rows // 2).to(torch.int32)
    meta = make_sampling(rows, temperature=[0.0, 1.0] * (rows // 2), positions=torch.arange(rows))
    got = fused(x, norm, head, meta, banned=flags, triggers=triggers)
    logits = TORCH.linear(x, head).float()
    logits[: rows // 2, triggers] = -math.inf
    assert got[: rows // 2] == TORCH.sample(logits, meta).tolist()[: rows // 2]
    assert set(got[rows // 2 :]) <= {3, 77}


@settings(max_examples=2)
@given(rows=st.sampled_from([1, 5]), seed=st.integers(0, 999), dtype=DTYPES)
def test_the_best_of_all_shards_is_the_sample(rows: int, seed: int, dtype: torch.dtype) -> None:
    """Shards of 36 ids, which no tile divides; the second has a banned trigger."""
    x, norm, head = case(rows, 72, seed, dtype)
    temperatures = torch.tensor([0.0, 0.7, 3.0])[torch.arange(rows) % 3]
    meta = make_sampling(rows, temperature=temperatures, seeds=seed, positions=2**33)
    ban = {
        "banned": (torch.arange(rows) % 2).to(torch.int32),
        "triggers": torch.tensor([3, 36 + seed % 36], dtype=torch.int32),
    }
    columns = (meta.temperature, meta.seeds, meta.positions)
    shards = [
        best_of_shard(x, norm, 0.0, head[first : first + 36], *columns, first, **ban)
        for first in (0, 36)
    ]
    got = torch_sampling.best_of_shards(torch.cat(shards, dim=1)).tolist()
    assert got == fused(x, norm, head, meta, **ban)


def marker_tables(size: int) -> EndTables | None:
    """Of the end marker "ab", which many of the tokens begin or complete."""
    texts = [b"a", b"b", b"c", b"ba", b"cab", b"bc"]
    core = _core.BudgetFormat(
        triggers=[3, 7], natural_end=[3], newline=[], newline_always=False,
        ends_in_newline=np.zeros(size, np.uint8), end_markers=[b"ab"],
        token_bytes=[texts[i % len(texts)] for i in range(size)],
    )  # fmt: skip
    return EndTables.of(core)


def make_batch(rows: int, size: int, marked: bool = False) -> DeviceBatchBuffer:
    """Rows with different bans and filters, none of which finishes soon; ``marked``: half of them
    hold the first token of an end marker."""
    ends = ThinkingEnds((3, 7), marker_tables(size) if marked else None)
    fmt = DeviceBatchFormat(ends, np.zeros(size, np.uint8), block_size=4, null_slot=99)
    table = torch.arange(rows * 9, dtype=torch.int32).view(rows, 9)
    batch = DeviceBatchBuffer(
        rows, steps=4, fmt=fmt, block_table=table, device="cpu", ends=fmt.end_tensors("cpu")
    )
    fields = {"finish": 0, "phase": 1, "max_thinking": 9, "max_len": 30, "num_waits": 9}
    fields |= {"wait_len": 1, "natural_len": 1, "position": 5}
    for name, value in fields.items():
        batch.state.field(name).fill_(value)
    batch.state.field("sample_banned").copy_(torch.arange(rows) % 2)
    if marked:
        half = torch.arange(rows) % 3 == 1
        for name in ("match", "held", "starts"):
            batch.state.field(name).copy_(half)
        batch.state.field("sample_banned").mul_(1 + half)
    batch.temperature[:] = np.arange(rows) % 3
    batch.top_k[:] = np.arange(rows) % 4
    batch.top_p[:] = 1
    return batch


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("rows", "filtered"), [(5, False), (65, False), (5, True)])
def test_rows_advance_as_on_torch(rows: int, filtered: bool, marked: bool) -> None:
    """The fused kernel covers neither 65 rows nor filters nor end markers."""
    x, norm, head = case(rows, 50, 2, torch.float32)
    ours, torchs = (make_batch(rows, 50, marked).state for _ in range(2))
    for _ in range(4):
        TritonOps().sample_and_advance(x, norm, 0.0, head, ours, filtered=filtered)
        TORCH.sample_and_advance(x, norm, 0.0, head, torchs, filtered=filtered)
    assert torch.equal(ours.output_tokens, torchs.output_tokens)
    assert torch.equal(ours.fields, torchs.fields)
    assert torch.equal(ours.slot_mapping, torchs.slot_mapping)
    assert len(ours.output_tokens.unique()) > 4
