"""Fields that several APIs share, and their conversion to SamplingParams and options.

Fields have OpenAI's names where OpenAI has them, else vLLM's. This module checks types,
SamplingParams checks bounds, and the engine's compiler checks that the request fits; each failure
is a RequestError that names the field. ``field_rules`` decides about all other fields.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from s1engine.checks import MAX_SHOWN_CHARS, shown
from s1engine.errors import RequestError
from s1engine.options import Prompt
from s1engine.sampling_params import STRUCTURES, SamplingParams
from s1engine.server.api.body import StrictBody, Strings, TokenIds
from s1engine.server.api.field_rules import FieldRules
from s1engine.server.api.spellings import NO_LIMIT, renamed, resolve, sent_fields
from s1engine.server.api.structured_outputs import StructureFields
from s1engine.server.api.thinking_fields import EFFORTS, ThinkingFields
from s1engine.server.request_notes import current_notes

MAX_ID_DIGITS = 10  # of a token id
SAME_NAMES = frozenset(SamplingParams.__slots__) - {*STRUCTURES, "thinking", "stop"}


class StreamOptions(StrictBody):
    """What a stream contains besides the answer."""

    rules = FieldRules(frozenset({"include_obfuscation"}), place="stream_options.")

    include_usage: bool = False
    continuous_usage_stats: Annotated[
        bool, Field(description="Add the usage so far to each chunk")
    ] = False


class GenerationFields(StructureFields, ThinkingFields):
    """Fields of chats, completions and the rows of ``s1engine generate --input``."""

    default_max_tokens: ClassVar[int | None] = None
    """For requests that state neither a limit nor anything about their thinking."""

    max_tokens: Annotated[
        int | None, Field(description="Most tokens to generate; -1: what the context leaves")
    ] = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    max_new_tokens: int | None = None
    n_predict: int | None = None
    num_predict: int | None = None
    min_tokens: Annotated[
        int | None, Field(description="Generated tokens before an end or a stop counts")
    ] = None
    prompt_logprobs: Annotated[
        int | None, Field(description="Log-probabilities of the prompt's tokens, and of the k best")
    ] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    random_seed: int | None = None
    stop: str | Strings | None = None
    stop_sequences: str | Strings | None = None
    stopping_strings: str | Strings | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    priority: Annotated[int, Field(description="Lower runs first")] = 0
    cache_salt: Annotated[
        str | None, Field(description="Requests share cached prefixes only with the same salt")
    ] = None

    def renamed_error(self, error: RequestError) -> RequestError:
        """Return an error about our fields with the names that were sent instead."""
        if error.param in STRUCTURES and (sent := self.structure_field) is not None:
            text = sent + str(error).removeprefix(error.param)
            return RequestError(text, param=sent.partition(".")[0], code=error.code)
        return renamed(error, self.sent_names())

    def requested_logprobs(self) -> int | None:
        """Return how many log-probabilities of each token to return, as in SamplingParams."""
        return None

    def requested_prompt_logprobs(self) -> int | None:
        """The same for each token of the prompt."""
        return self.prompt_logprobs

    @property
    def returns_prompt(self) -> bool:
        """Does the response say something about the prompt, so that it may generate nothing?"""
        return self.prompt_logprobs is not None

    def sampling_params(
        self, defaults: Mapping[str, Any], efforts: Mapping[str, int | None] = EFFORTS
    ) -> SamplingParams:
        """Return the parameters; ``defaults`` replace missing fields. Raises RequestError."""
        fields: dict[str, Any] = dict(defaults)
        # Both have these names, and nulls are not set.
        fields |= {name: getattr(self, name) for name in self.model_fields_set & SAME_NAMES}
        if (stop := resolve(self, "stop")) not in (None, ""):
            fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if (seed := resolve(self, "seed")) is not None:
            fields["seed"] = seed
        fields["stop_token_ids"] = tuple(self.stop_token_ids or ())
        fields["logit_bias"] = {
            **defaults.get("logit_bias", {}),
            **_token_bias(self.logit_bias or {}),
        }
        fields["logprobs"] = self.requested_logprobs()
        fields["prompt_logprobs"] = self.requested_prompt_logprobs()
        fields |= self.structure()
        fields["thinking"], _ = self.requested_thinking(efforts)
        limit: int | None = resolve(self, "max_tokens")
        if limit is not None:
            fields["max_tokens"] = None if limit == NO_LIMIT else limit
        elif self.default_max_tokens is not None and fields["thinking"] is None:
            fields["max_tokens"] = max(self.default_max_tokens, self.min_tokens or 0)
        if fields.get("max_tokens") == 0 and not self.returns_prompt:
            message = "max_tokens must be at least 1; 0 needs echo or prompt_logprobs"
            raise RequestError(message, param="max_tokens")
        return SamplingParams(**fields)

    def options(self, efforts: Mapping[str, int | None] = EFFORTS) -> dict[str, Any]:
        """Return the keyword arguments of ``RequestCompiler.compile`` besides prompt and params."""
        _, enabled = self.requested_thinking(efforts)
        effort = resolve(self, "reasoning_effort")
        return {
            "enable_thinking": enabled,
            "template_kwargs": {} if effort is None else {"reasoning_effort": effort},
            "priority": self.priority,
            "cache_salt": self.cache_salt,
        }


class HttpFields(GenerationFields):
    """Fields of a request over HTTP only."""

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

    def prompts(self) -> list[Prompt]:
        """Return one or several prompts, each a chat, a text or token ids."""
        raise NotImplementedError

    def num_sequences(self, limit: int) -> int:
        """Return how many sequences the request becomes at most: samples, and their answers at
        checkpoints. Raises RequestError above ``limit``, naming the largest factor."""
        factors = {
            "prompt": len(self.prompts()),
            "n": max(self.n or 1, 1),
            "thinking_checkpoints": 1 + len(self.thinking_checkpoints or ()),
        }
        count = math.prod(factors.values())
        if count > limit:
            product = " x ".join(map(str, factors.values()))
            raise RequestError(
                f"prompts x n x (1 + thinking_checkpoints) is {product}; it may be {limit}",
                param=max(factors, key=factors.__getitem__),
                code="too_many_sequences",
            )
        return count

    def note_lowered(self, available: int) -> None:
        """Note that max_tokens is lowered, if it exceeds the tokens that the context leaves."""
        for name, value in sent_fields(self, "max_tokens")[:1]:
            if value > available:
                current_notes().lowered[name] = available

    @property
    def stream_usage(self) -> StreamOptions:
        """What a stream says about the usage."""
        return self.stream_options or StreamOptions()


def request_error(error: ValidationError) -> RequestError:
    """Return the first error in one line, with the field's name."""
    return first_error(error.errors())


def first_error(errors: Any) -> RequestError:
    """Return the first error of a ValidationError's entries."""
    entry = errors[0]
    own = entry.get("ctx", {}).get("error")
    if isinstance(own, RequestError):
        return own
    names = [str(part) for part in entry["loc"] if part != "body"]
    # Later parts may name members of a union.
    param = names[0][:MAX_SHOWN_CHARS] if names else "body"
    if entry["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {entry['ctx']['error']}", param="body")
    return RequestError(f"{param}: {entry['msg']}", param=param)


def _token_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not token.isdecimal() or len(token) > MAX_ID_DIGITS:
            raise RequestError(f"logit_bias: {shown(token)} is not a token id", param="logit_bias")
    return {int(token): value for token, value in bias.items()}
