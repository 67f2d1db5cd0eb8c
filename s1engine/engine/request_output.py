"""One request's tokens, made into what its user gets: chunks, checkpoints, the finished output.

Reads the records of steps in order, in whatever process the text is wanted; decides nothing about
sequences. Several records of one sequence may come as one.
"""

from collections.abc import Iterable

from s1engine.engine.core_output import EngineCoreOutput, branch_number, sample_index
from s1engine.engine.request import Request
from s1engine.engine.sequence_output import SequenceOutput
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput, Timing, Usage
from s1engine.tokenizer import Tokenizer

StreamEvent = Chunk | CheckpointOutput | RequestOutput

# Ends of thinking that a run with a larger budget comes to as well.
OWN_ENDS = ("natural", "budget", "loop")


class RequestOutputBuilder:
    """The text side of a live request. Times are monotonic, in seconds."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self._tokenizer = tokenizer
        self._samples: dict[int, SequenceOutput] = {}  # by sequence
        self._children: dict[int, SequenceOutput] = {}  # by sequence
        self._cached_tokens: int | None = None
        self._scheduled_at: float | None = None
        self._first_token_at: float | None = None

    def record_scheduled(self, now: float) -> None:
        """A sequence of the request was scheduled."""
        self._scheduled_at = self._scheduled_at or now

    def record_first_token(self, now: float) -> None:
        """A record came, which may be read later."""
        self._first_token_at = self._first_token_at or now

    def add_branch(self, child: int) -> None:
        """A checkpoint was reached, so an answer of ``child`` will come."""
        self._children[child] = self._stream(child)

    def add(self, progress: EngineCoreOutput, now: float) -> list[StreamEvent]:
        """What a record brings: chunks and checkpoints if the request streams, then the output."""
        stream = self.sequence_output(progress.seq_id)
        if stream.finish_reason is not None:
            return []  # past a stop string, before the engine knew
        if self._cached_tokens is None:
            self._cached_tokens = progress.num_cached
        self.record_first_token(now)
        chunk = stream.append(progress)
        child = branch_number(progress.seq_id)
        events: list[StreamEvent] = []
        if self.request.stream and not child:
            events.append(chunk)
        if stream.finish_reason is None:
            return events
        if self.request.stream:
            events += self._checkpoints_of(progress.seq_id)
        if self.finished:
            events.append(self.build(now))
        return events

    def sequence_output(self, sequence: int) -> SequenceOutput:
        """The text of one sequence; a sample begins with its first record."""
        if branch_number(sequence):
            return self._children[sequence]
        if sequence not in self._samples:
            self._samples[sequence] = self._stream(sequence)
        return self._samples[sequence]

    def _stream(self, sequence: int) -> SequenceOutput:
        """Log-probabilities are of tokens that a sequence sampled itself, so children have none."""
        return SequenceOutput(
            sample_index(sequence),
            self.request.params,
            self._tokenizer,
            thinks=self.request.budget is not None,
            logprobs=self.request.params.logprobs is not None and not branch_number(sequence),
        )

    @property
    def finished(self) -> bool:
        """Is everything done, children included?"""
        streams = (*self._samples.values(), *self._children.values())
        complete = len(self._samples) == self.request.params.n
        return complete and all(stream.finish_reason is not None for stream in streams)

    def checkpoints_agree(self, sequence: int, times: int) -> bool:
        """Did the latest ``times`` checkpoints of a sequence's sample, all before them finished,
        give one answer?"""
        texts = []
        for _, child in self._children_of(sequence):
            if child.finish_reason is None:
                break
            texts.append(" ".join(child.build().text.split()))
        return len(texts) >= times and len(set(texts[-times:])) == 1

    def build(self, now: float) -> RequestOutput:
        """The finished request."""
        request = self.request
        samples = _ordered(self._samples)
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt.tolist(),
            outputs=[stream.build() for _, stream in samples],
            usage=self._usage(),
            timing=self._timing(now),
            checkpoints=[c for sequence, _ in samples for c in self._all_checkpoints(sequence)],
        )

    # --- checkpoints ---

    def _children_of(self, sequence: int) -> Iterable[tuple[int, SequenceOutput]]:
        """Budgets and children of a sequence's sample, by rising budget."""
        index = sample_index(sequence)
        for child, stream in _ordered(self._children):
            if sample_index(child) == index:
                yield self._budget(child), stream

    def _budget(self, child: int) -> int:
        assert self.request.budget is not None
        return self.request.budget.checkpoints[branch_number(child) - 1]

    def _checkpoints_of(self, sequence: int) -> list[CheckpointOutput]:
        """Those that the end of this sequence answers."""
        if branch_number(sequence):
            return [CheckpointOutput(self._budget(sequence), self._children[sequence].build())]
        return self._shared(sequence)

    def _all_checkpoints(self, sequence: int) -> list[CheckpointOutput]:
        own = [
            CheckpointOutput(budget, stream.build())
            for budget, stream in self._children_of(sequence)
            if stream.finish_reason is not None
        ]
        return own + self._shared(sequence)

    def _shared(self, sequence: int) -> list[CheckpointOutput]:
        """Checkpoints that are a sample's own answer: its thinking ended by itself before them."""
        plan, own = self.request.budget, self._samples[sequence].build()
        if plan is None or own.thinking is None or own.thinking.end_reason not in OWN_ENDS:
            return []
        forked = {budget for budget, _ in self._children_of(sequence)}
        later = [budget for budget in plan.checkpoints if budget not in forked]
        return [CheckpointOutput(budget, own, shared=True) for budget in later]

    # --- accounts ---

    def _usage(self) -> Usage:
        """Tokens of the samples; those of children apart, without what they share."""
        outputs = [stream.build() for stream in self._samples.values()]
        children = [stream.build() for stream in self._children.values()]
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=sum(len(output.token_ids) for output in outputs),
            cached_tokens=self._cached_tokens or 0,
            reasoning_tokens=sum(o.thinking.tokens for o in outputs if o.thinking),
            checkpoint_tokens=sum(
                len(o.token_ids) - o.thinking.tokens for o in children if o.thinking
            ),
        )

    def _timing(self, now: float) -> Timing:
        arrival = self.request.arrival
        return Timing(
            queue_s=(self._scheduled_at or now) - arrival,
            ttft_s=(self._first_token_at or now) - arrival,
            total_s=now - arrival,
        )


def _ordered(streams: dict[int, SequenceOutput]) -> list[tuple[int, SequenceOutput]]:
    return sorted(streams.items())
