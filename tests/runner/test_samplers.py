"""The native sampler against the one over tensor operations, step by step over whole sequences:
parameters, bias, penalties, bans, bitmasks and log-probabilities, in batches that change."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine import _core
from s1engine.logprob_records import unpack_logprobs
from s1engine.ops.cpu_ops import CpuOps
from s1engine.runner.cpu_sampler import CpuSampler
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest, SchedulerOutput
from s1engine.runner.sampler import Sampler
from s1engine.runner.tensor_sampler import TensorSampler
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import SamplingParams

ROWS = 4
VOCAB = 37
ENDS = ThinkingEnds((3, 5, 9))
OPS = CpuOps()


def samplers() -> list[Sampler]:
    """The native one first."""
    options: dict[str, Any] = {"vocab_size": VOCAB, "ends": ENDS}
    return [
        CpuSampler(ROWS, **options),
        TensorSampler(ROWS, ops=OPS, device="cpu", max_samples=6, **options),
    ]


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 1, 6, VOCAB])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -0.4])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3, -0.2])),
        logit_bias=draw(
            st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4)
        ),
        logprobs=draw(st.sampled_from([None, None, 0, 3, 20])),
    )


@st.composite
def new_request(draw: st.DrawFn, req_index: int) -> NewRequest:
    token_ids = draw(st.lists(st.integers(0, VOCAB + 3), min_size=1, max_size=12))
    return NewRequest(
        req_index,
        draw(params()),
        draw(st.integers(-(2**63), 2**63 - 1)),
        token_ids,
        draw(st.integers(1, len(token_ids))),
        draw(st.lists(st.integers(1, VOCAB + 3), max_size=3)),
    )


def random_logits(rows: int, seed: int) -> torch.Tensor:
    """Logits [rows, V] with equal ones, and with NaN and infinity here and there."""
    random = np.random.default_rng(seed)
    logits = random.integers(-40, 40, (rows, VOCAB)).astype(np.float32) / 8
    odd = random.random((rows, VOCAB)) < 0.01
    logits[odd] = random.choice([np.nan, np.inf, -np.inf], odd.sum())
    return torch.from_numpy(logits)


def random_mask(random: np.random.Generator) -> np.ndarray:
    allowed = random.random(VOCAB) < 0.5
    allowed[random.integers(VOCAB)] = True
    allowed[0] = True  # which nothing bans
    return np.packbits(allowed, bitorder="little")


def check_logprobs(got_records: bytes, want_records: bytes) -> None:
    """Values are equal but for float32's rounding of torch; ids exactly."""
    got, want = unpack_logprobs(got_records), unpack_logprobs(want_records)
    assert got.keys() == want.keys()
    for row, expected in want.items():
        assert [token for token, _ in got[row].top] == [token for token, _ in expected.top]
        values = [expected.logprob, *(value for _, value in expected.top)]
        assert [got[row].logprob, *(value for _, value in got[row].top)] == pytest.approx(
            values, rel=1e-6, abs=2e-6
        )


def append(
    outputs: dict[int, list[int]], rows: list[int], ids: list[int], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Appends an id to the output of each row; some rows drop their last id again."""
    events: list[tuple[int, int]] = []
    for row, token in zip(rows, ids, strict=True):
        outputs[row].append(token)
        events.append((row, token))
        while outputs[row] and random.random() < 0.3:
            events.append((row, ~outputs[row].pop()))
    req_indices, tokens = np.array(events, np.int32).T
    return np.ascontiguousarray(req_indices), np.ascontiguousarray(tokens)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**32))
def test_native_samples_are_those_of_tensor_operations(data: st.DataObject, seed: int) -> None:
    random = np.random.default_rng(seed)
    both = samplers()
    appended = None
    outputs: dict[int, list[int]] = {}
    for step in range(4):
        entering = range(ROWS) if step == 0 else random.choice(ROWS, 1)
        requests = [data.draw(new_request(int(row))) for row in entering]
        outputs |= {request.req_index: [] for request in requests}
        for sampler in both:
            sampler.update_states(SchedulerOutput(requests, appended))
        index = random.integers(0, ROWS, random.integers(1, 7)).astype(np.int32)
        rows = SampleRows(
            index,
            torch.from_numpy(random.integers(0, 2**40, len(index))),
            random.choice([0, 0, 1, _core.BAN_ENDS], len(index)).astype(np.uint8),
        )
        masks = {int(row): random_mask(random) for row in index[: step % 3]}
        logits = random_logits(len(index), seed + step)
        any_banned = bool(rows.banned.any()) and step % 2 == 1
        got, want = (
            sampler.sample(logits.clone(), rows, any_banned=any_banned, allowed_tokens=masks)
            for sampler in both
        )
        ids = got.token_ids
        assert ids.tolist() == want.token_ids.tolist()
        check_logprobs(got.logprobs, want.logprobs)
        appended = append(outputs, index.tolist(), ids.tolist(), random)
