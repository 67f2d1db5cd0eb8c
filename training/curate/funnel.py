"""A funnel: candidates, what each stage dropped and why, as counts, a manifest and a figure.

Knows nothing of what stages look at. Every candidate that ever entered stands in the manifest once,
with the stage and reason that dropped it, or as kept.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1engine.training import rows

Verdict = Callable[["Candidate"], str | None]
"""Why a candidate is dropped; None keeps it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A question on its way through."""

    id: str
    """First 16 hexadecimal digits of the question's SHA-256."""
    source: str
    row: rows.Row
    facts: dict[str, Any] = field(default_factory=dict)
    """What stages found out; goes to the manifest."""


@dataclass(slots=True)
class Funnel:
    """Candidates in order, and the history of those that are gone."""

    candidates: list[Candidate]
    counts: list[tuple[str, int]] = field(default_factory=list)
    """Stage and how many it left."""
    dropped: list[tuple[Candidate, str, str]] = field(default_factory=list)
    """With stage and reason."""
    verbose: bool = True

    def __post_init__(self) -> None:
        self._count("questions")

    def stage(self, name: str, verdict: Verdict) -> None:
        """Drops every candidate that ``verdict`` has a reason against."""
        kept = []
        for candidate in self.candidates:
            reason = verdict(candidate)
            if reason is None:
                kept.append(candidate)
            else:
                self.dropped.append((candidate, name, reason))
        self.candidates = kept
        self._count(name)

    def _count(self, name: str) -> None:
        self.counts.append((name, len(self.candidates)))
        if self.verbose:
            print(f"{name:<24}{len(self.candidates):>8,}", file=sys.stderr)

    def manifest(self) -> Iterable[rows.Json]:
        """One object a candidate: the dropped ones by stage, then those that were kept."""
        for candidate, stage, reason in self.dropped:
            yield _entry(candidate, {"kept": False, "stage": stage, "reason": reason})
        for candidate in self.candidates:
            yield _entry(candidate, {"kept": True})

    def save(self, folder: Path) -> None:
        """Writes manifest.jsonl, counts.json and funnel.png."""
        rows.write_jsonl(folder / "manifest.jsonl", list(self.manifest()))
        (folder / "counts.json").write_text(json.dumps(dict(self.counts), indent=1) + "\n")
        draw(self.counts, folder / "funnel.png")


def _entry(candidate: Candidate, fate: Mapping[str, Any]) -> rows.Json:
    return {"id": candidate.id, "source": candidate.source, **fate, **candidate.facts}


def draw(counts: list[tuple[str, int]], path: Path) -> None:
    """Bars of what each stage left."""
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
