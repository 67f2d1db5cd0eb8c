"""Drafts change how many steps a sequence takes and nothing else: whatever is drafted, accepted or
rejected, every sequence equals the slow reference."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from s1engine.runner.thinking_ends import ThinkingEnds
from tests.core import reference
from tests.core.paged_mock import EOS, PagedMock, repeating_model
from tests.core.scenarios import (
    ENDS,
    FORMATS,
    TRIGGER,
    Spec,
    check_equals_reference,
    disturbances,
    engines,
    make_mock,
    play,
    scenarios,
    spares,
    specs,
    thinking_ends,
)
from tests.core.test_scheduler import BRANCH

drafts = st.fixed_dictionaries(
    {"max_draft": st.sampled_from([1, 2, 5]), "max_samples": st.sampled_from([0, 7, 40])}
)
drafting_engines = st.builds(lambda engine, draft: engine | draft, engines, drafts)


def note(stats: _core.SchedulerStats) -> None:
    event(f"accepted: {min(stats.num_accepted_tokens, 1)}")
    event(f"rejected: {min(stats.num_draft_tokens - stats.num_accepted_tokens, 1)}")
    event(f"preempted: {stats.num_preemptions > 0}")


@given(scenarios(1, 6), spares, drafting_engines, st.integers(0, 99))
def test_every_sequence_equals_the_reference(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int
) -> None:
    model = repeating_model(seed, favourites=(TRIGGER,))
    mock = make_mock(scenario, spare, engine)
    play(mock, model, scenario)
    note(mock.scheduler.stats())
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


@settings(max_examples=60)
@given(scenarios(2, 5), spares, drafting_engines, st.data())
def test_decisions_of_the_host_within_a_step_count_at_once(
    scenario: list[Spec], spare: int, engine: dict[str, Any], data: st.DataObject
) -> None:
    """Aborts and lowered maxima between a plan with drafts and its samples."""
    model = repeating_model(1, favourites=(TRIGGER,))
    mock = make_mock(scenario, spare, engine)
    disturbed = data.draw(disturbances(len(scenario), last=15))
    for seq_id, spec in enumerate(scenario):
        spec.add_to(mock.scheduler, seq_id)
    for moment in range(10_000):
        if not mock.scheduler.has_unfinished():
            break
        mock.scheduler.schedule(mock.batch)
        sampled = mock.forward(model) if mock.batch.num_rows else None
        disturbed.apply(mock.scheduler, moment)
        if sampled is not None:
            mock.scheduler.update(sampled)
        mock.scheduler.check_integrity()
    disturbed.check_results(mock.scheduler, scenario, model)


@settings(max_examples=40)
@given(
    specs().filter(lambda s: s.budget is not None and s.budget.max_thinking > 4),
    engines,
    drafts,
    st.none() | st.integers(2, 4),
    st.integers(0, 99),
)
def test_checkpoints_and_loops_are_the_same_as_without_drafts(
    spec: Spec, engine: dict[str, Any], draft: dict[str, Any], loops: int | None, seed: int
) -> None:
    assert spec.budget is not None
    budgets = range(max(spec.budget.min_thinking, 1), spec.budget.max_thinking, 2)
    spec.extra = {"loop_repeats": loops or 0}
    spec.extra["checkpoints"] = [(budget, BRANCH + i) for i, budget in enumerate(budgets)]
    model = repeating_model(seed, favourites=(TRIGGER,))
    outs: list[list[Any]] = []
    for options in (engine, engine | draft):
        mock = PagedMock(ends=thinking_ends(spec.fmt), num_blocks=99, **options)
        play(mock, model, [spec])
        branches = len(budgets) - mock.scheduler.collect_output_dict(0)["checkpoints_left"]
        outs.append([mock.scheduler.collect_output_dict(BRANCH + i) for i in range(branches)])
        for out in outs[-1]:
            out.pop("num_cached")  # depends on when the branch began
        outs[-1].append(mock.scheduler.tokens(0))
    event(f"branches: {len(outs[0]) > 1}")
    assert outs[0] == outs[1]


def samples_by_row(spec: Spec, mock: PagedMock, **extra: Any) -> list[Counter[int]]:
    """Decodes 9 10 11 12 again and again; samples by req_index of every step."""
    spec.extra = extra
    spec.add_to(mock.scheduler, 0)
    seen = []
    while mock.scheduler.has_unfinished():
        mock.scheduler.schedule(mock.batch)
        req_indices = mock.buffers["sample_req_indices"][: mock.batch.num_samples]
        seen.append(Counter(req_indices.tolist()))
        mock.scheduler.update(mock.forward(lambda ids: [9 + len(ids) % 4]))
    assert len(mock.scheduler.tokens(0)) == spec.max_len
    return seen


BUDGET = reference.Budget(40, 0, 0, (), (TRIGGER,))


@pytest.mark.parametrize(
    ("drafting", "thinks", "answers"),
    [("NEVER", False, False), ("THINKING", True, False), ("ALWAYS", True, True)],
)
def test_drafts_are_made_only_where_allowed(drafting: str, thinks: bool, answers: bool) -> None:
    mock = PagedMock(ends=ENDS, max_draft=3, max_samples=8)
    allowed = getattr(_core.Drafting, drafting)
    seen = samples_by_row(Spec([5, 6], 30, FORMATS[0], BUDGET), mock, drafting=allowed)
    half = len(seen) // 2 if drafting == "ALWAYS" else 40 if drafting == "NEVER" else len(seen) - 30
    assert (max(map(max, (s.values() for s in seen[:half]))) > 1) == thinks
    assert (max(map(max, (s.values() for s in seen[half:]))) > 1) == answers
    stats = mock.scheduler.stats()
    assert stats.num_undrafted == (drafting != "ALWAYS")
    assert stats.num_steps + stats.num_accepted_tokens == stats.num_sampled_tokens


def test_repeated_text_takes_few_steps() -> None:
    mock = PagedMock(ends=ENDS, num_blocks=99, max_draft=7, max_samples=8)
    steps = len(samples_by_row(Spec([5, 6], 160, FORMATS[0], None), mock))
    assert steps < 10 + 160 / 8 + 5
    stats = mock.scheduler.stats()
    assert stats.num_accepted_tokens <= stats.num_draft_tokens <= 7 * stats.num_drafts


@pytest.mark.parametrize(("per_token", "drafted"), [(0.0, True), (0.3, True), (1.0, False)])
def test_drafts_are_made_where_they_pay(per_token: float, drafted: bool) -> None:
    costs = [(n, 1 + per_token * (n - 1)) for n in (1, 2, 5)]
    mock = PagedMock(ends=ThinkingEnds((EOS,)), max_draft=3, max_samples=8, step_costs=costs)
    samples_by_row(Spec([5, 6], 60, FORMATS[0], None), mock)
    assert (mock.scheduler.stats().num_draft_tokens > 0) == drafted


def test_a_full_step_has_no_drafts_and_a_prompt_is_not_delayed() -> None:
    mock = PagedMock(max_num_seqs=2, max_num_batched_tokens=8, max_draft=7, max_samples=16)
    Spec([9, 10, 11, 12] * 4, 24, FORMATS[0], None).add_to(mock.scheduler, 0)
    while mock.scheduler.stats().num_draft_tokens == 0:
        mock.step(lambda ids: [9 + len(ids) % 4])
    Spec([7] * 30, 1, FORMATS[0], None).add_to(mock.scheduler, 1)
    for _ in range(4):
        mock.scheduler.schedule(mock.batch)
        assert mock.batch.num_rows == 2 and mock.batch.num_samples == 1
        mock.scheduler.update(mock.forward(lambda ids: [9 + len(ids) % 4]))


def draft_by_definition(tokens: list[int], limit: int) -> list[int]:
    """The draft by the definition at the head of drafter.hpp, over the whole list."""
    size, matches = len(tokens), []
    for end in range(size - 1, 1, -1):
        longest = min(end, _core.Drafter.MAX_MATCH)
        match = 0
        while match < longest and tokens[end - 1 - match] == tokens[size - 1 - match]:
            match += 1
        if match >= _core.Drafter.MIN_MATCH:
            matches.append((match, end))
    matches = matches[: _core.Drafter.MAX_OCCURRENCES]
    voters = [end for match, end in matches if match == max(matches)[0]]
    drafted: list[int] = []
    while voters and len(drafted) < limit:
        text = tokens + drafted
        votes = [text[voter + len(drafted)] for voter in voters]
        winner = max(votes, key=votes.count)  # the first of the most frequent
        voters = [voter for voter, vote in zip(voters, votes, strict=True) if vote == winner]
        drafted.append(winner)
    return drafted


texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=6)


@given(texts, st.integers(1, 9), st.data())
def test_drafts_equal_the_definition(
    pieces: list[list[int]], limit: int, data: st.DataObject
) -> None:
    """The text grows by any number of tokens between two drafts."""
    drafter, tokens = _core.Drafter(), list[int]()
    for piece in pieces:
        tokens += piece
        wanted = draft_by_definition(tokens, limit)
        got = drafter.propose(np.array(tokens, np.int32), limit=limit)
        assert [token for token, _, _ in got] == wanted
        probabilities = [1.0, *(probability for _, _, probability in got)]
        assert probabilities == sorted(probabilities, reverse=True)
        least = data.draw(st.sampled_from(probabilities))
        sure = drafter.propose(np.array(tokens, np.int32), limit=limit, min_probability=least)
        assert sure == [draft_token for draft_token in got if draft_token[2] >= least]


@given(st.booleans())
def test_a_drafter_learns_its_acceptance(accepted: bool) -> None:
    drafter, tokens = _core.Drafter(), np.array([5, 6, 7, 8, 5, 6], np.int32)
    ((token, bucket, before),) = drafter.propose(tokens, limit=1)
    assert token == 7
    for _ in range(500):
        drafter.record(bucket, accepted)
    ((_, _, after),) = drafter.propose(tokens, limit=1)
    assert after > 0.95 if accepted else after < 0.05 < before
