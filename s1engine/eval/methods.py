"""The ways of spending thinking that s1 compares, each an object with one method, ``answer``.

A sweep is a list of methods. Most ask each question once (``SinglePass``) and differ in data only:
the suffix of the prompt, the sampling, the rule that chooses one answer of the samples. Rejection
sampling asks again. A method may answer for several runs, if one pass yields the answers at several
budgets. Knows no engine and no server (see ``backend``), no files.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from s1engine.eval.backend import Backend, EvalRequest, EvalResponse, EvalSample
from s1engine.eval.grade import canonical, extract_answer, is_correct
from s1engine.eval.tasks import Question
from s1engine.sampling_params import SamplingParams

TOKENS_PER_STEP = 100  # s1's limit of thinking tokens for each step that a prompt asks for
ONE_TRACE = "budget-forcing-checkpoints"  # the method whose runs share one pass
CUT_SHORT = ("budget", "deadline", "client", "loop", "length", "abort")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of one run. Fields that a method does not use keep their default."""

    method: str
    budget: int | None = None
    """Maximum of thinking tokens; None: unbounded."""
    num_waits: int = 0
    steps: int | None = None
    """Thinking steps that the prompt asks for."""
    length: str | None = None
    """``short`` or ``long``: the class of thinking that the prompt asks for."""
    samples: int = 1
    max_tries: int = 0
    """Maximum of samples until one is accepted; 0: the first is accepted."""

    @property
    def limit(self) -> int | None:
        """Maximum of thinking tokens for a question, over all samples of its answer."""
        return None if self.sample_limit is None else self.sample_limit * self.samples

    @property
    def sample_limit(self) -> int | None:
        """Maximum of thinking tokens for one sample, enforced or only asked for."""
        return self.budget if self.steps is None else TOKENS_PER_STEP * self.steps

    def to_json(self) -> dict[str, Any]:
        """Method, budget and waits always; other fields if they are set."""
        always = ("method", "budget", "num_waits")
        values = {field: getattr(self, field.name) for field in fields(self)}
        return {
            field.name: value
            for field, value in values.items()
            if field.name in always or value != field.default
        }


# --- from the samples of a question to one answer ---


@dataclass(frozen=True, slots=True)
class ChosenAnswer:
    """The chosen answer, and a sample that gave it."""

    extracted: str | None
    sample: EvalSample
    votes: int = 1
    """Samples with this answer, where answers are compared."""


Chooser = Callable[[Question, Sequence[EvalSample]], ChosenAnswer]


def first_sample(question: Question, samples: Sequence[EvalSample]) -> ChosenAnswer:
    """The first sample's answer."""
    return ChosenAnswer(extract_answer(samples[0].text), samples[0])


def majority_vote(question: Question, samples: Sequence[EvalSample]) -> ChosenAnswer:
    """The answer of most samples, of equals the one that came first. Samples without an answer do
    not vote; if none has one, the first sample is chosen."""
    groups: list[tuple[str, list[EvalSample]]] = []
    for sample in samples:
        answer = extract_answer(sample.text)
        if answer is None:
            continue
        for representative, members in groups:
            if is_correct(answer, representative, question.kind):
                members.append(sample)
                break
        else:
            groups.append((canonical(answer, question.kind), [sample]))
    if not groups:
        return first_sample(question, samples)
    answer, members = max(groups, key=lambda group: len(group[1]))  # the first of equals
    return ChosenAnswer(answer, members[0], votes=len(members))


def most_confident(question: Question, samples: Sequence[EvalSample]) -> ChosenAnswer:
    """Of the samples with an answer, the one with the highest mean log-probability."""
    answered = [(extract_answer(sample.text), sample) for sample in samples]
    candidates = [pair for pair in answered if pair[0] is not None] or answered
    answer, sample = max(candidates, key=lambda pair: _confidence(pair[1]))
    return ChosenAnswer(answer, sample)


def _confidence(sample: EvalSample) -> float:
    return float("-inf") if sample.mean_logprob is None else sample.mean_logprob


# --- methods ---


@dataclass(frozen=True, slots=True)
class RunAnswer:
    """The answer of one run to one question."""

    settings: RunSettings
    question: Question
    choice: ChosenAnswer | None
    """None: no sample was accepted, or the question failed."""
    samples: tuple[EvalSample, ...]
    """All samples, in the order of generation."""
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
    ) -> Iterator[RunAnswer]:
        """Yields an answer for each question and run, as they finish. ``traces``: ids of the
        questions whose text is returned in segments."""


@dataclass(frozen=True, slots=True)
class SinglePass:
    """Asks each question once, all at the same time."""

    run: RunSettings
    params: SamplingParams
    choose: Chooser
    suffix: str = ""
    """Follows the question after a blank line."""

    @property
    def settings(self) -> tuple[RunSettings, ...]:
        return (self.run,)

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[RunAnswer]:
        for key, question in enumerate(questions):
            prompt = f"{question.prompt}\n\n{self.suffix}" if self.suffix else question.prompt
            params = seeded(self.params, question)
            backend.submit(EvalRequest(key, prompt, params, question.id in traces))
        for response in backend.responses():
            question, error = questions[response.request.key], response.error
            choice = None if error else self.choose(question, response.samples)
            yield RunAnswer(
                self.run, question, choice, response.samples, response.seconds, error=error
            )


@dataclass(frozen=True, slots=True)
class CheckpointSweep:
    """Answers for a run at every budget from one trace per question: the model thinks up to the
    largest budget, and the engine branches off an answer at each smaller one. The answers equal
    those of separate runs; the time is that of the one pass.
    """

    settings: tuple[RunSettings, ...]
    """In the order asked; all budgets differ, None is the largest."""
    params: SamplingParams
    choose: Chooser

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[RunAnswer]:
        for key, question in enumerate(questions):
            params = seeded(self.params, question)
            backend.submit(EvalRequest(key, question.prompt, params, question.id in traces))
        budgets = self.params.thinking.checkpoints if self.params.thinking else ()
        for response in backend.responses():
            question, at_checkpoint = questions[response.request.key], dict(response.checkpoints)
            for run in self.settings:
                samples = response.samples
                if run.budget is not None and run.budget in budgets:
                    sample = at_checkpoint.get(run.budget)
                    samples = () if sample is None else (sample,)
                missing = None if samples else f"no answer at budget {run.budget}"
                error = response.error or missing
                choice = None if error else self.choose(question, samples)
                yield RunAnswer(run, question, choice, samples, response.seconds, error=error)


@dataclass(slots=True)
class _Tries:
    """The samples of a question so far."""

    samples: list[EvalSample]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RejectionSampling:
    """Samples until the thinking of an answer ends below the budget, at most ``max_tries`` times;
    if none does, the question has no answer.

    Thinking that reaches the budget is cut there, because it is rejected in any case.
    """

    run: RunSettings
    params: SamplingParams

    @property
    def settings(self) -> tuple[RunSettings, ...]:
        return (self.run,)

    def answer(
        self, questions: Sequence[Question], backend: Backend, traces: frozenset[str]
    ) -> Iterator[RunAnswer]:
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
                trace = response.request.trace
                backend.submit(self._request(key, question, len(so_far.samples), trace))

    def _request(self, key: int, question: Question, attempt: int, trace: bool) -> EvalRequest:
        return EvalRequest(key, question.prompt, seeded(self.params, question, attempt), trace)

    def _accepts(self, sample: EvalSample) -> bool:
        within = self.run.budget is None or sample.thinking_tokens < self.run.budget
        return within and sample.end_reason not in CUT_SHORT

    def _answer(
        self, question: Question, tries: _Tries, response: EvalResponse, accepted: bool
    ) -> RunAnswer:
        last = tries.samples[-1] if tries.samples else None
        choice = ChosenAnswer(extract_answer(last.text), last) if accepted and last else None
        return RunAnswer(
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
    samples of one request differ by their index."""
    name = f"{params.seed}/{question.id}/{attempt}".encode()
    return replace(params, seed=int.from_bytes(hashlib.sha256(name).digest()[:4], "little"))
