"""Log-probabilities over HTTP: of prompts, echoed or in vLLM's shape, of text and of reasoning."""

import json
from typing import Any

import pytest

from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams
from tests.server.conftest import Served

PROMPT = "a=3 b=a+4"
CHAT = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]


def post(served: Served, path: str, **body: Any) -> dict[str, Any]:
    answer = served.http.post(f"/v1/{path}", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chunks(served: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    text = served.http.post(f"/v1/{path}", json={"temperature": 0, "stream": True, **body}).text
    events = [line[6:] for line in text.split("\n\n") if line.startswith("data: {")]
    return [choice for event in events for choice in json.loads(event)["choices"]]


def joined(parts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Arrays of a stream's logprobs, one after another."""
    whole: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in (part["logprobs"] or {}).items():
            if isinstance(values, list):
                whole.setdefault(name, []).extend(values)
    return whole


@pytest.mark.parametrize("prompt", [PROMPT, [40, 41, 42, 7, 9]])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_an_echo_is_the_prompt_and_its_logprobs(
    served: Served, llm: LLM, prompt: Any, max_tokens: int
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    answer = post(served, "completions", **body)
    (choice,) = answer["choices"]
    text = prompt if isinstance(prompt, str) else llm.engine.tokenizer.decode(prompt, False)
    assert choice["text"].startswith(text) and choice["finish_reason"] == "length"
    arrays = choice["logprobs"]
    count = answer["usage"]["prompt_tokens"]
    assert len(arrays["tokens"]) - count == max_tokens == answer["usage"]["completion_tokens"]
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=2))
    want = [score and score.logprob for score in output.prompt_logprobs or ()]
    assert arrays["token_logprobs"][:count] == pytest.approx(want, abs=1e-4)
    assert arrays["token_logprobs"][0] is None and arrays["top_logprobs"][0] is None
    for token, offset in zip(arrays["tokens"], arrays["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)
    parts = chunks(served, "completions", **body)
    assert parts[0]["text"].startswith(text)
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert joined(parts) == {name: v for name, v in arrays.items() if isinstance(v, list)}


def test_an_echo_without_logprobs_and_of_several_prompts(served: Served) -> None:
    body = {"prompt": ["a=1", "b=2 b?"], "n": 2, "echo": True, "max_tokens": 2, "seed": 1}
    texts = [choice["text"] for choice in post(served, "completions", **body)["choices"]]
    assert [text[:3] for text in texts] == ["a=1", "a=1", "b=2", "b=2"]
    streamed = dict.fromkeys(range(4), "")
    for part in chunks(served, "completions", **body):
        assert part["logprobs"] is None
        streamed[part["index"]] += part["text"]
    assert list(streamed.values()) == texts


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_prompt_logprobs_have_vllms_shape(served: Served, path: str) -> None:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": CHAT}
    answer = post(served, path, **prompt, prompt_logprobs=2, max_tokens=0)
    owner = answer["choices"][0] if path == "completions" else answer
    first, *rest = owner["prompt_logprobs"]
    assert first is None and answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for entry in rest:
        assert 2 <= len(entry) <= 3
        for item in entry.values():
            assert item.keys() == {"logprob", "rank", "decoded_token"}
        assert {1, 2} <= {item["rank"] for item in entry.values()}
    (part, *_) = chunks(served, path, **prompt, prompt_logprobs=2, max_tokens=1)
    assert part["prompt_logprobs"] == owner["prompt_logprobs"]


def test_a_long_prompt_is_sent_in_pieces(served: Served) -> None:
    ids = [40 + i % 50 for i in range(300)]
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "prompt_logprobs": 1}
    (choice,) = post(served, "completions", **body)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 301 and len(choice["prompt_logprobs"]) == 300
    assert joined(chunks(served, "completions", **body)) == choice["logprobs"]


@pytest.mark.parametrize("fields", [{}, {"enable_thinking": False}, {"thinking_token_budget": 6}])
def test_logprobs_of_a_chat_are_those_of_its_content(
    served: Served, fields: dict[str, Any]
) -> None:
    body = {"messages": CHAT, "logprobs": True, "top_logprobs": 1, "max_tokens": 90, **fields}
    choice = post(served, "chat/completions", **body)["choices"][0]
    message, logprobs = choice["message"], choice["logprobs"]
    for name, text in (("content", message["content"]), ("reasoning", message["reasoning"])):
        data = b"".join(bytes(entry["bytes"]) for entry in logprobs.get(name, ()))
        assert data.decode() == (text or "")
    assert "think" not in message["content"]
    parts = chunks(served, "chat/completions", **body)
    assert joined(parts) == logprobs
    assert "".join(part["delta"].get("content") or "" for part in parts) == message["content"]


def test_thinking_of_a_completion_has_arrays_of_its_own(served: Served) -> None:
    body = {"prompt": CHAT[0]["content"], "thinking_token_budget": 8, "max_tokens": 60}
    (choice,) = post(served, "completions", **body, logprobs=0)["choices"]
    arrays = choice["logprobs"]
    assert len(arrays["reasoning"]["tokens"]) >= 8
    for name, text in ((None, choice["text"]), ("reasoning", choice["reasoning"])):
        own = arrays if name is None else arrays[name]
        assert len(own["tokens"]) == len(own["text_offset"])
        assert own["text_offset"] == sorted(own["text_offset"])
        assert all(0 <= offset <= len(text) for offset in own["text_offset"])


def test_min_tokens_over_http(served: Served) -> None:
    plain = post(served, "chat/completions", messages=CHAT, max_tokens=200)
    tokens = plain["usage"]["completion_tokens"]
    longer = post(served, "chat/completions", messages=CHAT, max_tokens=200, min_tokens=tokens + 20)
    assert longer["usage"]["completion_tokens"] > tokens + 20


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": PROMPT, "prompt_logprobs": 21}, "prompt_logprobs"),
        ("completions", {"prompt": PROMPT, "echo": "x"}, "echo"),
        ("chat/completions", {"messages": CHAT, "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        (
            "chat/completions",
            {"messages": CHAT, "max_completion_tokens": 0},
            "max_completion_tokens",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(
    served: Served, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = served.http.post(f"/v1/{path}", json=fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
