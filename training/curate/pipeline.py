"""From many questions to a thousand: s1's funnel over whatever models answer.

    python -m s1engine.training.curate curate.yaml

Stages, each from candidates to candidates with its count printed: sources, decontamination against
test sets and earlier sources, traces of a teacher and attempts of weaker models, quality,
difficulty (drop what a weaker model solves), diversity (a domain, then 2^-rank by length). The
folder then holds the chosen rows in s1K's format, a manifest of every decision, and a figure.
Answers of models are kept as they come, so a funnel that was stopped goes on where it was.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s1engine.errors import RequestError
from s1engine.eval.backend import Backend
from s1engine.sampling_params import SamplingParams
from s1engine.training import rows
from s1engine.training.curate import diversity, grading
from s1engine.training.curate.funnel import Candidate, Funnel
from s1engine.training.curate.model_answers import Answers, ask_all
from s1engine.training.curate.question_filters import Seen, fault

CHOSEN = "chosen.jsonl"


@dataclass(frozen=True, slots=True)
class Source:
    """A file of questions under one name."""

    name: str
    rows: Sequence[rows.Row]


@dataclass(frozen=True, slots=True)
class Asked:
    """A model and how it is asked."""

    backend: Backend
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Trusted:
    """Questions that are chosen before the draw: of this source, with a right and long trace."""

    source: str
    min_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Curation:
    """Everything that a funnel needs."""

    out: Path
    sources: Sequence[Source]
    tests: Sequence[Source] = ()
    teacher: Asked | None = None
    """None: the rows bring the traces of ``teacher_name``."""
    teacher_name: str = rows.UNNAMED
    """Empty: rows come out in s1K's format; else in s1K-1.1's, under this name."""
    weak: Mapping[str, Asked] = field(default_factory=dict)
    """Models whose success makes a question too easy, by name."""
    judge: Asked | None = None
    """None: grading by rules."""
    domain: Callable[[rows.Row], str] | None = None
    """What a question is about; None: the judge says."""
    num_tokens: Callable[[str], int] = len
    """Length of a trace."""
    trusted: Sequence[Trusted] = ()
    count: int = 1000
    seed: int = 42
    progress: bool = True


def question_id(question: str) -> str:
    """As s1 names questions: the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def curate(plan: Curation) -> Funnel:
    """Runs the funnel; the candidates left are the chosen ones, in the order of the draw."""
    plan.out.mkdir(parents=True, exist_ok=True)
    funnel = Funnel(
        [
            Candidate(question_id(row.question), source.name, row)
            for source in plan.sources
            for row in source.rows
        ],
        verbose=plan.progress,
    )
    decontaminate(funnel, plan)
    if plan.teacher is None:
        traces = _brought(funnel, plan)
    else:
        traces = _asked(funnel, plan, "teacher", plan.teacher)
    attempts = {name: _asked(funnel, plan, name, weak) for name, weak in plan.weak.items()}
    note_traces(funnel, plan, traces)
    check_quality(funnel, attempts)
    check_difficulty(funnel, plan, attempts)
    choose(funnel, plan)
    funnel.save(plan.out)
    chosen = [rows.to_json(with_trace(c, plan, traces)) for c in funnel.candidates]
    rows.write_jsonl(plan.out / CHOSEN, chosen)
    return funnel


# --- stages ---


def decontaminate(funnel: Funnel, plan: Curation) -> None:
    """Against the tests, then source by source against those before; then equal questions."""
    seen = Seen()
    for test in plan.tests:
        seen.add((row.question for row in test.rows), test.name)
    overlaps: dict[int, str] = {}
    for source in plan.sources:
        own = [candidate for candidate in funnel.candidates if candidate.source == source.name]
        for candidate in own:
            place = seen.overlap(candidate.row.question)
            if place is not None:
                overlaps[id(candidate)] = f"shares 8 words with {place}"
        seen.add((c.row.question for c in own if id(c) not in overlaps), source.name)
    funnel.stage("decontaminated", lambda candidate: overlaps.get(id(candidate)))
    names: set[str] = set()

    def repeated(candidate: Candidate) -> str | None:
        known = candidate.id in names
        names.add(candidate.id)
        return "repeats an earlier question" if known else None

    funnel.stage("distinct", repeated)


def note_traces(funnel: Funnel, plan: Curation, traces: Answers) -> None:
    """Keeps the candidates that the teacher answered, with thinking; notes length, and whether it
    was right."""

    def verdict(candidate: Candidate) -> str | None:
        trace = traces.get(candidate.id)
        if trace is None:
            return "the teacher gave no answer"
        if not trace.thinking or not trace.attempt:
            return "the teacher's answer lacks thinking or text"
        candidate.facts["length"] = plan.num_tokens(trace.thinking)
        return None

    funnel.stage("with a trace", verdict)
    graded = _graded(funnel, plan, "teacher", traces)
    for candidate in funnel.candidates:
        candidate.facts["teacher_right"] = graded.get(candidate.id)


def check_quality(funnel: Funnel, attempts: Mapping[str, Answers]) -> None:
    """Every model answered, and the question is well formatted."""

    def unanswered(candidate: Candidate) -> str | None:
        silent = [name for name, found in attempts.items() if candidate.id not in found]
        return f"{silent[0]} gave no answer" if silent else None

    funnel.stage("answered by all", unanswered)
    funnel.stage("well formatted", lambda c: fault(c.row.question, c.source))


def check_difficulty(funnel: Funnel, plan: Curation, attempts: Mapping[str, Answers]) -> None:
    """Drops what any weaker model solves."""
    graded = {name: _graded(funnel, plan, name, found) for name, found in attempts.items()}

    def verdict(candidate: Candidate) -> str | None:
        for name, right in graded.items():
            candidate.facts[f"{name}_right"] = right.get(candidate.id)
            if right.get(candidate.id) is None:
                return f"no verdict on {name}'s attempt"
            if right[candidate.id]:
                return f"{name} solves it"
        return None

    funnel.stage("difficult", verdict)


def choose(funnel: Funnel, plan: Curation) -> None:
    """Trusted ones first, then s1's draw, to exactly ``count``. Raises RequestError if there are
    not so many."""
    _classify(funnel, plan)
    funnel.stage("with a domain", lambda c: None if c.facts.get("domain") else "no domain is known")
    if len(funnel.candidates) < plan.count:
        funnel.save(plan.out)
        reason = f"only {len(funnel.candidates)} questions are left of {funnel.counts[0][1]}"
        raise RequestError(f"count {plan.count}: {reason}", param="count")
    options = [
        diversity.Option(c.id, c.facts["domain"], c.facts["length"]) for c in funnel.candidates
    ]
    trusted = [c.id for c in funnel.candidates if _is_trusted(c, plan.trusted)]
    chosen = diversity.by_domain_and_length(options, plan.count, plan.seed, trusted)
    order = {name: rank for rank, name in enumerate(chosen)}
    funnel.stage("chosen", lambda c: None if c.id in order else "not drawn")
    funnel.candidates.sort(key=lambda candidate: order[candidate.id])


def _is_trusted(candidate: Candidate, trusted: Sequence[Trusted]) -> bool:
    right, length = candidate.facts.get("teacher_right"), candidate.facts["length"]
    return right is True and any(
        candidate.source == one.source and length > one.min_tokens for one in trusted
    )


def _classify(funnel: Funnel, plan: Curation) -> None:
    if plan.domain is not None:
        for candidate in funnel.candidates:
            candidate.facts["domain"] = plan.domain(candidate.row)
        return
    if plan.judge is None:
        raise RequestError("domain: give a field, or a judge that says it", param="domain")
    listed = grading.listed_fields()
    prompts = {
        c.id: grading.CLASSIFY.format(fields=listed, question=c.row.question)
        for c in funnel.candidates
    }
    answers = _answers(plan, "domain", plan.judge, prompts)
    for candidate in funnel.candidates:
        answer = answers.get(candidate.id)
        code = grading.field_code(answer.attempt) if answer else None
        candidate.facts["domain"] = grading.FIELDS[code] if code else None


# --- asking ---


def _asked(funnel: Funnel, plan: Curation, name: str, asked: Asked) -> Answers:
    """The bare questions, as s1 asks them."""
    return _answers(plan, name, asked, {c.id: c.row.question for c in funnel.candidates})


def _brought(funnel: Funnel, plan: Curation) -> Answers:
    found = {c.id: c.row.trace(plan.teacher_name) for c in funnel.candidates}
    return {name: trace for name, trace in found.items() if trace is not None}


def _answers(plan: Curation, name: str, asked: Asked, prompts: Mapping[str, str]) -> Answers:
    file = plan.out / f"asked-{name}.jsonl"
    answers, failures = ask_all(asked.backend, prompts, asked.params, file, progress=plan.progress)
    if failures:
        some = next(iter(failures.values()))
        print(f"{name}: {len(failures)} of {len(prompts)} failed, such as: {some}", file=sys.stderr)
    return answers


def _graded(funnel: Funnel, plan: Curation, name: str, found: Answers) -> dict[str, bool | None]:
    """Is each attempt right? None where that cannot be told."""
    known = [c for c in funnel.candidates if c.id in found]
    if plan.judge is None:
        return {
            c.id: grading.right_by_rules(found[c.id].attempt, c.row.get("solution"))
            if c.row.get("solution").strip()
            else None
            for c in known
        }
    prompts = {
        c.id: grading.JUDGE.format(
            question=c.row.question,
            attempt=found[c.id].attempt,
            solution=c.row.get("solution"),
        )
        for c in known
        if c.row.get("solution").strip()
    }
    answers = _answers(plan, f"judge-{name}", plan.judge, prompts)
    return {key: grading.verdict(answer.attempt) for key, answer in answers.items()}


def with_trace(candidate: Candidate, plan: Curation, traces: Answers) -> rows.Row:
    """The row as it is published, with this funnel's trace besides those it came with."""
    rest = {"solution": None, "cot_type": None, "source_type": candidate.source, "metadata": None}
    brought = {} if plan.teacher_name == rows.UNNAMED else candidate.row.traces
    return rows.Row(
        candidate.row.question,
        {**brought, plan.teacher_name: traces[candidate.id]},
        {**rest, "cot": None, **candidate.row.rest},
    )
