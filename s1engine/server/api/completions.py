"""``POST /v1/completions``: its body, and its responses."""

from functools import lru_cache
from typing import Annotated, Any

from pydantic import PlainValidator

from s1engine.errors import RequestError
from s1engine.options import Prompt
from s1engine.outputs import Chunk, CompletionOutput, TokenLogprob
from s1engine.server.api.openai import OpenAIFormatter, lazy_list, shown_reason, token_fields
from s1engine.server.api.request_fields import HttpFields
from s1engine.server.api.response_formatter import Json, ResponseHead, thinking_total
from s1engine.tokenizer import Tokenizer

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # of OpenAI and vLLM
MAX_SPELLINGS = 4096  # tokens whose text a response keeps


PromptTypes = str | list[str] | list[int] | list[list[int]]


def check_prompt(value: Any) -> Any:
    """Return one or several prompts, each a text or token ids, checked up to the first error."""
    if isinstance(value, str) or _are_ids(value):
        return value
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PROMPTS:
        message = f"prompt must be a text, token ids, or 1 to {MAX_PROMPTS} of them"
        raise RequestError(message, param="prompt")
    if not (all(isinstance(item, str) for item in value) or all(map(_are_ids, value))):
        raise RequestError("prompt: all prompts must be texts or lists of ids", param="prompt")
    return value


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionRequest(HttpFields):
    """Body of ``POST /v1/completions``; no chat template is applied."""

    default_max_tokens = DEFAULT_MAX_TOKENS

    prompt: Annotated[Any, PlainValidator(check_prompt, json_schema_input_type=PromptTypes)]
    logprobs: int | None = None

    def prompts(self) -> list[Prompt]:
        """Return one or several prompts, each a text or token ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return [*self.prompt] if several else [self.prompt]

    def requested_logprobs(self) -> int | None:
        return self.logprobs


class CompletionFormatter(OpenAIFormatter):
    """Formats the response to one completion request."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self, head: ResponseHead, samples: int, tokenizer: Tokenizer, body: HttpFields
    ) -> None:
        super().__init__(head, samples, tokenizer, body)
        self._text = lru_cache(MAX_SPELLINGS)(self._spell)
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far

    def choice(self, index: int, sample: CompletionOutput) -> Json:
        return {
            "index": index,
            "text": sample.text,
            "reasoning": sample.reasoning,
            "logprobs": self._logprobs(index, sample.logprobs),
            "finish_reason": shown_reason(sample.finish_reason),
            "stop_reason": sample.stop_reason,
            "thinking": thinking_total([sample.thinking]) if sample.thinking else None,
            **(token_fields(sample) if self._token_ids else {}),
        }

    def delta(self, index: int, chunk: Chunk) -> Json:
        return {
            "index": index,
            "text": chunk.text,
            **({"reasoning": chunk.reasoning} if chunk.reasoning else {}),
            "logprobs": self._logprobs(index, chunk.logprobs),
            "finish_reason": shown_reason(chunk.finish_reason),
            **(token_fields(chunk) if self._token_ids else {}),
        }

    def _logprobs(self, index: int, entries: list[TokenLogprob] | None) -> Json | None:
        if entries is None:
            return None
        return {
            "tokens": lazy_list(lambda entry: self._text(entry.token_id), entries),
            "token_logprobs": lazy_list(lambda entry: entry.logprob, entries),
            "top_logprobs": lazy_list(self._alternatives, entries),
            "text_offset": lazy_list(lambda entry: self._next_offset(index, entry), entries),
            "forced": lazy_list(lambda entry: int(entry.forced), entries),
        }

    def _alternatives(self, entry: TokenLogprob) -> Json:
        return {self._text(token): logprob for token, logprob in entry.top}

    def _next_offset(self, index: int, entry: TokenLogprob) -> int:
        """Return the characters before the next token of a choice."""
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(self._text(entry.token_id))
        return offset

    def _spell(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")
