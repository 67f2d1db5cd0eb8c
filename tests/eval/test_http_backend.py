"""The backend over HTTP, against a local server that fails on purpose."""

import threading
from typing import Any

import pytest

from s1engine.eval.backend import EvalRequest, EvalResponse
from s1engine.eval.http_backend import HttpBackend, HttpOptions, read_samples, request_body
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.eval.stub_server import Answerer, StubServer, completion, serving

PLAIN = SamplingParams(temperature=0, seed=3)


def responses(
    server: StubServer, requests: list[EvalRequest], **options: Any
) -> list[EvalResponse]:
    options = {"first_pause_s": 0.01, "retries": 2, "timeout_s": 60.0} | options
    backend = HttpBackend(HttpOptions(base_url=server.url, **options))
    try:
        for request in requests:
            backend.submit(request)
        return sorted(backend.responses(), key=lambda response: response.request.key)
    finally:
        backend.close()


def one(answer: Answerer, **options: Any) -> tuple[EvalResponse, StubServer]:
    with serving(answer) as server:
        (response,) = responses(server, [EvalRequest(0, "why?", PLAIN)], **options)
        return response, server


def test_a_response_has_its_figures() -> None:
    response, server = one(
        lambda body: completion("Answer: 4", tokens=20, thinking=12), api_key="k"
    )
    (sample,) = response.samples
    assert (sample.text, sample.thinking_tokens, sample.output_tokens) == ("Answer: 4", 12, 20)
    assert not sample.estimated and response.error is None and response.seconds > 0
    (body,) = server.bodies
    assert body == {
        "model": "stub-model",
        "messages": [{"role": "user", "content": "why?"}],
        "temperature": 0,
        "seed": 3,
    }
    assert server.headers[0]["Authorization"] == "Bearer k"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_temporary_failures_are_tried_again(status: int) -> None:
    script = [(status, {}, {"error": {"message": "busy"}})] * 2 + [completion("Answer: 4")]
    response, server = one(lambda body: script.pop(0))
    assert response.error is None and response.samples[0].text == "Answer: 4"
    assert len(server.bodies) == 3


def test_a_repeated_failure_is_recorded() -> None:
    response, server = one(lambda body: (500, {}, {"error": {"message": "out of\nmemory"}}))
    assert response.error == "HTTP 500: out of (after 3 tries)" and response.samples == ()
    assert len(server.bodies) == 3


def test_a_refusal_is_not_tried_again() -> None:
    response, server = one(lambda body: (400, {}, {"error": {"message": "too long"}}))
    assert response.error == "HTTP 400: too long" and len(server.bodies) == 1


@pytest.mark.parametrize("body", [b"<html>", {}, {"choices": []}, {"choices": [{}]}, [], 3])
def test_nonsense_is_recorded(body: Any) -> None:
    response, _ = one(lambda _: (200, {}, body))
    assert response.error is not None and "no chat completion" in response.error


def test_a_slow_server_times_out() -> None:
    over = threading.Event()

    def answer(body: Any) -> None:
        over.wait(60)

    with serving(answer) as server:
        (response,) = responses(
            server, [EvalRequest(0, "why?", PLAIN)], timeout_s=0.05, retries=1, model="m"
        )
        over.set()
    assert response.error is not None and "Timeout" in response.error
    assert response.error.endswith("(after 2 tries)")


def test_a_missing_server_is_recorded() -> None:
    with serving(lambda body: completion("Answer: 1")) as server:
        pass
    (response,) = responses(server, [EvalRequest(0, "why?", PLAIN)])
    assert response.error is not None and "ConnectError" in response.error


def test_retry_after_is_respected() -> None:
    script = [(503, {"retry-after": "1"}, {}), completion("x")]
    response, _ = one(lambda body: script.pop(0))
    assert response.error is None and response.seconds >= 1


def test_requests_are_concurrent_up_to_the_bound() -> None:
    together = threading.Barrier(4)  # answers only after four requests

    def answer(body: Any) -> dict[str, Any]:
        together.wait(60)
        return completion("Answer: 1")

    with serving(answer, models=False) as server:
        found = responses(server, [EvalRequest(i, "?", PLAIN) for i in range(12)], concurrency=4)
    assert [response.request.key for response in found] == list(range(12))
    assert server.most_at_once == 4
    assert {body["model"] for body in server.bodies} == {"default"}


def test_a_request_may_follow_a_response() -> None:
    with serving(lambda body: completion("Answer: 1")) as server:
        backend = HttpBackend(HttpOptions(base_url=server.url))
        backend.submit(EvalRequest(0, "first", PLAIN))
        seen = []
        for response in backend.responses():
            seen.append(response.request.key)
            if response.request.key < 3:
                backend.submit(EvalRequest(response.request.key + 1, "next", PLAIN))
        backend.close()
    assert seen == [0, 1, 2, 3]


def test_only_thinking_fields_without_their_default_are_sent() -> None:
    thinking = ThinkingBudget(max_tokens=0, num_waits=2, wait_text="Hmm")
    params = SamplingParams(n=3, max_tokens=50, seed=1, logprobs=0, thinking=thinking)
    body = request_body(EvalRequest(0, "?", params), "m")
    given = {k: v for k, v in body.items() if k not in ("model", "messages", "temperature", "seed")}
    assert given == {
        "n": 3,
        "max_tokens": 50,
        "logprobs": True,
        "thinking_token_budget": 0,
        "num_waits": 2,
        "wait_text": "Hmm",
    }


def test_figures_of_this_engine_are_preferred_to_shared_counts() -> None:
    answer = completion("a", tokens=30, thinking=12)
    answer["usage"]["thinking"] = {"tokens": 11, "waits_used": 2, "end_reason": "budget"}
    (sample,) = read_samples(answer)
    assert (sample.thinking_tokens, sample.waits_used, sample.end_reason) == (11, 2, "budget")
    two = completion("a", "b", tokens=30, thinking=12)
    assert [s.thinking_tokens for s in read_samples(two)] == [6, 6]
    assert [s.output_tokens for s in read_samples(two)] == [15, 15]


def test_uncounted_thinking_is_estimated_and_marked() -> None:
    answer = completion("aa", tokens=40)
    answer["choices"][0]["message"]["reasoning_content"] = "a" * 6
    (sample,) = read_samples(answer)
    assert (sample.thinking_tokens, sample.estimated) == (30, True)
    assert [s.estimated for s in read_samples(completion("aa"))] == [False]


def test_log_probabilities_are_averaged_over_sampled_tokens() -> None:
    answer = completion("a")
    tokens = [{"logprob": -1.0}, {"logprob": 0.0, "forced": True}, {"logprob": -3.0}]
    answer["choices"][0]["logprobs"] = {"content": tokens}
    assert read_samples(answer)[0].mean_logprob == -2
