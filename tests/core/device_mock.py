"""A mock device that takes multi-step decodes with the real budget transition.

It sees what a GPU would see and nothing else: the device batch and the block table. Its tokens
reach the host afterwards, a group of steps at a time.
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
from s1engine.runner.device_batch import DeviceBatchFormat
from tests.core.paged_mock import VOCAB, PagedMock
from tests.core.reference import Model


class DeviceMock(PagedMock):
    """A mock engine that takes pure decode steps in groups of up to ``steps``.

    Args:
        max_inline_tokens: longest phrase that is fed one token a step.
        spare_rows: rows beyond the sequences, as in a bucket that is not full.
        step_time: seconds of a step, reported up to 30 times too long.
        newlines: ids whose text ends in a newline.
    """

    def __init__(
        self,
        *,
        steps: int,
        max_inline_tokens: int,
        spare_rows: int,
        newlines: frozenset[int],
        seed: int,
        step_time: float = 0.0,
        **engine: Any,
    ) -> None:
        super().__init__(**engine)
        self.steps, self.max_inline_tokens, self.spare_rows = steps, max_inline_tokens, spare_rows
        self.null_slot = self.null_block * self.block_size
        self.random = random.Random(seed)
        self.step_time = step_time
        flags = np.zeros(VOCAB, np.uint8)
        flags[list(newlines)] = 1
        self.newlines = torch.from_numpy(flags)
        self.phrases = torch.full((400,), -1, dtype=torch.int32)
        self.in_flight: deque[Tensor] = deque()  # tokens [steps, B] that the host has not seen
        self.num_device_steps = 0
        fmt = DeviceBatchFormat(self.ends, flags, self.block_size, self.null_slot)
        self.end_tensors = fmt.end_tensors("cpu")

    def step(self, model: Model) -> None:
        """One step on the host; the device may be several groups of steps ahead."""
        if self.in_flight or self._begin(model):
            steps = self.scheduler.extend_multi_step(self.batch, self.random.randint(1, self.steps))
            if steps and (len(self.in_flight) < 2 or self.random.random() < 0.2):
                self.in_flight.append(self._take_steps(steps, model))
            elif steps:
                self.in_flight[-1] = torch.cat([self.in_flight[-1], self._take_steps(steps, model)])
            self._apply_oldest(self.random.uniform(1, 30))
        elif self.batch.num_rows:
            self.scheduler.update(self.forward(model))

    def _apply_oldest(self, delay: float = 1.0) -> None:
        tokens = self.in_flight.popleft()[:, : self.rows].numpy()
        self.scheduler.apply_multi_step(tokens, len(tokens) * self.step_time * delay)

    def _begin(self, model: Model) -> bool:
        self.scheduler.schedule(self.batch)
        if not self.batch.num_rows:
            return False
        self.rows = self.batch.num_rows
        num_rows = self.rows + self.spare_rows
        self.fields = torch.full((len(_core.ROW_FIELDS), num_rows), -7, dtype=torch.int32)
        self.slots, self.positions = (torch.full((num_rows,), -7) for _ in range(2))
        device_batch = _core.DeviceBatch(
            fields=self.fields.numpy(),
            slot_mapping=self.slots.numpy(),
            sample_positions=self.positions.numpy(),
            phrases=self.phrases.numpy(),
            null_slot=self.null_slot,
        )
        steps = self.scheduler.begin_multi_step(
            self.batch,
            device_batch,
            num_steps=self.steps,
            max_inline_tokens=self.max_inline_tokens,
        )
        if steps:
            self.in_flight.append(self._take_steps(steps, model))
        return steps > 0

    def _take_steps(self, steps: int, model: Model) -> Tensor:
        """Output tokens [steps, B] of decode steps, from the device batch alone."""
        num_rows = self.fields.shape[1]
        table = torch.zeros((num_rows, self.max_blocks + 1), dtype=torch.int32)  # one spare column
        table[: self.rows, :-1] = torch.from_numpy(self.buffers["block_table"][: self.rows])
        unused = torch.zeros(num_rows)
        tensors = DeviceBatchTensors(
            fields=self.fields,
            phrases=self.phrases,
            slot_mapping=self.slots,
            sample_positions=self.positions,
            block_table=table,
            temperature=unused,
            top_k=unused,
            top_p=unused,
            min_p=unused,
            seeds=unused,
            triggers=torch.tensor(sorted(self.ends.triggers), dtype=torch.int32),
            newlines=self.newlines,
            output_tokens=torch.full((steps, num_rows), -7, dtype=torch.int32),
            step_counter=torch.zeros(1, dtype=torch.int32),
            block_size=self.block_size,
            null_slot=self.null_slot,
            ends=self.end_tensors,
        )
        for _ in range(steps):
            budget_step(
                torch.tensor([self._sample(tensors, row, model) for row in range(num_rows)]),
                tensors,
            )
        self.num_device_steps += steps
        return tensors.output_tokens

    def _sample(self, tensors: DeviceBatchTensors, row: int, model: Model) -> int:
        slot, length = int(tensors.slot_mapping[row]), int(tensors.field("context_lens")[row])
        if length == 0:
            assert slot == self.null_slot
            return 0
        position = int(tensors.field("positions")[row])
        assert position + 1 == length == int(tensors.sample_positions[row])
        self.cache[slot] = int(tensors.field("input_ids")[row]), position
        ranked = model(self.context(tensors.block_table[row].numpy(), length))
        return self.best_allowed(ranked, int(tensors.field("sample_banned")[row]))
