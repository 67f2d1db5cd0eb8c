"""Structured answers: thinking is free, the answer follows its grammar, and a bad grammar is
rejected without side effects."""

import json
import re
from typing import Any

import pytest

from tests.server.conftest import Served

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}],
    "max_tokens": 200,
    "temperature": 0,
}
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"c": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["c"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def ask(served: Served, **fields: Any) -> list[dict[str, Any]]:
    answer = served.http.post(PATH, json={**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


@pytest.mark.parametrize("budget", [{}, {"thinking_token_budget": 5}, {"thinking_token_budget": 0}])
def test_an_answer_is_json_of_the_schema_and_thinking_is_free(
    served: Served, budget: dict[str, Any]
) -> None:
    (plain,) = ask(served, **budget)
    (choice,) = ask(served, **budget, response_format=AS_SCHEMA)
    value = json.loads(choice["message"]["content"])
    assert set(value) == {"c"} and 0 <= value["c"] <= 99
    assert choice["message"]["reasoning"] == plain["message"]["reasoning"]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, '{"c":[0-9]+}'),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '{"c":[0-9]+}'),
        ({"guided_json": SCHEMA}, '{"c":[0-9]+}'),
        ({"structured_outputs": {"json_object": True}}, "{.*}"),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "yes|no"),
        (
            {"structured_outputs": {"grammar": 'root ::= word+\nword ::= [a-c]{2} "!"'}},
            "([a-c]{2}!)+",
        ),
        ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
    ],
)
def test_other_engines_spellings_of_a_structure(
    served: Served, fields: dict[str, Any], form: str
) -> None:
    (choice,) = ask(served, **fields, thinking_token_budget=5)
    done = choice["finish_reason"] == "stop"
    assert re.fullmatch(form, choice["message"]["content"]) or not done


def test_without_thinking_the_grammar_begins_at_once(served: Served) -> None:
    choices = ask(
        served, enable_thinking=False, structured_outputs={"regex": "[a-c]{3}x"}, n=4, temperature=1
    )
    assert all(re.fullmatch("[a-c]{3}x", choice["message"]["content"]) for choice in choices)


def test_samples_checkpoints_and_streams_follow_it_too(served: Served) -> None:
    body = {
        **CHAT,
        "structured_outputs": {"choice": ["yes", 'no "quoted"']},
        "thinking_checkpoints": [0, 3],
        "n": 3,
        "temperature": 1.2,
        "seed": 7,
    }
    answer = served.http.post(PATH, json=body).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    texts += [checkpoint["text"] for checkpoint in answer["checkpoints"]]
    assert len(texts) == 9 and set(texts) <= {"yes", 'no "quoted"'}
    streamed = {0: "", 1: "", 2: ""}
    with served.http.stream("POST", PATH, json={**body, "stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    streamed[choice["index"]] += choice["delta"].get("content", "")
    assert list(streamed.values()) == texts[:3]


def test_a_grammar_that_explodes_ends_its_own_answer_alone(served: Served) -> None:
    bomb = {**CHAT, "structured_outputs": {"regex": "(a{999}){999}"}}
    assert served.http.post(PATH, json=bomb).status_code in (200, 400)
    (choice,) = ask(served)
    assert choice["message"]["content"].startswith("Final Answer")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "wizard"}},
                }
            },
            "response_format",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?<=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "x" * 2**17}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs"),
        ({"guided_grammar": "root ::= " + "(" * 9999}, "guided_grammar"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_a_bad_grammar_is_named_and_harms_no_other_request(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    answer = served.http.post(PATH, json={**CHAT, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert served.http.get("/health").status_code == 200
