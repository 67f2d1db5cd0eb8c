"""Structured answers in SamplingParams: schema, regular expression, choices."""

import json
import re
from typing import Any

import pytest

from s1engine import LLM, RequestError, SamplingParams, ThinkingBudget
from s1engine.engine.structured_output import with_grammar
from s1engine.sampling_params import STRUCTURES

PROMPT = "a=3 b=a+4 c=b*2 c?"
CHAT = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"c": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["c"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", max_num_seqs=8)


def answer(llm: LLM, **fields: Any) -> str:
    params = SamplingParams(max_tokens=256, seed=3, thinking=ThinkingBudget(max_tokens=4), **fields)
    (output,) = llm.chat(CHAT, params)
    assert output.outputs[0].finish_reason == "stop"
    return output.outputs[0].text


def test_each_structure_holds(llm: LLM) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        assert set(json.loads(answer(llm, json_schema=schema))) == {"c"}
    assert re.fullmatch("[a-c]{3}x", answer(llm, regex="[a-c]{3}x"))
    assert answer(llm, choice=["yes", 'no "quoted"\n']) in ("yes", 'no "quoted"\n')
    assert answer(llm, grammar='start: "a" "b"') == "ab"


def test_any_json_value_satisfies_an_empty_schema(llm: LLM) -> None:
    json.loads(answer(llm, json_schema={}, temperature=0))


def test_a_free_answer_has_no_grammar() -> None:
    params = SamplingParams()
    assert params.structure is None and with_grammar(params) is params


def test_an_engine_sees_one_grammar_only() -> None:
    for name, value in (("json_schema", {"maximum": 2**80}), ("regex", "a"), ("choice", ["a"])):
        params = with_grammar(SamplingParams(**{name: value}))
        assert params.structure == "grammar" and getattr(params, name) is None


@pytest.mark.parametrize("first", range(len(STRUCTURES)))
def test_structures_exclude_one_another(first: int) -> None:
    values: dict[str, Any] = {
        "json_schema": {},
        "regex": "a",
        "choice": ["a"],
        "grammar": "start: ",
    }
    for second in range(first + 1, len(STRUCTURES)):
        names = STRUCTURES[first], STRUCTURES[second]
        with pytest.raises(RequestError, match=f"{names[0]} and {names[1]} exclude") as raised:
            SamplingParams(**{name: values[name] for name in names})
        assert raised.value.param == names[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("json_schema", {"type": "wizard"}),
        ("json_schema", "{"),
        ("json_schema", {"enum": [float("nan")]}),
        ("json_schema", ["object"]),
        ("json_schema", {"title": "\ud800"}),
        ("json_schema", {1: 2}),
        ("regex", "(a"),
        ("regex", "(?<=a)b"),
        ("regex", b"a"),
        ("choice", "yes"),
        ("choice", []),
        ("choice", ["a" * 2**15, "b" * 2**15]),
        ("choice", {"yes", "no"}),
        ("grammar", "start: ("),
    ],
)
def test_a_wrong_structure_is_an_error_with_its_own_name(
    llm: LLM, field: str, value: object
) -> None:
    with pytest.raises(RequestError, match=field) as raised:
        llm.chat(CHAT, SamplingParams(**{field: value}))  # type: ignore[arg-type]
    assert raised.value.param == field


def test_a_schema_is_kept_as_it_was(llm: LLM) -> None:
    schema = {"type": "integer", "enum": [7]}
    params = SamplingParams(json_schema=schema, max_tokens=64)
    schema["type"] = "string"
    assert params.json_schema == {"type": "integer", "enum": [7]}
