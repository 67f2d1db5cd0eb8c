"""Supervised fine-tuning as s1 does it, over one process or many.

    torchrun --nproc_per_node 8 -m s1engine.training.sft s1_32b_8xh100 --set data=[s1k.jsonl]
    python -m s1engine.training.sft s1_32b_8xh100 --dry-run

Reads top to bottom: samples, the order of rows, the sharded model, then the loop. A step's loss is
the mean over all its tokens that carry loss, however they are spread over rows and ranks. A run
that was killed goes on from its last checkpoint when it is started again.
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

from s1engine.models.loader import resolve_model
from s1engine.training.sft import checkpoint_manager as checkpoint
from s1engine.training.sft import model as models
from s1engine.training.sft import samples
from s1engine.training.sft.distributed import Ranks, TrainingError, joined
from s1engine.training.sft.flops import peak_flops, training_flops
from s1engine.training.sft.optimizer import clip_gradients, learning_rate, make_optimizer
from s1engine.training.sft.packing import PackedRow, num_targets, schedule
from s1engine.training.sft.sft_config import SftConfig
from s1engine.training.sft.telemetry import StepRecord, Telemetry, memory_gb

MODEL = "model"  # the finished model's folder in ``out``
Rows = list[list[int]]


@dataclass(slots=True)
class Trainer:
    """What a step needs."""

    config: SftConfig
    ranks: Ranks
    samples: Sequence[samples.Sample]
    steps: list[Rows]
    model: models.SftModel
    optimizer: torch.optim.Optimizer

    def step(self, number: int) -> tuple[float, float]:
        """Optimizer step ``number``, from 0: its loss and its gradient's norm."""
        rows = self.steps[number]
        targets = sum(num_targets(self.samples[index]) for row in rows for index in row)
        torch.manual_seed(self.config.seed * 2**31 + number * 2**10 + self.ranks.rank)  # dropout's
        losses = [
            self._accumulate(row, weight * self.ranks.world / targets)
            for row, weight in share(rows, self._length, self.ranks)
        ]
        (total,) = self.ranks.sum(sum(losses))
        norm = clip_gradients(self.model, self.config.clip)
        self._check(number, total, norm, losses)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, number, len(self.steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / self.ranks.world, norm

    def _accumulate(self, row: list[int], scale: float) -> float:
        """Forward and backward of one row; FSDP2 divides gradients by the number of ranks, which
        ``scale`` makes up for."""
        packed = PackedRow.make([self.samples[index] for index in row]).to(self.ranks.device)
        loss = self.model(packed) * scale
        loss.backward()
        return float(loss.detach())

    def _length(self, row: list[int]) -> int:
        return sum(len(self.samples[index].ids) for index in row)

    def _check(self, number: int, total: float, norm: float, losses: list[float]) -> None:
        """Stops all ranks where loss or gradient is no number, naming the rows at fault."""
        if math.isfinite(total) and math.isfinite(norm):
            return
        mine = share(self.steps[number], self._length, self.ranks)
        bad = [
            self.samples[index].name
            for (row, _), loss in zip(mine, losses, strict=True)
            for index in row
            if not math.isfinite(loss)
        ]
        names = [name for found in self.ranks.gather(bad) for name in found]  # type: ignore
        if not names:
            names = [self.samples[i].name for row in self.steps[number] for i in row]
        raise TrainingError(
            f"step {number + 1}: loss {total / self.ranks.world}, gradient norm {norm}; "
            f"batch: {', '.join(names)}"
        )


def share(rows: Rows, length: Any, ranks: Ranks) -> list[tuple[list[int], float]]:
    """This rank's rows of a step, with weight 1. Rows of like length run at the same time on all
    ranks; a rank without a last row repeats the longest with weight 0, for all must take part."""
    ordered = sorted(rows, key=length, reverse=True)
    count = -(-len(ordered) // ranks.world)
    mine = [(row, 1.0) for row in ordered[ranks.rank :: ranks.world]]
    return mine + [(ordered[0], 0.0)] * (count - len(mine))


def train(config: SftConfig, *, progress: bool = True) -> Path:
    """Runs a recipe, from its newest checkpoint if there is one; the finished model's folder."""
    with joined(config.threads) as ranks:
        return _train(config, ranks, progress and ranks.is_first)


def _train(config: SftConfig, ranks: Ranks, progress: bool) -> Path:
    tokenizer = samples.load_tokenizer(config)
    data = samples.load(config, tokenizer)
    steps = schedule([len(sample.ids) for sample in data.samples], config)
    model = models.load(config, ranks)
    optimizer = make_optimizer(model, config)
    trainer = Trainer(config, ranks, data.samples, steps, model, optimizer)
    out = Path(config.out)
    saved = checkpoint.Checkpoints(out, ranks, checkpoint.identity(config, data), config.keep)
    start = saved.resume(model, optimizer)
    if progress:
        print(f"data: {data.counts}, {data.num_tokens:,} tokens; {len(steps)} steps",
              file=sys.stderr)  # fmt: skip
    _loop(trainer, saved, start, progress)
    finished, partial = out / MODEL, out / f".{MODEL}.partial"
    source = resolve_model(config.model) if config.model else None

    def publish() -> None:
        models.export(model, config, source, partial, ranks.is_first)
        if ranks.is_first:
            tokenizer.save_pretrained(partial)
            shutil.rmtree(finished, ignore_errors=True)
            partial.rename(finished)

    saved.together(publish, partial)
    return finished


def _loop(trainer: Trainer, saved: checkpoint.Checkpoints, start: int, progress: bool) -> None:
    """All steps from ``start``; only the first rank keeps a log."""
    config, ranks, steps = trainer.config, trainer.ranks, trainer.steps
    epoch_steps = len(steps) // config.epochs
    architecture: Any = trainer.model.lm.config
    peak = peak_flops(ranks.device) * ranks.world if ranks.is_first else 1.0
    log = Telemetry(saved.folder, start=start, steps=len(steps), progress=progress) \
        if ranks.is_first else None  # fmt: skip
    with log or nullcontext():
        for number in range(start, len(steps)):
            begin = time.perf_counter()
            loss, norm = trainer.step(number)
            seconds = time.perf_counter() - begin
            lengths = [len(trainer.samples[i].ids) for row in steps[number] for i in row]
            if log is not None:
                log.add(StepRecord(
                    step=number + 1, epoch=(number + 1) / epoch_steps, loss=loss,
                    learning_rate=learning_rate(config, number, len(steps)), gradient_norm=norm,
                    tokens=sum(lengths), seconds=seconds,
                    mfu=training_flops(architecture, lengths) / seconds / peak,
                    memory_gb=memory_gb(ranks.device),
                ))  # fmt: skip
            last = number + 1 == len(steps)
            if last or (config.save_every and (number + 1) % config.save_every == 0):
                saved.save(number + 1, trainer.model, trainer.optimizer)
