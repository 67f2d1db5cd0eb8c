"""Checkpoints of a run: sharded, atomic, readable by any number of ranks.

A checkpoint is a folder ``step-00000063``: shards of all ranks, written by
torch.distributed.checkpoint, and ``state.json``. It is written under a hidden name, flushed to the
disk, and renamed. So a folder with this name is complete, however the run ended.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from s1engine.errors import RequestError
from s1engine.training.sft.distributed import DistributedContext, TrainingError
from s1engine.training.sft.samples import TrainingSet
from s1engine.training.sft.sft_config import SftConfig

STATE = "state.json"
CHANGEABLE_FIELDS = {
    "out", "data", "save_every", "keep", "threads", "gpus", "offload", "loss_chunk",
    "gradient_checkpointing", "expected_samples", "expected_tokens",
}  # fmt: skip
"""Fields that a resumed run may change: they affect neither the weights nor the data order."""
_NAME = re.compile(r"step-(\d{8})")


def run_identity(config: SftConfig, data: TrainingSet) -> dict[str, Any]:
    """The recipe fields and data digest that a checkpoint must share with the run that resumes."""
    digest = hashlib.sha256()
    for sample in data.samples:
        digest.update(repr((sample.num_prompt, sample.ids)).encode())
    fields = {
        name: value for name, value in config.to_json().items() if name not in CHANGEABLE_FIELDS
    }
    return fields | {"samples": digest.hexdigest()}


@dataclass(frozen=True, slots=True)
class CheckpointManager:
    """The checkpoints of one run, in ``folder``."""

    folder: Path
    distributed: DistributedContext
    identity: dict[str, Any]
    keep: int

    def newest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint."""
        checkpoints = [
            (int(match.group(1)), path)
            for path in (self.folder.iterdir() if self.folder.exists() else ())
            if (match := _NAME.fullmatch(path.name)) and (path / STATE).exists()
        ]
        return max(checkpoints, default=None)

    def resume(self, model: nn.Module, optimizer: Optimizer) -> int:
        """Loads the newest checkpoint and returns its step; 0 if there is none. Raises RequestError
        if it belongs to another recipe or other data."""
        newest = self.newest()
        if newest is None:
            return 0
        step, path = newest
        saved = json.loads((path / STATE).read_text())["identity"]
        own = json.loads(json.dumps(self.identity))
        differing = sorted(key for key in own | saved if own.get(key) != saved.get(key))
        if differing:
            reason = (
                f"{path} is of another run ({', '.join(differing)} differ); name another folder"
            )
            raise RequestError(f"out: {reason}", param="out")
        state = _state_dict(model, optimizer)
        state_dict_loader.load(state, storage_reader=FileSystemReader(path))
        set_state_dict(
            model, optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip
        return step

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> Path:
        """Publishes the state after ``step`` steps. Raises TrainingError on every rank if any rank
        fails; earlier checkpoints stay."""
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        self.run_on_all_ranks(lambda: self._prepare(partial))
        self.run_on_all_ranks(lambda: self._write(partial, model, optimizer), partial)
        self.run_on_all_ranks(lambda: self._publish(partial, final, step), partial)
        return final

    def _prepare(self, partial: Path) -> None:
        if self.distributed.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _write(self, partial: Path, model: nn.Module, optimizer: Optimizer) -> None:
        writer = FileSystemWriter(partial, sync_files=True)
        state_dict_saver.save(_state_dict(model, optimizer), storage_writer=writer)

    def _publish(self, partial: Path, final: Path, step: int) -> None:
        if not self.distributed.is_first:
            return
        world_size = self.distributed.world_size
        with (partial / STATE).open("w") as out:
            json.dump({"step": step, "world": world_size, "identity": self.identity}, out)
            out.flush()
            os.fsync(out.fileno())
        _fsync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _fsync(self.folder)
        complete = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        for old in complete[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def run_on_all_ranks(self, work: Callable[[], None], partial: Path | None = None) -> None:
        """Calls ``work`` on every rank. If it fails on one, removes ``partial`` and raises
        TrainingError on all."""
        failure = None
        try:
            work()
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            failure = f"rank {self.distributed.rank}: {_first_cause(error)}"
        failures = [one for one in self.distributed.all_gather(failure) if one]
        if not failures:
            return
        if self.distributed.is_first and partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        newest = self.newest()
        kept = f"the last good checkpoint is {newest[1]}" if newest else "there is no checkpoint"
        raise TrainingError(f"{self.folder}: saving failed ({failures[0]}); {kept}")


def _state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _first_cause(error: BaseException) -> str:
    """The cause in one line; of a collective failure, the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
