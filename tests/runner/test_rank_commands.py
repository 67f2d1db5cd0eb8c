"""What ranks exchange besides tensors arrives as it was."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from s1engine.runner.device_batch import DeviceBatchBuffer, DeviceBatchFormat
from s1engine.runner.rank_commands import NUM_BYTES, NUM_NUMBERS, CommandKind, RankCommand
from s1engine.runner.thinking_ends import EndTables, ThinkingEnds


@given(st.sampled_from(CommandKind), st.lists(st.integers(0, 2**62), max_size=NUM_NUMBERS))
def test_a_command_arrives_as_it_was_packed(kind: CommandKind, numbers: list[int]) -> None:
    data = RankCommand(kind, tuple(numbers)).pack()
    assert len(data) == NUM_BYTES
    padded = (*numbers, *[0] * (NUM_NUMBERS - len(numbers)))
    assert RankCommand.unpack(data) == RankCommand(kind, padded)


@given(st.booleans(), st.lists(st.integers(0, 99), max_size=3))
def test_ends_of_thinking_arrive_as_they_were(marked: bool, triggers: list[int]) -> None:
    states, vocab = 3, 10
    tables = EndTables(
        np.arange(states * vocab, dtype=np.uint8).reshape(states, vocab),
        np.arange(states, dtype=np.int32), np.ones(vocab, np.uint8),
    )  # fmt: skip
    ends = ThinkingEnds(tuple(triggers), tables if marked else None)
    got = ThinkingEnds.from_arrays(ends.to_arrays() | {"others": np.zeros(1)})
    assert got.triggers == ends.triggers and (got.tables is None) == (not marked)
    if got.tables is not None:
        assert np.array_equal(got.tables.next_state, tables.next_state)
        assert np.array_equal(got.tables.depths, tables.depths)
        assert np.array_equal(got.tables.token_lens, tables.token_lens)


def test_rows_of_a_device_batch_arrive_as_they_were() -> None:
    fmt = DeviceBatchFormat(ThinkingEnds(), np.zeros(9, np.uint8), block_size=4, null_slot=9)
    table = torch.zeros((3, 2), dtype=torch.int32)
    sent, got = (
        DeviceBatchBuffer(3, steps=2, fmt=fmt, block_table=table, device="cpu") for _ in range(2)
    )
    state = sent.state
    columns = [state.temperature, state.top_k, state.top_p, state.min_p, state.seeds]
    columns += [state.slot_mapping, state.sample_positions, state.phrases, state.fields]
    for i, column in enumerate(columns):
        column.copy_(torch.arange(i, i + column.numel()).view(column.shape))
    memory = torch.zeros(sent.num_bytes + 5, dtype=torch.uint8)
    sent.save(memory)
    got.load(memory)
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "slot_mapping",
                 "sample_positions", "phrases", "fields"):  # fmt: skip
        assert torch.equal(getattr(got.state, name), getattr(state, name)), name
