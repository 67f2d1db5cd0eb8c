"""The step kernel against the core's state machine: equal rows after every token, bit for bit."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine import _core
from s1engine.kernels import row_fields
from s1engine.kernels.budget_step import budget_step
from s1engine.ops import DeviceBatchTensors, EndTensors, torch_budget
from s1engine.runner.thinking_ends import EndTables

VOCAB = 12
TRIGGERS = (2, 3)
STOPS = (4, 5)
BLOCK_SIZE = 4
NULL_SLOT = 999
FOREVER = 2**31 - 1
FIELDS = _core.ROW_FIELDS
PHASES = (_core.Phase.OFF, _core.Phase.THINKING, _core.Phase.ANSWERING)
FINISH = {"": 0, "stop": 1, "length": 2}

ids = st.integers(0, VOCAB - 1)
phrases = st.lists(ids, max_size=3)


@dataclass(frozen=True)
class Markers:
    """End markers of several tokens, and the bytes of all tokens; none by default."""

    texts: tuple[bytes, ...] = ()
    token_bytes: tuple[bytes, ...] = ()


@st.composite
def end_markers(draw: st.DrawFn) -> Markers:
    """Over a tiny alphabet, so that a few tokens begin, break off and complete them."""
    letters = st.text("ab", min_size=1, max_size=6).map(str.encode)
    pieces = st.text("ab", max_size=3).map(str.encode)
    words = draw(st.lists(pieces, min_size=VOCAB, max_size=VOCAB))
    return Markers(tuple(draw(st.lists(letters, min_size=1, max_size=2))), tuple(words))


@dataclass
class Row:
    """One sequence as the host sees it; ``queue``: tokens appended but not yet fed."""

    thinks: bool
    wait: list[int]
    natural_end: list[int]
    newline: list[int]
    forced_end: list[int]
    newline_always: bool
    min_thinking: int
    max_thinking: int
    num_waits: int
    prompt_len: int
    max_new: int
    newlines: tuple[int, ...]
    tail_newline: bool
    markers: Markers = Markers()
    after_marker: tuple[int, ...] = ()
    thought: int = 0  # above max_thinking after the host has lowered it
    format: Any = None
    core: Any = None
    state: Any = None
    fed: int = 6
    finish: str = ""
    num_tokens: int = 0
    queue: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        flags = np.zeros(VOCAB, np.uint8)
        flags[list(self.newlines)] = 1
        fmt = _core.BudgetFormat(
            triggers=list(TRIGGERS),
            natural_end=self.natural_end,
            newline=self.newline,
            newline_always=self.newline_always,
            ends_in_newline=flags,
            end_markers=list(self.markers.texts),
            token_bytes=list(self.markers.token_bytes),
            after_marker=list(self.after_marker),
        )
        self.format = fmt
        self.core = _core.BudgetParams(
            format=fmt,
            wait=self.wait,
            forced_end=self.forced_end,
            delimiter_len=0,
            min_thinking=self.min_thinking,
            num_waits=self.num_waits,
        )
        self.state = _core.BudgetState(
            phase=_core.Phase.THINKING if self.thinks else _core.Phase.OFF,
            thinking_tokens=self.thought,
            max_thinking=self.max_thinking,
            tail_newline=self.tail_newline,
        )
        self.num_tokens = self.prompt_len
        self.max_len = self.prompt_len + self.max_new

    def apply_token(self, sampled: int) -> None:
        """Apply a sampled token as the scheduler does, then feed one token."""
        if self.finish:
            return
        if not self.queue:
            thinking = self.state.phase == _core.Phase.THINKING
            self.queue = _core.advance(self.core, self.state, sampled)
            if not self.queue:
                return
            dropped = self.queue.count(-1)
            self.num_tokens -= dropped
            del self.queue[:dropped]
            self.num_tokens += len(self.queue)
            if not thinking and sampled in STOPS:
                self.finish = "stop"
            elif self.num_tokens >= self.max_len:
                self.finish = "length"
        self.fed = self.queue.pop(0)

    @property
    def position(self) -> int:
        """Position of the token fed last."""
        return self.num_tokens - 1 - len(self.queue)


@st.composite
def rows(draw: st.DrawFn, newlines: tuple[int, ...], markers: Markers) -> Row:
    maximum = draw(st.integers(1, 12) | st.just(FOREVER))
    return Row(
        thinks=draw(st.booleans() | st.just(True)),
        wait=draw(phrases),
        natural_end=draw(st.lists(ids, min_size=len(markers.texts) > 0, max_size=3)),
        newline=draw(st.lists(ids, max_size=2)),
        forced_end=draw(st.lists(ids, min_size=1, max_size=3)),
        newline_always=draw(st.booleans()),
        min_thinking=draw(st.integers(0, min(maximum, 12))),
        max_thinking=maximum,
        num_waits=draw(st.integers(0, 3) | st.just(FOREVER)),
        prompt_len=draw(st.integers(1, 9)),
        max_new=draw(st.integers(1, 60)),
        newlines=newlines,
        tail_newline=draw(st.booleans()),
        markers=markers,
        after_marker=tuple(draw(phrases)),
        thought=draw(st.integers(0, 6)),
    )


class Device:
    """The kernel's tensors for some rows."""

    def __init__(self, batch: list[Row], num_steps: int) -> None:
        count = len(batch)
        flat: list[int] = []

        def append(words: list[int]) -> int:
            """Where they begin."""
            flat.extend(words)
            return len(flat) - len(words)

        stops = append(list(STOPS))
        self.fields = torch.full((len(FIELDS), count), 77, dtype=torch.int32)
        for i, row in enumerate(batch):
            last = row.wait[-1] if row.wait else -1
            fields = {
                "phase": row.thinks,
                "banned": 0,
                "tail_newline": row.tail_newline,
                "thinking_tokens": row.thought,
                "max_thinking": row.max_thinking,
                "waits_used": 0,
                "match": 0,
                "held": 0,
                "starts": 0,
                "pending": 0,
                "remaining": 0,
                "input": row.fed,
                "position": row.position,
                "finish": 0,
                "min_thinking": row.min_thinking,
                "num_waits": row.num_waits,
                "wait_begin": append(row.wait),
                "wait_len": len(row.wait),
                "wait_newline": last in row.newlines,
                "natural_begin": append(row.natural_end),
                "natural_len": len(row.natural_end),
                "after_marker_begin": append(list(row.after_marker)),
                "after_marker_len": len(row.after_marker),
                "forced_begin": append(row.newline + row.forced_end),
                "newline_len": len(row.newline),
                "forced_len": len(row.forced_end),
                "newline_always": row.newline_always,
                "max_len": row.max_len,
                "stop_begin": stops,
                "stop_len": len(STOPS),
            }
            for name, value in fields.items():
                self.fields[FIELDS.index(name), i] = int(value)
        self.phrases = torch.tensor(flat, dtype=torch.int32)
        flags = np.zeros(VOCAB, np.uint8)
        flags[list(batch[0].newlines)] = 1
        self.newlines = torch.from_numpy(flags)
        self.ends: EndTensors | None = None
        tables = EndTables.of(batch[0].format)
        if tables is not None:
            arrays = (tables.next_state, tables.depths, tables.token_lens)
            self.ends = EndTensors(*map(torch.from_numpy, arrays))
        capacity = max(row.max_len for row in batch) // BLOCK_SIZE + 3
        self.table = torch.randperm(count * capacity).view(count, capacity).to(torch.int32)
        self.output_tokens = torch.full((num_steps, count), 77, dtype=torch.int32)
        self.step_counter = torch.zeros(1, dtype=torch.int32)
        self.next: dict[str, Tensor] = {
            name: torch.full((count,), 77, dtype=torch.int64)
            for name in ("slot_mapping", "sample_positions")
        }

    def get(self, name: str, row: int) -> int:
        values = self.fields[FIELDS.index(name)] if name in FIELDS else self.next[name]
        return int(values[row])

    def step(self, sampled: list[int]) -> None:
        """One step of the kernel, which must leave the tensors of torch's step."""
        wanted = self.step_in_torch(sampled)
        ends = self.ends
        budget_step(
            torch.tensor(sampled),
            self.fields,
            self.phrases,
            torch.tensor(TRIGGERS, dtype=torch.int32),
            self.newlines,
            self.table,
            output_tokens=self.output_tokens,
            step_counter=self.step_counter,
            block_size=BLOCK_SIZE,
            null_slot=NULL_SLOT,
            markers=None if ends is None else (ends.next_state, ends.depths, ends.token_lens),
            **self.next,
        )
        for name in FIELDS:
            own, theirs = self.fields[FIELDS.index(name)], wanted.field(name)
            if name == "pending":  # begins a phrase, if there is one
                fed = wanted.field("remaining") > 0
                own, theirs = own[fed], theirs[fed]
            assert torch.equal(own, theirs), name
        assert torch.equal(self.output_tokens, wanted.output_tokens)
        assert torch.equal(self.next["slot_mapping"], wanted.slot_mapping)

    def step_in_torch(self, sampled: list[int]) -> DeviceBatchTensors:
        """The tensors that a step of the definition in torch leaves."""
        unused = torch.zeros(len(sampled))
        tensors = DeviceBatchTensors(
            fields=self.fields.clone(),
            phrases=self.phrases,
            slot_mapping=self.next["slot_mapping"].clone(),
            sample_positions=self.next["sample_positions"].clone(),
            block_table=self.table,
            temperature=unused,
            top_k=unused,
            top_p=unused,
            min_p=unused,
            seeds=unused,
            triggers=torch.tensor(TRIGGERS, dtype=torch.int32),
            newlines=self.newlines,
            output_tokens=self.output_tokens.clone(),
            step_counter=self.step_counter.clone(),
            block_size=BLOCK_SIZE,
            null_slot=NULL_SLOT,
            ends=self.ends,
        )
        torch_budget.budget_step(torch.tensor(sampled), tensors)
        return tensors


def check_row(device: Device, row: Row, i: int) -> None:
    """Budget state, bans and the next input of a row are those of the core."""
    state = row.state
    assert PHASES[device.get("phase", i)] == state.phase
    assert device.get("thinking_tokens", i) == state.thinking_tokens
    assert device.get("max_thinking", i) == state.max_thinking
    assert device.get("waits_used", i) == state.waits_used
    assert device.get("finish", i) == FINISH[row.finish]
    inputs = {name: device.get(name, i) for name in (*device.next, *FIELDS[-4:])}
    assert inputs["sample_banned"] == _core.ban_code(row.core, state)
    thinks = state.phase == _core.Phase.THINKING
    for name in ("match", "held", "starts"):
        assert device.get(name, i) == getattr(state, name) or not thinks
    if row.finish:
        assert (inputs["slot_mapping"], inputs["context_lens"]) == (NULL_SLOT, 0)
        return
    assert device.get("remaining", i) == len(row.queue)
    assert (inputs["input_ids"], inputs["positions"]) == (row.fed, row.position)
    assert inputs["context_lens"] == inputs["sample_positions"] == row.position + 1
    block = int(device.table[i, row.position // BLOCK_SIZE])
    assert inputs["slot_mapping"] == block * BLOCK_SIZE + row.position % BLOCK_SIZE


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("marked", [False, True])
def test_rows_follow_the_core_bit_for_bit(marked: bool, data: st.DataObject) -> None:
    """And torch's form of the step, whose tensors ``Device.step`` compares."""
    newlines = tuple(data.draw(st.sets(ids, max_size=3)))
    markers = data.draw(end_markers()) if marked else Markers()
    batch = data.draw(st.lists(rows(newlines, markers), min_size=1, max_size=8))
    device = Device(batch, num_steps=7)
    favourites = st.sampled_from([*TRIGGERS, *STOPS, 6, 7, 8]) | ids
    for step in range(data.draw(st.integers(1, 20))):
        sampled = [data.draw(favourites) for _ in batch]
        advances = [not row.finish and not row.queue for row in batch]
        for row, token in zip(batch, sampled, strict=True):
            row.apply_token(token)
        device.step(sampled)
        for i, row in enumerate(batch):
            check_row(device, row, i)
        wanted = [t if a else _core.NO_TOKEN for t, a in zip(sampled, advances, strict=True)]
        assert device.output_tokens[step % 7].tolist() == wanted
        assert int(device.step_counter) == step + 1


def test_a_finished_row_stays_as_it_is() -> None:
    row = Row(False, [], [], [], [7], False, 0, 5, 0, 3, 9, (), False)
    device = Device([row], num_steps=4)
    device.step([STOPS[0]])
    before = device.fields.clone()
    device.step([8])
    assert torch.equal(device.fields, before)
    assert device.output_tokens[:2, 0].tolist() == [STOPS[0], _core.NO_TOKEN]


def test_the_layout_is_the_cores() -> None:
    """Field by field: kernels cannot import the core, which owns the layout."""
    assert len(FIELDS) == row_fields.NUM_FIELDS
    numbers = {name: getattr(row_fields, name.upper()).value for name in FIELDS}
    assert numbers == {name: number for number, name in enumerate(FIELDS)}


def test_the_values_are_the_cores() -> None:
    for name in ("THINKING", "ANSWERING"):
        assert getattr(row_fields, name).value == getattr(_core.Phase, name).value
    for name in ("STOP", "LENGTH"):
        assert getattr(row_fields, name).value == getattr(_core.FinishReason, name).value
    assert row_fields.NO_TOKEN.value == _core.NO_TOKEN
    assert row_fields.COMPLETE.value == _core.END_COMPLETE
