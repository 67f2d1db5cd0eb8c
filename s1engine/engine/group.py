"""A live request inside the engine: its samples and the children at their checkpoints.

Knows which sequences belong together and when all of them are done; knows neither scheduler nor
model nor text.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from s1engine import _core
from s1engine.engine.assembly import Assembly
from s1engine.engine.guide import Guide
from s1engine.engine.request import Request


@dataclass(slots=True, eq=False)
class Sample:
    """A sequence of a request in the scheduler, or the child of one at a checkpoint."""

    group: "Group"
    sequence: int
    seed: int
    begun: bool = False  # has it a token?
    finished: bool = False
    answers: bool = False  # does it think no more?
    guide: Guide | None = None


@dataclass(slots=True, eq=False)
class Group:
    """A live request."""

    request: Request
    seed: int
    reader: Assembly | None = None  # makes its text, where somebody in this process wants it
    guide: "Future[Guide] | None" = None  # what each answer begins with
    limit: tuple[int, _core.EndReason] | None = None  # lowered maximum of the thinking, and why
    samples: list[Sample] = field(default_factory=list)
    children: list[Sample] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Have all samples been started?"""
        return len(self.samples) == self.request.params.n

    @property
    def finished(self) -> bool:
        """Is everything done, children included?"""
        return self.complete and all(sample.finished for sample in self.all_samples())

    def all_samples(self) -> Iterator[Sample]:
        """Samples and their children."""
        yield from self.samples
        yield from self.children


def sample_seed(seed: int, index: int) -> int:
    """Key of the noise of sample ``index``: the seed itself for the first, a hash for others.

    Returned as a signed 64-bit integer, the form in which tensors hold it."""
    if index == 0:
        key = seed % 2**64
    else:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
    return key - 2**64 if key >= 2**63 else key
