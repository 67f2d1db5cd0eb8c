"""Supervised fine-tuning as s1 does it, over one process or many.

Reads top to bottom: one optimizer step, the rows of a rank, then the whole run. A step's loss is
the mean over all its tokens that carry loss, however they are spread over rows and ranks. A killed
run resumes from its last checkpoint when it is started again.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s1engine.models.model_path import resolve_model
from s1engine.training.sft.checkpoint_manager import CheckpointManager, run_identity
from s1engine.training.sft.distributed import DistributedContext, TrainingError, init_distributed
from s1engine.training.sft.flops import peak_flops, training_flops
from s1engine.training.sft.model import SftModel, export_model, load_model
from s1engine.training.sft.optimizer import clip_gradients, create_optimizer, learning_rate
from s1engine.training.sft.packing import PackedRow, StepRows, schedule
from s1engine.training.sft.samples import TokenizedSample, load_tokenizer, load_training_set
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.telemetry import StepRecord, Telemetry, peak_memory_gb

MODEL = "model"  # the finished model's folder in ``out``


@dataclass(slots=True)
class Trainer:
    """The state of an optimizer step."""

    config: SftConfig
    distributed: DistributedContext
    samples: Sequence[TokenizedSample]
    steps: list[StepRows]
    model: SftModel
    optimizer: torch.optim.Optimizer

    def step(self, number: int) -> tuple[float, float]:
        """Executes optimizer step ``number``, from 0; returns its loss and gradient norm."""
        rows, world_size = self.steps[number], self.distributed.world_size
        num_targets = sum(self.samples[index].num_targets for row in rows for index in row)
        # the seed of dropout
        torch.manual_seed(self.config.seed * 2**31 + number * 2**10 + self.distributed.rank)
        losses = [
            self._accumulate_gradients(row, weight * world_size / num_targets)
            for row, weight in self._own_rows(rows)
        ]
        total = self.distributed.all_reduce(sum(losses))
        norm = clip_gradients(self.model, self.config.clip)
        self._check_finite(number, total, norm, losses)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, number, len(self.steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / world_size, norm

    def _own_rows(self, rows: StepRows) -> list[tuple[list[int], float]]:
        """This rank's rows of a step, with weight 1. Rows of similar length run at the same time on
        all ranks. All ranks must run equally many rows, so a rank without a last row repeats the
        longest one with weight 0."""
        rank, world_size = self.distributed.rank, self.distributed.world_size
        ordered = sorted(rows, key=self._num_tokens, reverse=True)
        count = -(-len(ordered) // world_size)
        own = [(row, 1.0) for row in ordered[rank::world_size]]
        return own + [(ordered[0], 0.0)] * (count - len(own))

    def _num_tokens(self, row: list[int]) -> int:
        return sum(len(self.samples[index].ids) for index in row)

    def _accumulate_gradients(self, row: list[int], scale: float) -> float:
        """Forward and backward of one row. ``scale`` includes the number of ranks, by which FSDP2
        divides gradients."""
        packed = PackedRow.from_samples([self.samples[index] for index in row])
        loss = self.model(packed.to(self.distributed.device)) * scale
        loss.backward()
        return float(loss.detach())

    def _check_finite(self, number: int, total: float, norm: float, losses: list[float]) -> None:
        """Raises TrainingError on all ranks if loss or gradient is NaN or infinite; it names the
        samples."""
        if math.isfinite(total) and math.isfinite(norm):
            return
        rows = self.steps[number]
        bad_rows = [
            row
            for (row, _), loss in zip(self._own_rows(rows), losses, strict=True)
            if not math.isfinite(loss)
        ]
        gathered: list[Any] = self.distributed.all_gather(bad_rows)
        bad_rows = [row for rank_rows in gathered for row in rank_rows] or rows
        names = ", ".join(self.samples[index].name for row in bad_rows for index in row)
        loss = total / self.distributed.world_size
        raise TrainingError(f"step {number + 1}: loss {loss}, gradient norm {norm}; batch: {names}")


def train(config: SftConfig, *, progress: bool = True) -> Path:
    """Runs a recipe, from its newest checkpoint if there is one. Returns the model's folder."""
    with init_distributed(config.threads) as distributed:
        return _train(config, distributed, progress and distributed.is_first)


def _train(config: SftConfig, distributed: DistributedContext, progress: bool) -> Path:
    tokenizer = load_tokenizer(config)
    data = load_training_set(config, tokenizer)
    steps = schedule([len(sample.ids) for sample in data.samples], config)
    model = load_model(config, distributed)
    optimizer = create_optimizer(model, config)
    trainer = Trainer(config, distributed, data.samples, steps, model, optimizer)
    out = Path(config.out)
    checkpoints = CheckpointManager(out, distributed, run_identity(config, data), config.keep)
    start = checkpoints.resume(model, optimizer)
    if progress:
        print(f"data: {data.counts}, {data.num_tokens:,} tokens; {len(steps)} steps",
              file=sys.stderr)  # fmt: skip
    _run_steps(trainer, checkpoints, start, progress)
    finished, partial = out / MODEL, out / f".{MODEL}.partial"
    source = resolve_model(config.model) if config.model else None

    def publish() -> None:
        export_model(model, config, source, partial, distributed.is_first)
        if distributed.is_first:
            tokenizer.save_pretrained(partial)
            shutil.rmtree(finished, ignore_errors=True)
            partial.rename(finished)

    checkpoints.run_on_all_ranks(publish, partial)
    return finished


def _run_steps(
    trainer: Trainer, checkpoints: CheckpointManager, start: int, progress: bool
) -> None:
    """Executes and saves all steps from ``start``; only the first rank keeps a log."""
    config, distributed, steps = trainer.config, trainer.distributed, trainer.steps
    steps_per_epoch = len(steps) // config.epochs
    architecture: Any = trainer.model.lm.config
    peak = peak_flops(distributed.device) * distributed.world_size if distributed.is_first else 1.0
    log = (
        Telemetry(checkpoints.folder, start=start, num_steps=len(steps), progress=progress)
        if distributed.is_first
        else None
    )
    with log or nullcontext():
        for number in range(start, len(steps)):
            begin = time.perf_counter()
            loss, norm = trainer.step(number)
            seconds = time.perf_counter() - begin
            lengths = [len(trainer.samples[i].ids) for row in steps[number] for i in row]
            if log is not None:
                log.add(StepRecord(
                    step=number + 1, epoch=(number + 1) / steps_per_epoch, loss=loss,
                    learning_rate=learning_rate(config, number, len(steps)), gradient_norm=norm,
                    tokens=sum(lengths), seconds=seconds,
                    mfu=training_flops(architecture, lengths) / seconds / peak,
                    memory_gb=peak_memory_gb(distributed.device),
                ))  # fmt: skip
            is_last = number + 1 == len(steps)
            if is_last or (config.save_every and (number + 1) % config.save_every == 0):
                checkpoints.save(number + 1, trainer.model, trainer.optimizer)
