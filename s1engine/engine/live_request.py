"""A live request inside the engine: its samples and the children at their checkpoints.

Knows which sequences belong together and when all of them are done; knows neither scheduler nor
model nor text.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from s1engine import _core
from s1engine.engine.grammar import GrammarMatcher
from s1engine.engine.request import Request
from s1engine.engine.request_output import RequestOutputBuilder


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence of a request in the scheduler, or the child of one at a checkpoint."""

    live_request: "LiveRequest"
    seq_id: int
    seed: int
    has_output: bool = False  # has it a token?
    finished: bool = False
    answering: bool = False  # does it think no more?
    matcher: GrammarMatcher | None = None


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A live request."""

    request: Request
    seed: int
    output_builder: RequestOutputBuilder | None = None  # None: built in another process
    matcher: "Future[GrammarMatcher] | None" = None  # what each answer begins with
    thinking_limit: tuple[int, _core.EndReason] | None = None  # lowered maximum, reason
    samples: list[LiveSequence] = field(default_factory=list)
    branches: list[LiveSequence] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Have all samples been started?"""
        return len(self.samples) == self.request.params.n

    @property
    def finished(self) -> bool:
        """Is everything done, children included?"""
        return self.complete and all(sample.finished for sample in self.all_sequences())

    def all_sequences(self) -> Iterator[LiveSequence]:
        """Samples and their children."""
        yield from self.samples
        yield from self.branches


def sample_seed(seed: int, index: int) -> int:
    """Key of the noise of sample ``index``: the seed itself for the first, a hash for others.

    Returned as a signed 64-bit integer, the form in which tensors hold it."""
    if index == 0:
        key = seed % 2**64
    else:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
    return key - 2**64 if key >= 2**63 else key
