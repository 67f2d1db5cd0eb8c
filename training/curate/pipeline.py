"""From many questions to a thousand: s1's funnel over the answers of any models.

Each stage maps candidates to candidates and prints its count: sources, decontamination against test
sets and earlier sources, traces of a teacher and attempts of weaker models, quality, difficulty
(drop what a weaker model solves), diversity (a domain, then 2^-rank by length). The output folder
holds the chosen rows in s1K's format, a manifest of every decision, and a figure. Model answers are
saved as they arrive, so an interrupted funnel resumes.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence

from s1engine.errors import RequestError
from s1engine.training.curate import grading
from s1engine.training.curate.curation_config import CurationConfig, QueriedModel, TrustedSource
from s1engine.training.curate.diversity import SelectableQuestion, by_domain_and_length
from s1engine.training.curate.funnel import Candidate, Funnel
from s1engine.training.curate.model_answers import Answers, collect_answers
from s1engine.training.curate.question_filters import NgramIndex, formatting_fault
from s1engine.training.rows import UNNAMED, TrainingRow, format_row, write_jsonl

CHOSEN = "chosen.jsonl"


def question_id(question: str) -> str:
    """s1's name of a question: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def curate(config: CurationConfig) -> Funnel:
    """Runs the funnel. Its remaining candidates are the chosen ones, in the order of the draw."""
    config.out.mkdir(parents=True, exist_ok=True)
    funnel = Funnel(
        [
            Candidate(question_id(row.question), source.name, row)
            for source in config.sources
            for row in source.rows
        ],
        verbose=config.progress,
    )
    decontaminate(funnel, config)
    if config.teacher is None:
        traces = _traces_of_rows(funnel, config)
    else:
        traces = _query_candidates(funnel, config, "teacher", config.teacher)
    attempts = {
        name: _query_candidates(funnel, config, name, model) for name, model in config.weak.items()
    }
    require_traces(funnel, config, traces)
    filter_quality(funnel, attempts)
    filter_difficulty(funnel, config, attempts)
    select_diverse(funnel, config)
    funnel.save(config.out)
    chosen = [format_row(output_row(c, config, traces)) for c in funnel.candidates]
    write_jsonl(config.out / CHOSEN, chosen)
    return funnel


# --- stages ---


def decontaminate(funnel: Funnel, config: CurationConfig) -> None:
    """Drops overlaps with the tests and with earlier sources, then repeated questions."""
    index = NgramIndex()
    for test in config.tests:
        index.add((row.question for row in test.rows), test.name)
    overlaps: dict[int, str] = {}
    for source in config.sources:
        own = [candidate for candidate in funnel.candidates if candidate.source == source.name]
        for candidate in own:
            earlier = index.find_overlap(candidate.row.question)
            if earlier is not None:
                overlaps[id(candidate)] = f"shares 8 words with {earlier}"
        index.add((c.row.question for c in own if id(c) not in overlaps), source.name)
    funnel.apply_stage("decontaminated", lambda candidate: overlaps.get(id(candidate)))
    ids: set[str] = set()

    def repeats(candidate: Candidate) -> str | None:
        is_known = candidate.id in ids
        ids.add(candidate.id)
        return "repeats an earlier question" if is_known else None

    funnel.apply_stage("distinct", repeats)


def require_traces(funnel: Funnel, config: CurationConfig, traces: Answers) -> None:
    """Drops candidates without a complete trace of the teacher; records each trace's length and
    whether it is correct."""

    def lacks_trace(candidate: Candidate) -> str | None:
        trace = traces.get(candidate.id)
        if trace is None:
            return "the teacher gave no answer"
        if not trace.thinking or not trace.attempt:
            return "the teacher's answer lacks thinking or text"
        candidate.facts["length"] = config.num_tokens(trace.thinking)
        return None

    funnel.apply_stage("with a trace", lacks_trace)
    grades = _grade(funnel, config, "teacher", traces)
    for candidate in funnel.candidates:
        candidate.facts["teacher_right"] = grades.get(candidate.id)


def filter_quality(funnel: Funnel, attempts: Mapping[str, Answers]) -> None:
    """Drops questions that a model did not answer, and badly formatted ones."""

    def unanswered(candidate: Candidate) -> str | None:
        silent = [name for name, answers in attempts.items() if candidate.id not in answers]
        return f"{silent[0]} gave no answer" if silent else None

    funnel.apply_stage("answered by all", unanswered)
    funnel.apply_stage("well formatted", lambda c: formatting_fault(c.row.question, c.source))


def filter_difficulty(
    funnel: Funnel, config: CurationConfig, attempts: Mapping[str, Answers]
) -> None:
    """Drops questions that a weaker model solves."""
    grades = {name: _grade(funnel, config, name, answers) for name, answers in attempts.items()}

    def too_easy(candidate: Candidate) -> str | None:
        for name, by_id in grades.items():
            is_right = candidate.facts[f"{name}_right"] = by_id.get(candidate.id)
            if is_right is None:
                return f"no verdict on {name}'s attempt"
            if is_right:
                return f"{name} solves it"
        return None

    funnel.apply_stage("difficult", too_easy)


def select_diverse(funnel: Funnel, config: CurationConfig) -> None:
    """Keeps exactly ``count``: trusted questions first, then s1's draw. Raises RequestError if
    fewer are left."""
    _classify(funnel, config)
    funnel.apply_stage(
        "with a domain", lambda c: None if c.facts.get("domain") else "no domain is known"
    )
    if len(funnel.candidates) < config.count:
        funnel.save(config.out)
        reason = f"only {len(funnel.candidates)} questions are left of {funnel.counts[0][1]}"
        raise RequestError(f"count {config.count}: {reason}", param="count")
    questions = [
        SelectableQuestion(c.id, c.facts["domain"], c.facts["length"]) for c in funnel.candidates
    ]
    trusted = [c.id for c in funnel.candidates if _is_trusted(c, config.trusted)]
    chosen = by_domain_and_length(questions, config.count, config.seed, trusted)
    order = {name: rank for rank, name in enumerate(chosen)}
    funnel.apply_stage("chosen", lambda c: None if c.id in order else "not drawn")
    funnel.candidates.sort(key=lambda candidate: order[candidate.id])


def _is_trusted(candidate: Candidate, trusted: Sequence[TrustedSource]) -> bool:
    return candidate.facts.get("teacher_right") is True and any(
        candidate.source == one.source and candidate.facts["length"] > one.min_tokens
        for one in trusted
    )


def _classify(funnel: Funnel, config: CurationConfig) -> None:
    """Records the domain of every candidate."""
    if config.domain is not None:
        for candidate in funnel.candidates:
            candidate.facts["domain"] = config.domain(candidate.row)
        return
    if config.judge is None:
        raise RequestError("domain: name a field, or give a judge", param="domain")
    fields = grading.field_list()
    prompts = {
        c.id: grading.CLASSIFY.format(fields=fields, question=c.row.question)
        for c in funnel.candidates
    }
    answers = _query(config, "domain", config.judge, prompts)
    for candidate in funnel.candidates:
        answer = answers.get(candidate.id)
        code = grading.parse_field_code(answer.attempt) if answer else None
        candidate.facts["domain"] = grading.FIELDS[code] if code else None


# --- model answers ---


def _query(
    config: CurationConfig, name: str, model: QueriedModel, prompts: Mapping[str, str]
) -> Answers:
    file = config.out / f"asked-{name}.jsonl"
    answers, failures = collect_answers(
        model.backend, prompts, model.params, file, progress=config.progress
    )
    if failures:
        example = next(iter(failures.values()))
        counts = f"{len(failures)} of {len(prompts)}"
        print(f"{name}: {counts} failed, such as: {example}", file=sys.stderr)
    return answers


def _query_candidates(
    funnel: Funnel, config: CurationConfig, name: str, model: QueriedModel
) -> Answers:
    """Answers to the questions without any instruction, as in s1."""
    return _query(config, name, model, {c.id: c.row.question for c in funnel.candidates})


def _traces_of_rows(funnel: Funnel, config: CurationConfig) -> Answers:
    traces = {c.id: c.row.trace(config.teacher_name) for c in funnel.candidates}
    return {name: trace for name, trace in traces.items() if trace is not None}


def _grade(
    funnel: Funnel, config: CurationConfig, name: str, answers: Answers
) -> dict[str, bool | None]:
    """Whether each attempt is correct; None or missing if unknown."""
    gradable = [c for c in funnel.candidates if c.id in answers and c.row.text("solution").strip()]
    if config.judge is None:
        return {
            c.id: grading.is_correct_by_rules(answers[c.id].attempt, c.row.text("solution"))
            for c in gradable
        }
    prompts = {
        c.id: grading.JUDGE.format(
            question=c.row.question,
            attempt=answers[c.id].attempt,
            solution=c.row.text("solution"),
        )
        for c in gradable
    }
    verdicts = _query(config, f"judge-{name}", config.judge, prompts)
    return {key: grading.parse_verdict(answer.attempt) for key, answer in verdicts.items()}


def output_row(candidate: Candidate, config: CurationConfig, traces: Answers) -> TrainingRow:
    """The row as it is published: this funnel's trace is added to those of the source."""
    defaults = {
        "solution": None, "cot_type": None, "source_type": candidate.source, "metadata": None,
        "cot": None,
    }  # fmt: skip
    earlier = {} if config.teacher_name == UNNAMED else candidate.row.traces
    return TrainingRow(
        candidate.row.question,
        {**earlier, config.teacher_name: traces[candidate.id]},
        {**defaults, **candidate.row.fields},
    )
