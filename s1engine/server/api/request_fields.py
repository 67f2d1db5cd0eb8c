"""What a request body may hold, and what it becomes: a prompt, SamplingParams, and options.

Fields carry OpenAI's names where OpenAI has them, vLLM's else. Types are checked here, bounds by
SamplingParams, fit by the engine's compiler; each failure is a RequestError that names the field.
A field that is not known, or asks for what the engine does not do, is refused, never ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from s1engine.config import check_int
from s1engine.engine.request import Prompt
from s1engine.errors import RequestError
from s1engine.sampling_params import MAX_LOGPROBS, SamplingParams
from s1engine.server.api.structured_outputs import ResponseFormat, StructuredOutputs, build_grammar
from s1engine.server.api.thinking_fields import EFFORTS, STRICT, ThinkingFields, resolve_spellings
from s1engine.server.api.tools import Tool, ToolFields

MAX_PROMPTS = 256
MAX_TEMPLATE_KWARGS = 32

# Fields of OpenAI's that change nothing here at these values, and are refused at any other.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    model_config = STRICT

    include_usage: bool = False


class GenerationFields(ThinkingFields):
    """Fields of chats and completions alike, and of a row of ``s1engine generate --input``."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(description="Lower runs first")] = 0
    cache_salt: Annotated[
        str | None, Field(description="Requests share cached prefixes only with the same salt")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, allowed in NEUTRAL.items():
            if name in cls.model_fields or name not in values:
                continue
            if not any(_same(values[name], value) for value in allowed):
                raise RequestError(f"{name} is not supported", param=name)
        known = cls.model_fields
        return {name: v for name, v in values.items() if name in known or name not in NEUTRAL}

    @property
    def has_grammar(self) -> bool:
        """Must the answer keep to one?"""
        return self.response_format is not None or self.structured_outputs is not None

    def grammar(self) -> str | None:
        """It, if so. Raises RequestError."""
        return build_grammar(self.response_format, self.structured_outputs)

    def blame(self, error: RequestError) -> RequestError:
        """The same error, of the field that the grammar was made of."""
        return error

    def requested_logprobs(self) -> int | None:
        """How many log-probabilities of each token, as SamplingParams counts them."""
        return None

    def requested_max_tokens(self) -> int | None:
        """The bound on generated tokens, whichever field gave it."""
        return self.max_tokens

    def sampling_params(
        self, defaults: Mapping[str, Any], efforts: Mapping[str, int | None] = EFFORTS
    ) -> SamplingParams:
        """Raises RequestError. ``defaults`` fill in what the request leaves open."""
        fields: dict[str, Any] = dict(defaults)
        same_name = SamplingParams.__slots__
        fields |= {
            name: value
            for name in same_name
            if name in type(self).model_fields and (value := getattr(self, name)) is not None
        }
        fields["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        fields["stop_token_ids"] = tuple(self.stop_token_ids or ())
        fields["logit_bias"] = _token_bias(self.logit_bias or {})
        fields["logprobs"] = self.requested_logprobs()
        fields["max_tokens"] = self.requested_max_tokens()
        fields["grammar"] = self.grammar()
        fields["thinking"], _ = self.requested_thinking(efforts)
        return SamplingParams(**fields)

    def options(self, efforts: Mapping[str, int | None] = EFFORTS) -> dict[str, Any]:
        """Keyword arguments of ``LLMEngine.make_request`` beside prompt and params."""
        _, enabled = self.requested_thinking(efforts)
        return {
            "enable_thinking": enabled,
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }


class HttpFields(GenerationFields):
    """Fields that only a request over HTTP has."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: Annotated[
        bool, Field(description="Add token_ids and the 0/1 mask of forced ones to each choice")
    ] = False
    timeout: Annotated[
        float | None,
        Field(gt=0, description="Seconds that the request may take, queueing included"),
    ] = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def includes_usage(self) -> bool:
        """Does a stream end in a chunk with the usage?"""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(ToolFields, HttpFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def prompts(self) -> list[Prompt]:
        """The chat, as the only prompt."""
        return [self.messages]

    def requested_logprobs(self) -> int | None:
        if self.top_logprobs is not None:
            check_int("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
            if not self.logprobs:
                raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def has_grammar(self) -> bool:
        return super().has_grammar or self.must_call

    def grammar(self) -> str | None:
        structure, calls = super().grammar(), self.calls_grammar()
        if structure is not None and self.offered:
            raise RequestError(
                "an answer that has a structure cannot call tools; say tool_choice: none",
                param="tool_choice",
            )
        return structure or calls

    def blame(self, error: RequestError) -> RequestError:
        if error.param == "response_format" and self.must_call:
            return RequestError(str(error), param="tools")
        return error

    def requested_max_tokens(self) -> int | None:
        return resolve_spellings(
            max_tokens=self.max_tokens, max_completion_tokens=self.max_completion_tokens
        )

    def options(self, efforts: Mapping[str, int | None] = EFFORTS) -> dict[str, Any]:
        options = super().options(efforts)
        kwargs = _template_kwargs(self.chat_template_kwargs or {})
        options["enable_thinking"] = resolve_spellings(
            enable_thinking=options["enable_thinking"],
            chat_template_kwargs=kwargs.pop("enable_thinking", None),
        )
        return options | {"template_kwargs": kwargs, "tools": self.offered}


class CompletionRequest(HttpFields):
    """Body of ``POST /v1/completions``; the prompt is continued as it is."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    def prompts(self) -> list[Prompt]:
        """One prompt or several, each text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        if not 0 < len(self.prompt) <= MAX_PROMPTS:
            raise RequestError(f"prompt must be 1 to {MAX_PROMPTS} prompts", param="prompt")
        return [*self.prompt]

    def requested_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: either a text or a chat."""

    model_config = STRICT

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    enable_thinking: bool | None = None


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``."""

    model_config = STRICT

    model: str | None = None
    tokens: list[int]


def request_error(error: ValidationError) -> RequestError:
    """The first thing that is wrong, in one line, with the field's name."""
    return first_error(error.errors())


def first_error(errors: Any) -> RequestError:
    """The same for the entries of a ValidationError."""
    entry = errors[0]
    own = entry.get("ctx", {}).get("error")
    if isinstance(own, RequestError):
        return own
    names = [str(part) for part in entry["loc"] if part != "body"]
    param = names[0] if names else "body"  # further ones may name alternatives of a type
    if entry["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {entry['ctx']['error']}", param="body")
    if entry["type"] == "extra_forbidden":
        return RequestError(f"unknown field {'.'.join(names)!r}", param=param)
    return RequestError(f"{param}: {entry['msg']}", param=param)


def _same(value: object, allowed: object) -> bool:
    """Equal and of one type: 1 is not True."""
    return type(value) is type(allowed) and value == allowed


def _token_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not token.isdecimal():
            raise RequestError(f"logit_bias: {token!r} is no token id", param="logit_bias")
    return {int(token): value for token, value in bias.items()}


def _template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Plain values under plain names: a template must get nothing that it could be made to run."""
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise RequestError(
            f"chat_template_kwargs takes at most {MAX_TEMPLATE_KWARGS} entries",
            param="chat_template_kwargs",
        )
    for name, value in kwargs.items():
        plain = value is None or isinstance(value, str | int | float)
        if not name.isidentifier() or name.startswith("_") or not plain:
            raise RequestError(
                f"chat_template_kwargs: {name!r} must be a plain name with a plain value",
                param="chat_template_kwargs",
            )
    return dict(kwargs)
