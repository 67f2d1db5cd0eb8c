"""A device that runs ahead of the mock scheduler, with the real transition of its lanes.

It sees what a GPU would see and nothing else: lanes, phrases and the block table. What it samples
goes to the host afterwards, a group of steps at a time.
"""

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import DeviceBatchTensors
from s1engine.ops.torch_budget import budget_step
from tests.core.paged_mock import VOCAB, PagedMock
from tests.core.reference import Model


class DeviceMock(PagedMock):
    """A mock engine whose pure decode steps are taken in runs of up to ``steps``.

    Args:
        max_inline_tokens: tokens of a phrase that ride in a run.
        spare_lanes: lanes more than sequences, as in a bucket that is not full.
        newlines: ids whose text ends in a newline.
    """

    def __init__(
        self,
        *,
        steps: int,
        max_inline_tokens: int,
        spare_lanes: int,
        newlines: frozenset[int],
        seed: int,
        **engine: Any,
    ) -> None:
        super().__init__(**engine)
        self.steps, self.max_inline_tokens, self.spare_lanes = steps, max_inline_tokens, spare_lanes
        self.null_slot = len(self.cache)
        self.cache = np.concatenate([self.cache, np.full((self.block_size, 2), -1, np.int64)])
        self.random = random.Random(seed)
        flags = np.zeros(VOCAB, np.uint8)
        flags[list(newlines)] = 1
        self.newlines = torch.from_numpy(flags)
        self.phrases = torch.full((400,), -1, dtype=torch.int32)
        self.flights: deque[Tensor] = deque()  # tokens [steps, lanes] that the host has not seen
        self.taken = 0  # steps that the device took by itself

    def step(self, model: Model) -> None:
        """One step on the host; the device may be one or more groups of steps ahead."""
        if self.flights or self._begin(model):
            steps = self.scheduler.extend_multi_step(self.batch, self.random.randint(1, self.steps))
            if steps and (len(self.flights) < 2 or self.random.random() < 0.2):
                self.flights.append(self._fly(steps, model))
            elif steps:
                self.flights[-1] = torch.cat([self.flights[-1], self._fly(steps, model)])
            self.scheduler.apply_multi_step(self.flights.popleft()[:, : self.rows].numpy())
        elif self.batch.num_rows:
            self.scheduler.update(self.forward(model))

    def _begin(self, model: Model) -> bool:
        self.scheduler.schedule(self.batch)
        if not self.batch.num_rows:
            return False
        self.rows = self.batch.num_rows
        lanes = self.rows + self.spare_lanes
        self.lanes = torch.full((len(_core.ROW_FIELDS), lanes), -7, dtype=torch.int32)
        self.slots, self.positions = (torch.full((lanes,), -7) for _ in range(2))
        run = _core.DeviceBatch(
            fields=self.lanes.numpy(),
            slot_mapping=self.slots.numpy(),
            sample_positions=self.positions.numpy(),
            phrases=self.phrases.numpy(),
            null_slot=self.null_slot,
        )
        steps = self.scheduler.begin_multi_step(
            self.batch, run, num_steps=self.steps, max_inline_tokens=self.max_inline_tokens
        )
        if steps:
            self.flights.append(self._fly(steps, model))
        return steps > 0

    def _fly(self, steps: int, model: Model) -> Tensor:
        """Takes steps by what stands in the lanes alone."""
        lanes = self.lanes.shape[1]
        table = torch.zeros((lanes, self.max_blocks + 1), dtype=torch.int32)  # one spare column
        table[: self.rows, :-1] = torch.from_numpy(self.buffers["block_table"][: self.rows])
        unused = torch.zeros(lanes)
        run = DeviceBatchTensors(
            rows_state=self.lanes,
            phrases=self.phrases,
            slot_mapping=self.slots,
            sample_positions=self.positions,
            block_table=table,
            temperature=unused,
            top_k=unused,
            top_p=unused,
            min_p=unused,
            seeds=unused,
            triggers=torch.tensor(sorted(self.triggers), dtype=torch.int32),
            newlines=self.newlines,
            output_tokens=torch.full((steps, lanes), -7, dtype=torch.int32),
            step_counter=torch.zeros(1, dtype=torch.int32),
            block_size=self.block_size,
            null_slot=self.null_slot,
        )
        for _ in range(steps):
            budget_step(
                torch.tensor([self._sample(run, lane, model) for lane in range(lanes)]), run
            )
        self.taken += steps
        return run.output_tokens

    def _sample(self, run: DeviceBatchTensors, lane: int, model: Model) -> int:
        slot, length = int(run.slot_mapping[lane]), int(run.field("context_lens")[lane])
        if length == 0:
            assert slot == self.null_slot
            return 0
        position = int(run.field("positions")[lane])
        assert position + 1 == length == int(run.sample_positions[lane])
        self.cache[slot] = int(run.field("input_ids")[lane]), position
        index = np.arange(length)
        blocks = run.block_table[lane].numpy()[index // self.block_size]
        found = self.cache[blocks * self.block_size + index % self.block_size]
        assert (found[:, 1] == index).all(), "positions in the cache"
        banned = self.triggers if run.field("sample_banned")[lane] else frozenset()
        return next(t for t in model([int(t) for t in found[:, 0]]) if t not in banned)
