"""What a run reports: a progress bar, log.jsonl, TensorBoard, and a loss plot.

Only the first rank reports. A resumed run truncates its log to the checkpoint it starts from, so
the log equals that of an uninterrupted run.
"""

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from s1engine.training.rows import read_complete_lines, write_jsonl

LOG, PLOT = "log.jsonl", "loss.png"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the log."""

    step: int
    """From 1."""
    epoch: float
    loss: float
    """Mean over the step's tokens that carry loss."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """All tokens of the step."""
    seconds: float
    mfu: float
    """Model operations (recomputation not counted) per second over the peak."""
    memory_gb: float
    """Peak so far: of the first GPU, or of this process."""


class Telemetry:
    """Open for the whole run; ``add`` a record after each step."""

    def __init__(self, folder: Path, *, start: int, num_steps: int, progress: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        path = folder / LOG
        write_jsonl(path, [row for row in read_complete_lines(path) if row["step"] <= start])
        self._log = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(folder, purge_step=start + 1)
        self._bar = tqdm(total=num_steps, initial=start, unit="step", disable=not progress)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._log.close()
        if self._board is not None:
            self._board.close()
        if kind is None:
            plot_losses(
                [row["loss"] for row in read_complete_lines(self._folder / LOG)],
                self._folder / PLOT,
            )

    def add(self, record: StepRecord) -> None:
        """Shows and writes a step immediately."""
        row = asdict(record)
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        for name, value in row.items() if self._board is not None else ():
            self._board.add_scalar(f"train/{name}", value, record.step)
        rate = record.tokens / max(record.seconds, 1e-9)
        self._bar.set_postfix_str(
            f"loss {record.loss:.4f}, {rate:,.0f} tokens/s, MFU {record.mfu:.1%}, "
            f"{record.memory_gb:.1f} GB",
            refresh=False,
        )
        self._bar.update()


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plot_losses(losses: Sequence[float], path: Path) -> None:
    """Writes the loss of every step as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, lw=1.2, color="#2563eb")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(color="#d8dce1", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=160)
    pyplot.close(canvas)


def _open_tensorboard(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer; None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=purge_step)
