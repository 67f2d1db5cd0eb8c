"""From several samples of a question to one answer: the first, the majority's, the most confident.

Pure. Knows neither how samples were made nor which answer is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s1engine.eval.backend import Sample
from s1engine.eval.grade import canonical, extract_answer, is_correct
from s1engine.eval.tasks import Question


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


def majority(question: Question, samples: Sequence[Sample]) -> Choice:
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
