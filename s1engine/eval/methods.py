"""The ways of spending thinking that s1 compares, each an object with one method, ``answer``.

A sweep is a list of them. Most ask once for each question and differ in data only: what follows the
prompt, how it is sampled, how one answer is made of the samples (``SinglePass``); rejection
sampling asks again. A method may answer for several runs at once, for example where one pass yields
the answers at every budget. Knows no engine and no server (``backend``), no task and no file.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from s1engine.eval.backend import Backend, EvalRequest, EvalResponse, Sample
from s1engine.eval.grade import canonical, extract_answer, is_correct
from s1engine.eval.tasks import Question
from s1engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer that was chosen, and a sample that gave it."""

    extracted: str | None
    sample: Sample
    votes: int = 1
    """Samples that gave this answer, as far as they were compared."""


Chooser = Callable[[Question, Sequence[Sample]], Choice]


def first(question: Question, samples: Sequence[Sample]) -> Choice:
    """The first sample, whatever the others say."""
    return Choice(extract_answer(samples[0].text), samples[0])


def majority_vote(question: Question, samples: Sequence[Sample]) -> Choice:
    """The answer of most samples, a tie to the one seen first. Samples without an answer have no
    vote; where none has one, the first is taken."""
    camps: list[tuple[str, list[Sample]]] = []
    for sample in samples:
        answer = extract_answer(sample.text)
        if answer is None:
            continue
        for camp, members in camps:
            if is_correct(answer, camp, question.kind):
                members.append(sample)
                break
        else:
            camps.append((canonical(answer, question.kind), [sample]))
    if not camps:
        return first(question, samples)
    answer, members = max(camps, key=lambda camp: len(camp[1]))  # the first of equals
    return Choice(answer, members[0], votes=len(members))


def most_confident(question: Question, samples: Sequence[Sample]) -> Choice:
    """Of the samples that give an answer, the one whose tokens were likeliest on average."""
    answered = [(extract_answer(sample.text), sample) for sample in samples]
    candidates = [pair for pair in answered if pair[0] is not None] or answered
    answer, sample = max(candidates, key=lambda pair: _confidence(pair[1]))
    return Choice(answer, sample)


def _confidence(sample: Sample) -> float:
    return float("-inf") if sample.mean_logprob is None else sample.mean_logprob


TOKENS_PER_STEP = 100  # by which s1 turns steps into the thinking that was asked for
ONE_TRACE = "budget-forcing-checkpoints"  # the method whose runs are one pass
CUT_SHORT = ("budget", "deadline", "client", "loop", "length", "abort")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What tells one run from another. Fields that a method does not have keep their default."""

    method: str
    budget: int | None = None
    """Thinking tokens at most; None: unbounded."""
    num_waits: int = 0
    steps: int | None = None
    """Thinking steps that the prompt asks for."""
    length: str | None = None
    """``short`` or ``long``: the class of thinking that the prompt asks for."""
    samples: int = 1
    max_tries: int = 0
    """Samples drawn until one is accepted; 0: the first is taken."""

    @property
    def limit(self) -> int | None:
        """Thinking tokens that a question was allowed, over all samples that are its answer."""
        each = self.sample_limit
        return None if each is None else each * self.samples

    @property
    def sample_limit(self) -> int | None:
        """Thinking tokens that one sample was allowed or asked to use."""
        return self.budget if self.steps is None else TOKENS_PER_STEP * self.steps

    def to_json(self) -> dict[str, Any]:
        """Method, budget and waits always; anything else where it is set."""
        always = ("method", "budget", "num_waits")
        given = {field: getattr(self, field.name) for field in fields(self)}
        return {
            field.name: value
            for field, value in given.items()
            if field.name in always or value != field.default
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run made of one question."""

    settings: RunSettings
    question: Question
    choice: Choice | None
    """None: no sample was acceptable, or the question failed."""
    samples: tuple[Sample, ...]
    """Everything that was generated for it, in the order of generation."""
    seconds: float
    error: str | None = None
    tries: int = 1


class Method(Protocol):
    """One way of answering; see the module's docstring."""

    @property
    def settings(self) -> tuple[RunSettings, ...]:
        """The runs that this method answers for."""

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[Answer]:
        """An answer for each question and run, in the order in which they are ready. ``traces``:
        ids of the questions whose text is wanted in segments."""


@dataclass(frozen=True, slots=True)
class SinglePass:
    """Asks each question once, all at the same time."""

    run: RunSettings
    params: SamplingParams
    choose: Chooser
    suffix: str = ""
    """Stands after the question and a blank line."""

    @property
    def settings(self) -> tuple[RunSettings, ...]:
        return (self.run,)

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[Answer]:
        for key, question in enumerate(questions):
            backend.submit(self._request(key, question, question.id in traces))
        for response in backend.responses():
            question = questions[response.request.key]
            choice = None if response.error else self.choose(question, response.samples)
            yield Answer(
                self.run, question, choice, response.samples, response.seconds, error=response.error
            )

    def _request(self, key: int, question: Question, trace: bool) -> EvalRequest:
        prompt = f"{question.prompt}\n\n{self.suffix}" if self.suffix else question.prompt
        return EvalRequest(key, prompt, seeded(self.params, question), trace)


@dataclass(frozen=True, slots=True)
class CheckpointSweep:
    """Answers for a run at every budget from one trace a question: it thinks to the largest, and
    the engine forks an answer off at each smaller one. Answers are those of separate runs; their
    times are the one pass's.
    """

    runs: tuple[RunSettings, ...]
    """In the order asked; budgets differ, None is the largest."""
    params: SamplingParams
    choose: Chooser

    @property
    def settings(self) -> tuple[RunSettings, ...]:
        return self.runs

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[Answer]:
        for key, question in enumerate(questions):
            params = seeded(self.params, question)
            backend.submit(EvalRequest(key, question.prompt, params, question.id in traces))
        for response in backend.responses():
            found = dict(response.checkpoints)
            for run in self.runs:
                own = (found[run.budget],) if run.budget in found else ()
                samples = own if run.budget in self._checkpoints else response.samples
                yield self._answer(run, questions[response.request.key], samples, response)

    @property
    def _checkpoints(self) -> tuple[int, ...]:
        return self.params.thinking.checkpoints if self.params.thinking else ()

    def _answer(
        self,
        run: RunSettings,
        question: Question,
        samples: tuple[Sample, ...],
        response: EvalResponse,
    ) -> Answer:
        error = response.error or (None if samples else f"no answer at budget {run.budget}")
        choice = None if error else self.choose(question, samples)
        return Answer(run, question, choice, samples, response.seconds, error=error)


@dataclass(slots=True)
class _Tries:
    """A question that rejection sampling is at work on."""

    samples: list[Sample]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RejectionSampling:
    """Samples until an answer's own thinking stays under the budget, at most ``max_tries`` times;
    where none does, the question has no answer.

    Thinking that reaches the budget is cut there, since it is rejected however it would go on.
    """

    run: RunSettings
    params: SamplingParams

    @property
    def settings(self) -> tuple[RunSettings, ...]:
        return (self.run,)

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[Answer]:
        tries = [_Tries([]) for _ in questions]
        for key, question in enumerate(questions):
            backend.submit(self._request(key, question, 0, question.id in traces))
        for response in backend.responses():
            key = response.request.key
            so_far, question = tries[key], questions[key]
            so_far.samples += response.samples
            so_far.seconds += response.seconds
            accepted = response.error is None and self._accepts(response.samples[0])
            if accepted or response.error or len(so_far.samples) == self.run.max_tries:
                yield self._answer(question, so_far, response, accepted)
            else:
                backend.submit(
                    self._request(key, question, len(so_far.samples), response.request.trace)
                )

    def _request(self, key: int, question: Question, attempt: int, trace: bool) -> EvalRequest:
        return EvalRequest(key, question.prompt, seeded(self.params, question, attempt), trace)

    def _accepts(self, sample: Sample) -> bool:
        within = self.run.budget is None or sample.thinking_tokens < self.run.budget
        return within and sample.end_reason not in CUT_SHORT

    def _answer(
        self, question: Question, tries: _Tries, response: EvalResponse, accepted: bool
    ) -> Answer:
        last = tries.samples[-1] if tries.samples else None
        choice = Choice(extract_answer(last.text), last) if accepted and last else None
        return Answer(
            self.run,
            question,
            choice,
            tuple(tries.samples),
            tries.seconds,
            error=response.error,
            tries=max(len(tries.samples), 1),
        )


def seeded(params: SamplingParams, question: Question, attempt: int = 0) -> SamplingParams:
    """``params`` with a seed that depends on the question and the attempt, not on their order; the
    samples of one ask differ by their index."""
    name = f"{params.seed}/{question.id}/{attempt}".encode()
    return replace(params, seed=int.from_bytes(hashlib.sha256(name).digest()[:4], "little"))
