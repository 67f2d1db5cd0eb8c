"""Random sequences for the scheduler, and their expected results."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from s1engine import _core
from s1engine.runner.thinking_ends import EndTables, ThinkingEnds
from tests.core import reference
from tests.core.paged_mock import EOS, VOCAB, PagedMock

TRIGGER = 2
NEWLINES = frozenset({3, 4})
ENDS = ThinkingEnds((TRIGGER, EOS))
FORMATS = [
    reference.Format(frozenset({TRIGGER, EOS}), (TRIGGER, 7), (3,), False, NEWLINES),
    reference.Format(frozenset({TRIGGER, EOS}), (TRIGGER,), (3, 4), True, NEWLINES),
]


def core_format(fmt: reference.Format) -> _core.BudgetFormat:
    flags = np.zeros(VOCAB, np.uint8)
    flags[list(fmt.newlines)] = 1
    return _core.BudgetFormat(
        triggers=sorted(fmt.triggers),
        natural_end=list(fmt.natural_end),
        newline=list(fmt.newline),
        newline_always=fmt.newline_always,
        ends_in_newline=flags,
        end_markers=list(fmt.markers),
        token_bytes=list(fmt.token_bytes),
        after_marker=list(fmt.after_marker),
    )


def thinking_ends(fmt: reference.Format) -> ThinkingEnds:
    return ThinkingEnds(tuple(fmt.triggers), EndTables.of(core_format(fmt)))


@dataclass
class Spec:
    """One sequence of a scenario; ``budget`` None: it does not think."""

    prompt: list[int]
    max_answer: int
    fmt: reference.Format
    budget: reference.Budget | None
    prompt_thinking: int = 0
    priority: int = 0
    salt: int = 0
    arrival: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def max_len(self) -> int:
        reasoning = 0
        if self.budget is not None:
            end = len(self.fmt.newline) + len(self.budget.forced_end)
            thinking = max(self.budget.max_thinking - self.prompt_thinking, 0)
            reasoning = thinking + max(end, len(self.fmt.natural_end))
        return len(self.prompt) + reasoning + self.max_answer

    def expected(
        self, model: reference.Model, max_len: int | None = None
    ) -> tuple[reference.Result, str]:
        """Result of the slow reference, and the finish reason."""
        result = reference.Result([], [], 0, 0, "NONE")
        if self.budget is not None:
            result = reference.think(
                model, self.prompt, self.fmt, self.budget, self.prompt_thinking
            )
        max_new = (max_len or self.max_len) - len(self.prompt) - len(result.token_ids)
        prefix = self.prompt + result.token_ids
        tokens, finish = reference.answer(model, prefix, frozenset({EOS}), max_new)
        result.token_ids.extend(tokens)
        result.forced.extend([0] * len(tokens))
        return result, finish

    def add_to(self, scheduler: _core.Scheduler, seq_id: int) -> None:
        kwargs: dict[str, Any] = dict(self.extra)
        if self.budget is not None:
            kwargs["budget"] = _core.BudgetParams(
                format=core_format(self.fmt),
                wait=list(self.budget.wait),
                forced_end=list(self.budget.forced_end),
                delimiter_len=1,
                min_thinking=self.budget.min_thinking,
                num_waits=self.budget.num_waits,
            )
            kwargs["thinking_tokens"] = self.prompt_thinking
            kwargs["max_thinking"] = self.budget.max_thinking
        scheduler.add(
            seq_id,
            np.array(self.prompt, np.int32),
            max_len=self.max_len,
            priority=self.priority,
            stop_tokens=[EOS],
            salt=bytes([self.salt] * 16),
            **kwargs,
        )


tokens = st.integers(3, VOCAB - 1)


@st.composite
def budgets(draw: st.DrawFn) -> reference.Budget:
    maximum = draw(st.integers(0, 20))
    return reference.Budget(
        max_thinking=maximum,
        min_thinking=draw(st.integers(0, maximum)),
        num_waits=draw(st.integers(0, 3)),
        wait=tuple(draw(st.lists(tokens, max_size=3))),
        forced_end=(TRIGGER, *draw(st.lists(tokens, max_size=3))),
    )


@st.composite
def marker_formats(draw: st.DrawFn) -> reference.Format:
    """End markers over a tiny alphabet, and a vocabulary that splits them in every way: tokens are
    any bytes of it, and often a piece of a marker with other text before or after it."""
    letters = st.text("ab<", min_size=1, max_size=6)
    markers = draw(st.lists(letters, min_size=1, max_size=2))
    text = st.text("ab<é", max_size=3)

    def piece() -> str:
        marker = draw(st.sampled_from(markers))
        begin = draw(st.integers(0, len(marker) - 1))
        end = draw(st.integers(begin + 1, len(marker)))
        before = draw(text) if begin == 0 else ""
        return before + marker[begin:end] + (draw(text) if end == len(marker) else "")

    words = ["", "", "", "\n", "a\n"]
    words += [piece() if draw(st.booleans()) else draw(text) for _ in range(VOCAB - len(words))]
    return reference.Format(
        triggers=frozenset({TRIGGER, EOS}),
        natural_end=(TRIGGER,),
        newline=(3,),
        newline_always=draw(st.booleans()),
        newlines=NEWLINES,
        markers=tuple(marker.encode() for marker in markers),
        token_bytes=tuple(word.encode() for word in words),
        after_marker=tuple(draw(st.lists(tokens, max_size=2))),
    )


@st.composite
def specs(draw: st.DrawFn, fmt: reference.Format | None = None) -> Spec:
    """``fmt`` None: of any format."""
    fmt = fmt or draw(st.sampled_from(FORMATS) | marker_formats())
    stem = draw(st.sampled_from([[], [5, 6, 7, 8, 9, 5, 6, 7], [5, 6, 7, 8, 9]]))
    return Spec(
        prompt=stem + draw(st.lists(tokens, min_size=1, max_size=20)),
        max_answer=draw(st.integers(1, 12)),
        fmt=fmt,
        budget=draw(st.none() | budgets()),
        prompt_thinking=0,
        priority=draw(st.integers(0, 2)),
        salt=draw(st.integers(0, 1)),
        arrival=draw(st.integers(0, 6)),
    )


@st.composite
def scenarios(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> list[Spec]:
    """Specs of one model and some clients: all with the same end markers, or with none."""
    marked = draw(st.none() | marker_formats())
    spec = specs(marked) if marked else st.sampled_from(FORMATS).flatmap(specs)
    drawn = draw(st.lists(spec, min_size=min_size, max_size=max_size))
    for one in drawn:
        one.extra["client"] = draw(st.integers(0, 2))
    return drawn


engines = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 4, 8]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([6, 9, 64]),
        "enable_prefix_caching": st.booleans(),
    }
)


def make_mock(scenario: list[Spec], spare: int, engine: dict[str, Any]) -> PagedMock:
    """The cache holds the longest sequence and ``spare`` blocks, so preemption is likely."""
    longest = max(-(-spec.max_len // engine["block_size"]) for spec in scenario)
    ends = thinking_ends(scenario[0].fmt)
    return PagedMock(ends=ends, num_blocks=longest + spare, **engine)


def play(mock: PagedMock, model: reference.Model, scenario: list[Spec]) -> None:
    """Adds each sequence at the step of its arrival and steps until all ended."""
    waiting = dict(enumerate(scenario))
    for step in range(100_000):
        for seq_id in [i for i, s in waiting.items() if s.arrival <= step]:
            waiting.pop(seq_id).add_to(mock.scheduler, seq_id)
        if not waiting and not mock.scheduler.has_unfinished():
            return
        mock.step(model)
        mock.scheduler.check_integrity()
    raise AssertionError("the scheduler does not finish")


spares = st.integers(0, 8)


def check_equals_reference(mock: PagedMock, model: reference.Model, scenario: list[Spec]) -> None:
    """Every sequence equals the slow reference."""
    for seq_id, spec in enumerate(scenario):
        result, finish = spec.expected(model)
        out = mock.scheduler.collect_output_dict(seq_id)
        assert out["token_ids"] == result.token_ids
        assert [int(m & _core.MARK_FORCED > 0) for m in out["marks"]] == result.forced
        assert out["waits_used"] == result.waits_used
        assert out["end_reason"].name == result.end_reason
        assert out["finish_reason"].name == finish
        if spec.budget is not None:
            assert out["thinking_tokens"] == result.thinking_tokens
            regions = [mark & _core.MARK_REGION for mark in out["marks"]]
            thought = result.thinking_tokens - spec.prompt_thinking
            assert regions.count(_core.MARK_THINK) == thought
            assert spec.budget.min_thinking <= out["thinking_tokens"] <= spec.budget.max_thinking


@dataclass
class Disturbances:
    """Decisions of the host at moments of a scenario: aborts, and lowered thinking maxima."""

    aborted: dict[int, int]  # moment: sequence
    limited: dict[int, tuple[int, int]]  # moment: sequence, maximum
    _bounds: dict[int, int] = field(default_factory=dict)

    def apply(self, scheduler: _core.Scheduler, moment: int) -> None:
        if moment in self.aborted:
            scheduler.finish(self.aborted[moment], _core.FinishReason.ABORT)
        if moment in self.limited:
            seq_id, limit = self.limited[moment]
            state = scheduler.collect_output_dict(seq_id)
            if state["phase"].name == "THINKING" and limit < state["max_thinking"]:
                self._bounds[seq_id] = max(limit, state["thinking_tokens"])
            scheduler.limit_thinking(seq_id, limit, _core.EndReason.DEADLINE)

    def check_results(
        self, scheduler: _core.Scheduler, scenario: list[Spec], model: reference.Model
    ) -> None:
        """Lowered maxima hold from the host's last token; other sequences equal the reference."""
        for seq_id, bound in self._bounds.items():
            assert scheduler.collect_output_dict(seq_id)["thinking_tokens"] <= bound
        touched = {*self.aborted.values(), *(seq_id for seq_id, _ in self.limited.values())}
        for seq_id in set(range(len(scenario))) - touched:
            wanted = scenario[seq_id].expected(model)[0]
            assert scheduler.collect_output_dict(seq_id)["token_ids"] == wanted.token_ids


def disturbances(sequences: int, last: int) -> st.SearchStrategy[Disturbances]:
    """For ``sequences`` sequences, until moment ``last``."""
    ids, moments = st.integers(0, sequences - 1), st.integers(0, last)
    return st.builds(
        Disturbances,
        st.dictionaries(moments, ids, max_size=2),
        st.dictionaries(moments, st.tuples(ids, st.integers(0, 12)), max_size=3),
    )
