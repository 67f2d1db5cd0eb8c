"""What a run shows and keeps of itself: a progress bar, log.jsonl, TensorBoard, and a loss plot.

Only the first rank has one. A run that goes on cuts its log back to the checkpoint it starts from,
so the log is that of one unbroken run.
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

from s1engine.training import rows

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
    """Most memory held so far: of the first GPU, or of this process."""


class Telemetry:
    """Open for the length of a run; ``add`` a record after each step."""

    def __init__(self, folder: Path, *, start: int, steps: int, progress: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        path = folder / LOG
        kept = [row for row in _read(path) if row["step"] <= start]
        rows.write_jsonl(path, kept)
        self._log = path.open("a", encoding="utf-8")
        self._board = _board(folder, purge_step=start + 1)
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not progress)

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
            plot([row["loss"] for row in _read(self._folder / LOG)], self._folder / PLOT)

    def add(self, record: StepRecord) -> None:
        """Shows and writes a step, at once."""
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

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)


def memory_gb(device: torch.device) -> float:
    """Peak so far, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def plot(losses: Sequence[float], path: Path) -> None:
    """The loss of every step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, lw=1.2, color="#2563eb")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.grid(color="#d8dce1", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=160)
    pyplot.close(canvas)


def _read(path: Path) -> list[rows.Json]:
    """Records of a log; a last line that was cut short is none."""
    found: list[rows.Json] = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _board(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=purge_step)
