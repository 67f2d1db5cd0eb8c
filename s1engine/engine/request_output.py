"""The output of one request, built from core outputs in the process that wants its text.

Reads the records of all its sequences in order: samples, and the branches at their checkpoints.
Decides nothing about sequences. Records of one sequence may arrive joined.
"""

import logging
from dataclasses import replace

from s1engine.engine.core_output import EngineCoreOutput, branch_number, sample_index
from s1engine.engine.request import Request
from s1engine.engine.sequence_output import SequenceOutput
from s1engine.outputs import (
    CheckpointOutput,
    Chunk,
    CompletionOutput,
    RequestOutput,
    Timing,
    Usage,
)
from s1engine.prompt_logprobs import PromptLogprobs, PromptLogprobsPart
from s1engine.tokenizer import Tokenizer

StreamEvent = Chunk | CheckpointOutput | RequestOutput

# Ends of thinking that a request with a larger budget reaches as well.
BUDGET_INDEPENDENT_ENDS = ("natural", "budget", "loop")

logger = logging.getLogger(__name__)


class RequestOutputBuilder:
    """``add`` each record until it returns the RequestOutput. Times are monotonic, in seconds."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self._tokenizer = tokenizer
        self._sequences: dict[int, SequenceOutput] = {}  # samples and branches by sequence id
        self._prompt_parts: dict[int, PromptLogprobsPart] = {}  # by position, in order
        self._prompt_logprobs: PromptLogprobs | None = None
        self._begun: set[int] = set()  # sequences that have a chunk
        self._cached_tokens: int | None = None
        self._scheduled_at: float | None = None
        self._first_token_at: float | None = None

    def record_scheduled(self, now: float) -> None:
        """Records when a sequence of the request entered the batch; the first time counts."""
        if self._scheduled_at is None:
            self._scheduled_at = now
            if logger.isEnabledFor(logging.DEBUG):
                waited = now - self.request.arrival
                logger.debug("request %s scheduled after %.3f s", self.request.request_id, waited)

    def record_first_token(self, now: float) -> None:
        """Records when a record arrived; the first time counts."""
        if self._first_token_at is None:
            self._first_token_at = now
            if logger.isEnabledFor(logging.DEBUG):
                waited = now - self.request.arrival
                logger.debug("request %s has a token after %.3f s", self.request.request_id, waited)

    def sequence_output(self, seq_id: int) -> SequenceOutput:
        """The output of one sequence, created if it is new. A branch must be created before its
        sample finishes, or the request would seem to be finished."""
        if seq_id not in self._sequences:
            params, is_sample = self.request.params, not branch_number(seq_id)
            self._sequences[seq_id] = SequenceOutput(
                sample_index(seq_id),
                params,
                self._tokenizer,
                thinks=self.request.budget is not None,
                # Of tokens that a sequence sampled itself; a branch shares those of its sample.
                logprobs=params.logprobs is not None and is_sample,
                end_markers=self.request.budget.end_markers if self.request.budget else (),
                hidden=self.request.markers,
            )
        return self._sequences[seq_id]

    def add(self, output: EngineCoreOutput, now: float) -> list[StreamEvent]:
        """Adds a record. Returns chunks and checkpoints if the request streams, at the end the
        RequestOutput."""
        sequence = self.sequence_output(output.seq_id)
        if sequence.finish_reason is not None:
            return []  # generated past a stop string, before the engine stopped the sequence
        if self._cached_tokens is None:
            self._cached_tokens = output.num_cached
        self.record_first_token(now)
        chunk = sequence.append(output)
        events: list[StreamEvent] = []
        is_news = bool(output.token_ids) or sequence.finish_reason is not None
        if self.request.stream and is_news and not branch_number(output.seq_id):
            events.append(self._with_prompt(output.seq_id, chunk))
        if sequence.finish_reason is None:
            return events
        if self.request.stream:
            events += self._checkpoints_of(output.seq_id, sequence.build())
        if self._finished:
            events.append(self.build(now))
        return events

    def add_prompt_logprobs(self, part: PromptLogprobsPart) -> None:
        """Adds log-probabilities of prompt tokens; a part may come again after an interruption."""
        self._prompt_parts[part.first] = part

    def _with_prompt(self, seq_id: int, chunk: Chunk) -> Chunk:
        """The chunk; the first one of a sample with the prompt's log-probabilities."""
        if seq_id in self._begun:
            return chunk
        self._begun.add(seq_id)
        return replace(chunk, prompt_logprobs=self.prompt_logprobs())

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of the whole prompt, or of what was computed of it; None if not asked for."""
        if self.request.params.prompt_logprobs is None:
            return None
        if self._prompt_logprobs is None:
            given = self.request.prompt[: self.request.num_given].tolist()
            self._prompt_logprobs = PromptLogprobs(given, self._prompt_parts.values())
        return self._prompt_logprobs

    @property
    def _finished(self) -> bool:
        num_samples = sum(not branch_number(seq_id) for seq_id in self._sequences)
        return num_samples == self.request.params.n and all(
            sequence.finish_reason is not None for sequence in self._sequences.values()
        )

    def checkpoints_agree(self, seq_id: int, times: int) -> bool:
        """True if the latest ``times`` checkpoints of a sequence's sample gave one answer. Only
        those count before which all are finished."""
        texts = []
        for branch in self._branches_of(seq_id):
            sequence = self._sequences[branch]
            if sequence.finish_reason is None:
                break
            texts.append(" ".join(sequence.build().text.split()))
        return len(texts) >= times and len(set(texts[-times:])) == 1

    def build(self, now: float) -> RequestOutput:
        """The finished request."""
        outputs = {seq_id: self._sequences[seq_id].build() for seq_id in sorted(self._sequences)}
        samples = {i: output for i, output in outputs.items() if not branch_number(i)}
        checkpoints: list[CheckpointOutput] = []
        for seq_id, sample in samples.items():
            for branch in self._branches_of(seq_id):
                checkpoints += self._checkpoints_of(branch, outputs[branch])
            checkpoints += self._checkpoints_of(seq_id, sample)
        result = RequestOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt.tolist(),
            outputs=list(samples.values()),
            usage=self._usage(outputs),
            timing=self._timing(now),
            checkpoints=checkpoints,
            prompt_logprobs=self.prompt_logprobs(),
        )
        if logger.isEnabledFor(logging.DEBUG):
            reasons = ", ".join(output.finish_reason for output in result.outputs)
            tokens, seconds = result.usage.completion_tokens, result.timing.total_s
            logger.debug(
                "request %s finished (%s): %d tokens in %.3f s",
                result.request_id,
                reasons,
                tokens,
                seconds,
            )
        return result

    # --- checkpoints ---

    def _branches_of(self, seq_id: int) -> list[int]:
        """Branches of a sequence's sample, by rising budget."""
        index = sample_index(seq_id)
        return sorted(i for i in self._sequences if branch_number(i) and sample_index(i) == index)

    def _budget_at(self, branch: int) -> int:
        assert self.request.budget is not None
        return self.request.budget.checkpoints[branch_number(branch) - 1]

    def _checkpoints_of(self, seq_id: int, output: CompletionOutput) -> list[CheckpointOutput]:
        """Checkpoints that a finished sequence answers: for a branch its own; for a sample those
        that it never reached, because its thinking ended before them and would have anyway."""
        if branch_number(seq_id):
            return [CheckpointOutput(self._budget_at(seq_id), output)]
        budget, thinking = self.request.budget, output.thinking
        if budget is None or thinking is None or thinking.end_reason not in BUDGET_INDEPENDENT_ENDS:
            return []
        reached = {self._budget_at(branch) for branch in self._branches_of(seq_id)}
        return [
            CheckpointOutput(checkpoint, output, shared=True)
            for checkpoint in budget.checkpoints
            if checkpoint not in reached
        ]

    # --- accounts ---

    def _usage(self, outputs: dict[int, CompletionOutput]) -> Usage:
        """Token counts over all samples. Answers of branches count apart, without the thinking that
        they share."""
        samples = [output for seq_id, output in outputs.items() if not branch_number(seq_id)]
        branches = [output for seq_id, output in outputs.items() if branch_number(seq_id)]
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=sum(len(output.token_ids) for output in samples),
            cached_tokens=self._cached_tokens or 0,
            reasoning_tokens=sum(
                o.thinking.tokens if o.thinking else o.self_opened_tokens for o in samples
            ),
            checkpoint_tokens=sum(
                len(o.token_ids) - o.thinking.tokens for o in branches if o.thinking
            ),
        )

    def _timing(self, now: float) -> Timing:
        arrival = self.request.arrival
        return Timing(
            queue_s=(self._scheduled_at or now) - arrival,
            ttft_s=(self._first_token_at or now) - arrival,
            total_s=now - arrival,
        )
