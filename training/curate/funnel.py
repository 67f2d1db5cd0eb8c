"""A funnel: the candidates, and what each stage dropped and why, as counts, manifest and figure.

Does not know what a stage examines. The manifest holds every candidate once: kept, or with the
stage and reason that dropped it.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.training.rows import Json, TrainingRow, write_jsonl

RejectReason = Callable[["Candidate"], str | None]
"""Why a candidate is dropped; None keeps it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A question in the funnel."""

    id: str
    """First 16 hexadecimal digits of the question's SHA-256."""
    source: str
    row: TrainingRow
    facts: dict[str, Any] = field(default_factory=dict)
    """Results of stages, written to the manifest."""


@dataclass(slots=True)
class Funnel:
    """Candidates in order, and the dropped ones."""

    candidates: list[Candidate]
    counts: list[tuple[str, int]] = field(default_factory=list)
    """Stage and number of candidates after it."""
    dropped: list[tuple[Candidate, str, str]] = field(default_factory=list)
    """With stage and reason."""
    verbose: bool = True

    def __post_init__(self) -> None:
        self._record_count("questions")

    def apply_stage(self, name: str, reject_reason: RejectReason) -> None:
        """Drops every candidate with a reason."""
        kept = []
        for candidate in self.candidates:
            reason = reject_reason(candidate)
            if reason is None:
                kept.append(candidate)
            else:
                self.dropped.append((candidate, name, reason))
        self.candidates = kept
        self._record_count(name)

    def _record_count(self, name: str) -> None:
        self.counts.append((name, len(self.candidates)))
        if self.verbose:
            print(f"{name:<24}{len(self.candidates):>8,}", file=sys.stderr)

    def manifest(self) -> Iterable[Json]:
        """One object per candidate: the dropped ones by stage, then the kept ones."""
        for candidate, stage, reason in self.dropped:
            yield _manifest_entry(candidate, {"kept": False, "stage": stage, "reason": reason})
        for candidate in self.candidates:
            yield _manifest_entry(candidate, {"kept": True})

    def save(self, folder: Path) -> None:
        """Writes manifest.jsonl, counts.json and funnel.png."""
        write_jsonl(folder / "manifest.jsonl", list(self.manifest()))
        (folder / "counts.json").write_text(json.dumps(dict(self.counts), indent=1) + "\n")
        plot_counts(self.counts, folder / "funnel.png")


def _manifest_entry(candidate: Candidate, outcome: Mapping[str, Any]) -> Json:
    return {"id": candidate.id, "source": candidate.source, **outcome, **candidate.facts}


def plot_counts(counts: list[tuple[str, int]], path: Path) -> None:
    """Writes a bar for each stage as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 0.6 + 0.42 * len(counts)), layout="constrained")
    names = [name for name, _ in counts]
    bars = axes.barh(names, [count for _, count in counts], color="#2563eb")
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(1, *(count for _, count in counts)))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    canvas.savefig(path, dpi=160)
    pyplot.close(canvas)
