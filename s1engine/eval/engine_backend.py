"""Answers from the engine in this process, all requests in one continuous batch."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from s1engine.engine.engine_thread import MailQueue, Submission
from s1engine.engine.llm import LLM, abort
from s1engine.errors import RequestError, RequestFailedError
from s1engine.eval.backend import EvalRequest, EvalResponse, EvalSample, Segment
from s1engine.outputs import CompletionOutput, RequestOutput


class EngineBackend:
    """A ``Backend`` over one LLM. Submitted requests start together, with the next response that is
    read."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._mail = MailQueue()
        self._submitted: list[Submission] = []  # not started
        self._live: set[Submission] = set()
        self._refused: list[EvalResponse] = []

    @property
    def name(self) -> str:
        return self._llm.config.model_name

    @property
    def max_thinking(self) -> int | None:
        return self._llm.engine.max_model_len

    @property
    def can_think(self) -> bool:
        return self._llm.engine.format is not None

    @property
    def generated_tokens(self) -> int:
        return self._llm.stats().num_sampled_tokens

    def submit(self, request: EvalRequest) -> None:
        messages = [{"role": "user", "content": request.prompt}]
        try:
            engine_request = self._llm.make_request(messages, request.params)
        except RequestError as error:
            self._refused.append(EvalResponse(request, (), 0.0, str(error)))
            return
        self._submitted.append(Submission(engine_request, self._mail.put, request))

    def responses(self) -> Iterator[EvalResponse]:
        try:
            while self._live or self._refused or self._submitted:
                while self._refused:
                    yield self._refused.pop(0)
                self._start_submitted()
                for submission, event in self._mail.receive() if self._live else ():
                    self._live.discard(submission)
                    if isinstance(event, RequestOutput):
                        yield self._response(submission.reader, event)
                    elif isinstance(event, RequestFailedError):
                        yield EvalResponse(submission.reader, (), 0.0, str(event))
                    elif isinstance(event, Exception):
                        raise event
        finally:  # an interrupt must leave no sequences
            self._submitted.clear()
            self._refused.clear()
            abort(self._llm.thread, [*self._live])
            self._live.clear()

    def _start_submitted(self) -> None:
        submitted, self._submitted = self._submitted, []
        self._live.update(submitted)
        self._llm.thread.submit(submitted)

    def _response(self, request: EvalRequest, output: RequestOutput) -> EvalResponse:
        samples = tuple(self._sample(request, sample) for sample in output.outputs)
        checkpoints = tuple(
            (checkpoint.budget, self._sample(request, checkpoint.output))
            for checkpoint in output.checkpoints
            if checkpoint.output.index == 0
        )
        return EvalResponse(request, samples, output.timing.total_s, checkpoints=checkpoints)

    def _sample(self, request: EvalRequest, output: CompletionOutput) -> EvalSample:
        thinking = output.thinking
        return EvalSample(
            text=output.text,
            thinking_tokens=thinking.tokens if thinking else 0,
            output_tokens=len(output.token_ids),
            forced_tokens=sum(output.forced),
            waits_used=thinking.waits_used if thinking else 0,
            end_reason=thinking.end_reason if thinking else None,
            finish_reason=output.finish_reason,
            mean_logprob=_mean_logprob(output),
            segments=self._segments(output) if request.trace else (),
        )

    def _segments(self, output: CompletionOutput) -> tuple[Segment, ...]:
        """The tokens as text, in segments that are sampled or injected."""
        decode = self._llm.compiler.text.tokenizer.decode
        pairs = zip(output.token_ids, output.forced, strict=True)
        return tuple(
            (decode([token for token, _ in run], skip_special_tokens=False), bool(forced))
            for forced, run in groupby(pairs, key=lambda pair: pair[1])
        )


def _mean_logprob(output: CompletionOutput) -> float | None:
    if output.logprobs is None:
        return None
    sampled: Sequence[float] = [token.logprob for token in output.logprobs if not token.forced]
    return sum(sampled) / len(sampled) if sampled else 0.0
