"""Sampling parameters on the device: always those of the rows that sample, copied only when these
change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.ops import SamplingMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner import sampling_columns
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest
from s1engine.runner.sampling_columns import COLUMNS
from s1engine.runner.staging_buffer import StagingBuffer
from s1engine.runner.tensor_sampler import TensorSampler
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import SamplingParams

ROWS, SAMPLES, VOCAB = 4, 6, 7


class SeparateStaging(StagingBuffer):
    """The "device" has memory of its own, which only ``upload`` fills."""

    def __init__(self, host: Tensor, device: str) -> None:
        super().__init__(host, "cpu")
        self.device = torch.full_like(host, 255)

    def upload(self, nbytes: int) -> None:
        self.device[:nbytes].copy_(self.host[:nbytes])


class RecordingOps(TorchOps):
    """Keeps what the last step was sampled with."""

    meta: SamplingMetadata

    def sample(self, logits: Tensor, meta: SamplingMetadata) -> Tensor:
        self.meta = meta
        return torch.zeros(len(logits), dtype=torch.int64)


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.6, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
)
new_requests = st.builds(
    NewRequest, st.integers(0, ROWS - 1), params, st.integers(-9, 9), st.just([1]), st.just(1)
)
indices = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=SAMPLES)
changes = st.lists(st.none() | st.just("positions") | new_requests | indices, max_size=12)


@settings(max_examples=60)
@given(changes)
def test_columns_are_those_of_the_rows_and_copied_when_they_change(changes: list[object]) -> None:
    ops = RecordingOps()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_columns, "StagingBuffer", SeparateStaging)
        sampler = TensorSampler(
            ROWS, vocab_size=VOCAB, ends=ThinkingEnds(), ops=ops, device="cpu", max_samples=SAMPLES
        )
    index, positions, copies = [0], torch.arange(SAMPLES), 0
    buffer, changed = np.zeros(SAMPLES, np.int32), True  # the scheduler writes each step into it
    for change in [None, *changes]:
        if isinstance(change, NewRequest):
            sampler.add_request(change)
            changed = True
        elif isinstance(change, list):
            changed |= change != index
            index = change
        elif change == "positions":
            positions = positions + 1
        buffer[: len(index)] = index
        rows = SampleRows(
            buffer[: len(index)], positions[: len(index)], np.zeros(len(index), np.uint8)
        )
        sampler.sample(torch.zeros(len(index), VOCAB), rows, any_banned=False)
        copies, changed = copies + changed, False
        assert sampler._columns.num_copies == copies
        assert ops.meta.positions.tolist() == positions[: len(index)].tolist()
        assert ops.meta.all_greedy == (not sampler.temperature[index].any())
        for name in COLUMNS:
            assert getattr(ops.meta, name).tolist() == getattr(sampler, name)[index].tolist()
