"""Answers from an OpenAI-compatible server: one thread for each request in flight.

A temporary failure (connection, time-out, 429, 5xx) is tried again after a growing pause; the last
failure becomes the response. Bodies contain thinking fields only if they differ from the defaults,
so any server can answer runs without budgets.
"""

import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from s1engine.eval.backend import EvalRequest, EvalResponse, EvalSample
from s1engine.sampling_params import SamplingParams, ThinkingBudget

TEMPORARY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
FIRST_PAUSE_S = 0.5  # doubles with every try
LONGEST_PAUSE_S = 30.0
UNKNOWN_MODEL = "default"  # for servers that do not list their models


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpOptions:
    """A server, and how to call it."""

    base_url: str
    """Up to and including ``/v1``."""
    api_key: str | None = None
    model: str | None = None
    """None: the first model that the server lists."""
    concurrency: int = 64
    """Requests in flight at once."""
    timeout_s: float = 600.0
    """Of one request."""
    retries: int = 4
    """Tries after the first."""
    first_pause_s: float = FIRST_PAUSE_S


class _FailedError(Exception):
    """A request failed permanently, or has no tries left."""


class HttpBackend:
    """A ``Backend`` over HTTP. Close it after use."""

    def __init__(self, options: HttpOptions) -> None:
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        limits = httpx.Limits(max_connections=options.concurrency)
        self._client = httpx.Client(
            base_url=options.base_url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(options.timeout_s, connect=min(options.timeout_s, 20.0)),
            limits=limits,
        )
        self._options = options
        self._pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="eval-http")
        self._ready: queue.SimpleQueue[EvalResponse] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._outstanding = 0
        self._generated = 0
        self._model = options.model or self._first_model()

    @property
    def name(self) -> str:
        return self._model

    @property
    def max_thinking(self) -> int | None:
        return None

    @property
    def can_think(self) -> bool:
        return True

    @property
    def generated_tokens(self) -> int:
        return self._generated

    def submit(self, request: EvalRequest) -> None:
        self._outstanding += 1
        self._pool.submit(self._run_request, request)

    def responses(self) -> Iterator[EvalResponse]:
        try:
            while self._outstanding:
                response = self._ready.get()
                self._outstanding -= 1
                self._generated += sum(sample.output_tokens for sample in response.samples)
                yield response
        finally:
            if self._outstanding:
                self.close()

    def close(self) -> None:
        """Drops the requests in flight and closes the connections."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _first_model(self) -> str:
        try:
            return str(self._client.get("models").json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return UNKNOWN_MODEL

    def _run_request(self, request: EvalRequest) -> None:
        begin = time.monotonic()
        samples: tuple[EvalSample, ...] = ()
        checkpoints: tuple[tuple[int, EvalSample], ...] = ()
        error = None
        try:
            answer = self._post(request_body(request, self._model))
            samples, checkpoints = read_samples(answer), read_checkpoints(answer)
        except _FailedError as failure:
            error = str(failure)
        except (LookupError, TypeError, ValueError, AttributeError) as failure:
            error = f"the answer is no chat completion ({type(failure).__name__}: {failure})"
        except Exception as failure:  # responses() waits for this thread's response
            error = f"{type(failure).__name__}: {failure}"
        self._ready.put(
            EvalResponse(request, samples, time.monotonic() - begin, error, checkpoints)
        )

    def _post(self, body: dict[str, Any]) -> Any:
        """The answer's JSON. Raises _FailedError after a permanent failure or the last try."""
        for attempt in range(self._options.retries + 1):
            retry_after = None
            try:
                response = self._client.post("chat/completions", json=body)
                if response.is_success:
                    return response.json()
                failure = f"HTTP {response.status_code}: {_message(response)}"
                if response.status_code not in TEMPORARY:
                    raise _FailedError(failure)
                retry_after = response.headers.get("retry-after")
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}".rstrip(": ")
            if attempt < self._options.retries and not self._pause(attempt, retry_after):
                break
        raise _FailedError(f"{failure} (after {attempt + 1} tries)")

    def _pause(self, attempt: int, retry_after: str | None) -> bool:
        """Waits before the next try, with random jitter; False if the backend was closed."""
        pause = self._options.first_pause_s * 2**attempt * random.uniform(0.5, 1.0)
        if retry_after is not None and retry_after.isdecimal():
            pause = max(pause, float(retry_after))
        return not self._stopped.wait(min(pause, LONGEST_PAUSE_S))


def _message(response: httpx.Response) -> str:
    """The server's error message, its first line."""
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        text = response.text
    return text.strip().partition("\n")[0][:300] or response.reason_phrase


# --- chat completions: request body and answer ---


def request_body(request: EvalRequest, model: str) -> dict[str, Any]:
    """The body of a request, without fields that have their default."""
    params, neutral = request.params, SamplingParams()
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": request.prompt}],
        "temperature": params.temperature,
        "seed": params.seed,
    }
    for name in ("n", "max_tokens", "top_p", "top_k", "min_p"):
        if getattr(params, name) != getattr(neutral, name):
            body[name] = getattr(params, name)
    if params.logprobs is not None:
        body["logprobs"] = True
    return body | _thinking_fields(params.thinking)


def _thinking_fields(budget: ThinkingBudget | None) -> dict[str, Any]:
    if budget is None:
        return {}
    fields, neutral = _http_fields(budget), _http_fields(ThinkingBudget())
    return {name: value for name, value in fields.items() if value != neutral[name]}


def _http_fields(budget: ThinkingBudget) -> dict[str, Any]:
    return {
        "thinking_token_budget": budget.max_tokens,
        "min_thinking_tokens": budget.min_tokens,
        "num_waits": budget.num_waits,
        "wait_text": budget.wait_text,
        "final_text": budget.final_text,
        "answer_reserve": budget.answer_reserve,
        "thinking_checkpoints": list(budget.checkpoints),
    }


def read_samples(answer: Any) -> tuple[EvalSample, ...]:
    """The samples of a chat completion. A token count over all samples is divided evenly."""
    usage = answer.get("usage") or {}
    choices = answer["choices"]
    if not choices:
        raise ValueError("no choices")
    return tuple(_sample(choice, usage, len(choices)) for choice in choices)


def read_checkpoints(answer: Any) -> tuple[tuple[int, EvalSample], ...]:
    """The answers at checkpoints of the first choice, which s1engine's server returns."""
    samples = []
    for checkpoint in answer.get("checkpoints") or ():
        if checkpoint["index"] == 0:
            figures = checkpoint["thinking"]
            sample = EvalSample(
                text=checkpoint["text"],
                thinking_tokens=figures["tokens"],
                output_tokens=checkpoint["completion_tokens"],
                forced_tokens=figures["forced_tokens"],
                waits_used=figures["waits_used"],
                end_reason=figures["end_reason"],
                finish_reason=checkpoint["finish_reason"],
            )
            samples.append((int(checkpoint["budget"]), sample))
    return tuple(samples)


def _sample(choice: dict[str, Any], usage: dict[str, Any], count: int) -> EvalSample:
    message = choice["message"]
    text = message.get("content") or ""
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    figures = _figures(choice, usage, count)
    total = (usage.get("completion_tokens") or 0) // count
    thinking, estimated = _thinking_tokens(figures, usage, count), False
    if thinking is None:
        thinking = round(total * len(reasoning) / max(len(reasoning) + len(text), 1))
        estimated = bool(reasoning)
    return EvalSample(
        text=text,
        thinking_tokens=thinking,
        output_tokens=max(total, thinking),
        forced_tokens=figures.get("forced_tokens") or 0,
        waits_used=figures.get("waits_used") or 0,
        end_reason=figures.get("end_reason"),
        finish_reason=choice.get("finish_reason"),
        mean_logprob=_mean_logprob(choice),
        estimated=estimated,
        segments=((reasoning, False), (text, False)),
    )


def _thinking_tokens(figures: dict[str, Any], usage: dict[str, Any], count: int) -> int | None:
    """The server's count; None without one."""
    if figures.get("tokens") is not None:
        return int(figures["tokens"])
    details = usage.get("completion_tokens_details") or {}
    total = details.get("reasoning_tokens")
    return None if total is None else int(total) // count


def _figures(choice: dict[str, Any], usage: dict[str, Any], count: int) -> dict[str, Any]:
    """s1engine's thinking figures of one sample, if the server returns them."""
    own = choice.get("thinking")
    if isinstance(own, dict):
        return own
    shared = usage.get("thinking")
    if isinstance(shared, list) and len(shared) == count:
        shared = shared[choice.get("index") or 0]
    elif count > 1:
        shared = None
    return shared if isinstance(shared, dict) else {}


def _mean_logprob(choice: dict[str, Any]) -> float | None:
    content = (choice.get("logprobs") or {}).get("content") or []
    sampled = [float(token["logprob"]) for token in content if not token.get("forced")]
    return sum(sampled) / len(sampled) if sampled else None
