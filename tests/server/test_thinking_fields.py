"""Spellings of thinking fields: one is enough, two may agree, two that differ are an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.sampling_params import UNLIMITED, ThinkingBudget
from s1engine.server.api.thinking_fields import EFFORTS, ThinkingFields, parse_efforts

MAXIMUM = {
    "thinking_token_budget": lambda n: n,
    "thinking_budget": lambda n: n,
    "max_thinking_tokens": lambda n: n,
    "max_tokens_thinking": lambda n: n,
    "thinking": lambda n: {"type": "enabled", "budget_tokens": n},
    "reasoning": lambda n: {"max_tokens": n},
}


def budget(**fields: object) -> ThinkingBudget | None:
    return ThinkingFields.model_validate(fields).requested_thinking()[0]


def enabled(**fields: object) -> bool | None:
    return ThinkingFields.model_validate(fields).requested_thinking()[1]


@given(st.data(), st.sets(st.sampled_from(sorted(MAXIMUM)), min_size=1), st.integers(0, 9000))
def test_spellings_that_agree_mean_one_thing(
    data: st.DataObject, names: set[str], value: int
) -> None:
    fields = {name: MAXIMUM[name](value) for name in names}
    assert budget(**fields) == ThinkingBudget(max_tokens=value)
    odd = data.draw(st.sampled_from(sorted(MAXIMUM)))
    fields[odd] = MAXIMUM[odd](value + 1)
    if len(fields) == 1:
        assert budget(**fields) == ThinkingBudget(max_tokens=value + 1)
        return
    with pytest.raises(RequestError) as error:
        budget(**fields)
    assert error.value.param in fields


def test_no_field_is_no_budget() -> None:
    assert budget() is None and enabled() is None
    assert budget(enable_thinking=True) is None and enabled(enable_thinking=True) is True
    assert budget(max_tokens_thinking="auto") == ThinkingBudget(max_tokens=UNLIMITED)


def test_all_fields_arrive() -> None:
    assert budget(
        thinking_token_budget=9,
        min_tokens_thinking=2,
        thinking_n_ignore=3,
        thinking_n_ignore_str="Hmm",
        final_text="So",
        answer_reserve=4,
        thinking_deadline_ms=5,
    ) == ThinkingBudget(
        max_tokens=9,
        min_tokens=2,
        num_waits=3,
        wait_text="Hmm",
        final_text="So",
        answer_reserve=4,
        deadline_ms=5,
    )


def test_an_empty_wait_text_is_a_text() -> None:
    assert budget(num_waits=1, wait_text="") == ThinkingBudget(num_waits=1, wait_text="")


def test_effort_is_a_budget_by_configuration() -> None:
    fields = ThinkingFields(reasoning_effort="low")
    assert fields.requested_thinking({"low": 7})[0] == ThinkingBudget(max_tokens=7)
    unlimited = ThinkingFields(reasoning_effort="x").requested_thinking({"x": None})[0]
    assert unlimited == ThinkingBudget(max_tokens=UNLIMITED)
    with pytest.raises(RequestError, match="one of none, low"):
        fields.model_copy(update={"reasoning_effort": "huge"}).requested_thinking({"low": 7})


@given(st.sampled_from(sorted(EFFORTS)), st.sampled_from(sorted(MAXIMUM)), st.integers(0, 9000))
def test_a_budget_wins_over_an_effort(effort: str, name: str, value: int) -> None:
    fields: dict[str, object] = {"reasoning_effort": effort, name: MAXIMUM[name](value)}
    assert budget(**fields) == ThinkingBudget(max_tokens=value)
    if name == "reasoning":
        one = {"effort": effort, "max_tokens": value}
        assert budget(reasoning=one) == ThinkingBudget(max_tokens=value)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"reasoning_effort": "none"}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning": {"enabled": False}}, False),
        ({"enable_thinking": False, "thinking": {"type": "disabled"}}, False),
    ],
)
def test_thinking_is_switched(fields: dict[str, object], wanted: bool) -> None:
    assert enabled(**fields) is wanted


def test_switches_that_differ_are_refused() -> None:
    with pytest.raises(RequestError) as error:
        enabled(enable_thinking=True, reasoning_effort="none")
    assert error.value.param == "reasoning_effort"


def test_efforts_are_parsed() -> None:
    assert parse_efforts("low=5, high=none") == {"low": 5, "high": None}
    for text in ("low", "=5", "low=-1", "low=x", ""):
        with pytest.raises(RequestError, match="reasoning_effort_budgets"):
            parse_efforts(text)
