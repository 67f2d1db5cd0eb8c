"""A live request inside the engine: its samples, the children at their checkpoints, its clock.

Knows which sequences belong together and when all of them are done; knows neither scheduler nor
model.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from s1engine import _core
from s1engine.engine.request import Request
from s1engine.engine.sample_stream import SampleStream
from s1engine.outputs import CheckpointOutput, Timing, Usage

# Ends of thinking that a run with a larger budget comes to as well.
OWN_ENDS = ("natural", "budget", "loop")


@dataclass(slots=True, eq=False)
class Sample:
    """A sequence of a request in the scheduler, or the child of one at a checkpoint."""

    group: "Group"
    sequence: int
    stream: SampleStream
    seed: int
    budget: int | None = None  # of a child; None: a sample that the user asked for
    awaited: dict[int, int] = field(default_factory=dict)  # child to come -> its budget
    children: list["Sample"] = field(default_factory=list)  # by rising budget

    @property
    def finished(self) -> bool:
        """Is it done, children aside?"""
        return self.stream.finish_reason is not None

    def checkpoints(self) -> list[CheckpointOutput]:
        """Answers of finished children; and, where the thinking ended by itself before a budget,
        the sample's own answer."""
        found = [
            CheckpointOutput(child.budget, child.stream.output())
            for child in self.children
            if child.finished and child.budget is not None
        ]
        return found + self.shared_checkpoints()

    def shared_checkpoints(self) -> list[CheckpointOutput]:
        """The part of ``checkpoints`` that is the sample's own answer."""
        if not self.finished or not self.awaited:
            return []
        own = self.stream.output()
        if own.thinking is None or own.thinking.end_reason not in OWN_ENDS:
            return []
        return [CheckpointOutput(budget, own, shared=True) for budget in self.awaited.values()]

    def agrees(self, times: int) -> bool:
        """Did the latest ``times`` checkpoints, all before them finished, give one answer?"""
        texts = []
        for child in self.children:
            if not child.finished:
                break
            texts.append(" ".join(child.stream.output().text.split()))
        return len(texts) >= times and len(set(texts[-times:])) == 1


@dataclass(slots=True, eq=False)
class Group:
    """A live request: its samples, and what is known of its time (monotonic, s)."""

    request: Request
    seed: int
    limit: _core.EndReason | None = None  # thinking was told to end, and why
    samples: list[Sample] = field(default_factory=list)
    cached_tokens: int | None = None
    scheduled_at: float | None = None
    first_token_at: float | None = None

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
        for sample in self.samples:
            yield sample
            yield from sample.children

    def usage(self) -> Usage:
        """Tokens of the samples; those of children apart, without what they share."""
        outputs = [sample.stream.output() for sample in self.samples]
        children = [c.stream.output() for s in self.samples for c in s.children]
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=sum(len(output.token_ids) for output in outputs),
            cached_tokens=self.cached_tokens or 0,
            reasoning_tokens=sum(o.thinking.tokens for o in outputs if o.thinking),
            checkpoint_tokens=sum(
                len(o.token_ids) - o.thinking.tokens for o in children if o.thinking
            ),
        )

    def timing(self, now: float) -> Timing:
        """Seconds since the request arrived."""
        arrival = self.request.arrival
        return Timing(
            queue_s=(self.scheduled_at or now) - arrival,
            ttft_s=(self.first_token_at or now) - arrival,
            total_s=now - arrival,
        )


def sample_seed(seed: int, index: int) -> int:
    """Key of the noise of sample ``index``: the seed itself for the first, a hash for others.

    Returned as a signed 64-bit integer, the form in which tensors hold it."""
    if index == 0:
        key = seed % 2**64
    else:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
    return key - 2**64 if key >= 2**63 else key
