"""The native sampler against the one over tensor operations, step by step over whole sequences:
parameters, bias, penalties, bans, bitmasks and log-probabilities, in batches that change."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    options: dict[str, Any] = {"vocab_size": VOCAB, "ends": ENDS, "ops": OPS}
    return [CpuSampler(ROWS, **options), TensorSampler(ROWS, device="cpu", **options)]


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


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 2**32))
def test_native_samples_are_those_of_tensor_operations(data: st.DataObject, seed: int) -> None:
    random = np.random.default_rng(seed)
    both = samplers()
    appended = None
    for step in range(4):
        entering = range(ROWS) if step == 0 else random.choice(ROWS, 1)
        requests = [data.draw(new_request(int(row))) for row in entering]
        for sampler in both:
            sampler.update_states(SchedulerOutput(requests, appended))
        index = random.integers(0, ROWS, random.integers(1, 7)).astype(np.int32)
        rows = SampleRows(
            index,
            torch.from_numpy(random.integers(0, 2**40, len(index))),
            random.integers(0, 2, len(index)).astype(np.uint8),
        )
        masks = {int(row): random_mask(random) for row in index[: step % 3]}
        logits = random_logits(len(index), seed + step)
        any_banned = bool(rows.banned.any()) and step % 2 == 1
        (ids, logprobs), (want, want_logprobs) = (
            sampler.sample(logits.clone(), rows, any_banned=any_banned, allowed_tokens=masks)
            for sampler in both
        )
        assert ids.tolist() == want.tolist()
        assert repr(logprobs) == repr(want_logprobs)
        ids = np.where(random.random(len(ids)) < 0.2, ~ids, ids)  # some are dropped again
        appended = index, ids.astype(np.int32)
