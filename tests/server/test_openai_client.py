"""The server through the official client; its answers equal the engine's offline ones."""

from typing import Any

import pytest

from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.server.conftest import Served

CHAT: list[Any] = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
EXTRA = {"thinking_token_budget": 40, "num_waits": 1, "return_token_ids": True}


def offline(llm: LLM, **fields: Any) -> Any:
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(max_tokens=40, num_waits=1))
    return llm.chat(CHAT, params, progress=False, **fields)[0]


def test_a_chat_equals_the_engine_offline(served: Served, llm: LLM) -> None:
    wanted = offline(llm)
    got = served.client.chat.completions.create(model="s1-nano", messages=CHAT, extra_body=EXTRA)
    choice, sample = got.choices[0], wanted.outputs[0]
    assert choice.message.content == sample.text
    assert choice.message.reasoning == sample.reasoning  # type: ignore[attr-defined]
    assert choice.message.reasoning_content == sample.reasoning  # type: ignore[attr-defined]
    assert choice.token_ids == sample.token_ids  # type: ignore[attr-defined]
    assert choice.forced == sample.forced and sum(sample.forced) > 0  # type: ignore[attr-defined]
    assert choice.finish_reason == sample.finish_reason
    assert got.usage is not None and got.usage.completion_tokens_details is not None
    assert got.usage.completion_tokens == len(sample.token_ids)
    assert got.usage.completion_tokens_details.reasoning_tokens == sample.thinking.tokens
    thinking = got.usage.thinking  # type: ignore[attr-defined]
    assert thinking["tokens"] <= 40 and thinking["waits_used"] == 1 == sample.thinking.waits_used
    assert thinking["end_reason"] == sample.thinking.end_reason


def test_a_stream_joins_to_the_whole(served: Served, llm: LLM) -> None:
    sample = offline(llm).outputs[0]
    chunks = list(
        served.client.chat.completions.create(
            model="s1-nano",
            messages=CHAT,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXTRA,
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant" and all(d.role is None for d in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == sample.text
    reasoning = [getattr(delta, "reasoning", None) or "" for delta in deltas]
    assert "".join(reasoning) == sample.reasoning and len([r for r in reasoning if r]) > 1
    ids = [token for chunk in chunks[:-1] for token in chunk.choices[0].token_ids]  # type: ignore[attr-defined]
    assert ids == sample.token_ids
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == [sample.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(sample.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_thinking_can_be_switched_off(served: Served) -> None:
    got = served.client.chat.completions.create(
        model="s1-nano", messages=CHAT, max_tokens=5, extra_body={"enable_thinking": False}
    )
    message = got.choices[0].message
    assert got.usage is not None and got.usage.completion_tokens_details is not None
    assert got.usage.thinking["budget"] is None  # type: ignore[attr-defined]
    # s1-nano opens its thinking itself: then it is reasoning, and counted.
    assert "think" not in (message.content or "")
    count = got.usage.completion_tokens_details.reasoning_tokens
    assert (count == 0) == (message.reasoning is None)  # type: ignore[attr-defined]


def test_samples_seeds_and_stops(served: Served) -> None:
    def ask(**fields: Any) -> list[str | None]:
        got = served.client.chat.completions.create(
            model="s1-nano", messages=CHAT, n=3, temperature=1.5, max_completion_tokens=60, **fields
        )
        assert [choice.index for choice in got.choices] == [0, 1, 2]
        return [choice.message.content for choice in got.choices]

    assert ask(seed=1) == ask(seed=1)
    assert len({str(ask(seed=seed)) for seed in range(4)}) > 1
    stopped = served.client.chat.completions.create(
        model="s1-nano", messages=CHAT, stop=["Answer"], max_tokens=80
    )
    assert stopped.choices[0].message.content == "Final "


def test_logprobs_carry_the_mask_of_forced_tokens(served: Served) -> None:
    got = served.client.chat.completions.create(
        model="s1-nano", messages=CHAT, logprobs=True, top_logprobs=2, extra_body=EXTRA
    )
    choice = got.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    thinking = choice.logprobs.reasoning  # type: ignore[attr-defined]
    entries = [*thinking, *(entry.to_dict() for entry in choice.logprobs.content)]
    assert [int(entry["forced"]) for entry in entries] == choice.forced  # type: ignore[attr-defined]
    for entry in entries:
        if not entry["forced"]:
            assert entry["token"] == entry["top_logprobs"][0]["token"]  # greedy
            assert bytes(entry["bytes"]).decode() in ("", entry["token"])


def test_completions_of_several_prompts(served: Served, llm: LLM) -> None:
    prompts = ["a=3 b=a+4", "x=1 y=", "q"]
    params = SamplingParams(temperature=0, max_tokens=6)
    wanted = [o.outputs[0].text for o in llm.generate(prompts, params, progress=False)]
    fields: Any = {"model": "s1-nano", "prompt": prompts, "max_tokens": 6, "temperature": 0}
    got = served.client.completions.create(**fields)
    assert [choice.text for choice in got.choices] == wanted
    texts = ["", "", ""]
    for chunk in served.client.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_completion_logprobs(served: Served) -> None:
    got = served.client.completions.create(
        model="s1-nano", prompt="a=3 b=", max_tokens=4, logprobs=1, temperature=0
    )
    entry = got.choices[0].logprobs
    assert entry is not None and entry.tokens is not None and entry.text_offset is not None
    assert len(entry.tokens) == 4 == len(entry.token_logprobs or [])
    for i, token in enumerate(entry.tokens[1:], 1):
        assert entry.text_offset[i] == entry.text_offset[i - 1] + len(entry.tokens[i - 1])
        assert token in (entry.top_logprobs or [])[i]


def test_models_and_tokens(served: Served, llm: LLM) -> None:
    assert [model.id for model in served.client.models.list()] == ["s1-nano"]
    assert served.client.models.retrieve("s1-nano").id == "s1-nano"
    text = "a=3 <|im_start|>think\nnaïve 🙂"
    tokens = served.http.post("/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == llm.engine.tokenizer.encode(text) and tokens["max_model_len"] == 2048
    back = served.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    chat = served.http.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert chat == llm.engine.make_request(CHAT, SamplingParams()).prompt.tolist()


def test_health_is_open_and_everything_else_is_locked(served: Served) -> None:
    with_wrong_key = {"Authorization": "Bearer wrong"}
    for headers in ({"Authorization": ""}, with_wrong_key):
        assert served.http.get("/health", headers=headers).status_code == 200
        for path in ("/v1/models", "/version", "/openapi.json"):
            answer = served.http.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert served.http.get("/version").json()["version"]


def test_checkpoints_come_with_the_answer_and_along_a_stream(served: Served, llm: LLM) -> None:
    extra = {"thinking_checkpoints": [0, 8, 16], "return_token_ids": True, "max_tokens": 90}
    budget = ThinkingBudget(checkpoints=(0, 8, 16))
    params = SamplingParams(temperature=0, max_tokens=90, thinking=budget)
    wanted = llm.chat(CHAT, params, progress=False)[0].checkpoints
    body = {"messages": CHAT, **extra}
    whole = served.http.post("/v1/chat/completions", json=body).json()
    assert [c["budget"] for c in whole["checkpoints"]] == [0, 8, 16]
    for got, checkpoint in zip(whole["checkpoints"], wanted, strict=True):
        assert got["text"] == checkpoint.output.text and got["index"] == 0
        assert got["token_ids"] == checkpoint.output.token_ids
        assert got["thinking"]["tokens"] <= got["budget"]
    assert whole["usage"]["checkpoint_tokens"] > 0
    chunks = served.client.chat.completions.create(
        model="s1-nano", messages=CHAT, stream=True, extra_body=extra
    )
    streamed = [chunk.checkpoint for chunk in chunks if not chunk.choices]  # type: ignore[attr-defined]
    assert streamed == whole["checkpoints"]


@pytest.mark.parametrize("name", ["cmpl-none", "x" * 300])
def test_ending_the_thinking_of_an_unknown_request_is_404(served: Served, name: str) -> None:
    assert served.http.post(f"/v1/requests/{name}/end_thinking").status_code == 404


def test_a_client_can_end_the_thinking(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model="s1-nano",
        messages=CHAT,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"min_thinking_tokens": 1500},
    )
    for count, chunk in enumerate(stream):
        if count == 5:
            ended = served.http.post(f"/v1/requests/{chunk.id}/end_thinking")
            assert ended.status_code == 200
    assert chunk.usage is not None
    thinking = chunk.usage.thinking  # type: ignore[attr-defined]
    assert thinking["end_reason"] == "client" and thinking["tokens"] < 1500
