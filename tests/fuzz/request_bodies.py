"""Target ``bodies``: a JSON body, as the routes see it, down to the request for the engine.

The first byte chooses the API. A body ends as compiled requests that survive the way to the engine,
or as a RequestError or a ValidationError, which becomes one.
"""

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from s1engine.engine import messages
from s1engine.errors import RequestError
from s1engine.sampling_params import SamplingParams
from s1engine.server.api.anthropic import MessagesRequest
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.completions import CompletionRequest
from s1engine.server.api.request_fields import request_error
from s1engine.server.api.responses import ResponsesRequest
from s1engine.server.api.tokenization import DetokenizeRequest, TokenizeRequest
from tests.fuzz.echo_engine import create_compiler
from tests.fuzz.target import Target

KINDS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    MessagesRequest,
    ResponsesRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def _compile(body: Any) -> None:
    if isinstance(body, MessagesRequest | ResponsesRequest):
        body = body.to_chat()
    if not isinstance(body, ChatRequest | CompletionRequest):
        return
    compiler = create_compiler()
    options = {**body.options(), "stream": body.stream}
    prompts = body.prompts()
    params = body.sampling_params(compiler.default_sampling())
    assert isinstance(params, SamplingParams)
    for prompt in prompts:
        request = compiler.compile(prompt, params, **options)
        assert 0 < len(request.prompt) < request.max_len <= compiler.max_model_len
        (frame,) = messages.FrameReader().feed(messages.encode_frame(messages.AddRequest(request)))
        messages.to_engine_decoder.decode(frame)


def run(data: bytes) -> None:
    kind = KINDS[(data[0] if data else 0) % len(KINDS)]
    try:
        value = json.loads(data[1:])
    except (ValueError, RecursionError):
        return  # FastAPI refuses it
    try:
        _compile(kind.model_validate(value))
    except ValidationError as error:
        assert str(request_error(error))
    except RequestError as error:
        assert str(error)
        str(error).encode()  # it becomes JSON


def _words() -> set[bytes]:
    """Names of fields and small values."""
    names: set[str] = {
        "true",
        "false",
        "null",
        "[]",
        "{}",
        "0",
        "-1",
        "1e308",
        "1e-308",
        '"\\ud800"',
    }
    for kind in KINDS:
        for name, field in kind.model_fields.items():
            names.add(f'"{field.alias or name}":')
    keys = "role content type text name arguments function schema json_schema regex parameters"
    values = "user assistant system tool text json_object"
    names |= {f'"{word}":' for word in keys.split()} | {f'"{word}"' for word in values.split()}
    return {name.encode() for name in names}


TARGETS = {"bodies": Target(run, _words())}
