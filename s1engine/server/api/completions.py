"""``POST /v1/completions``: its body, and its responses."""

from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator

from s1engine.errors import RequestError
from s1engine.options import Prompt
from s1engine.outputs import Chunk, CompletionOutput, TokenLogprob
from s1engine.prompt_logprobs import PromptLogprobs
from s1engine.server.api.logprobs import CompletionLogprobs
from s1engine.server.api.openai import OpenAIFormatter, shown_reason, token_fields
from s1engine.server.api.request_fields import HttpFields
from s1engine.server.api.response_formatter import Json, ResponseHead, thinking_total
from s1engine.tokenizer import Tokenizer

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # of OpenAI and vLLM


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
    echo: Annotated[bool, Field(description="Begin the text, and logprobs, with the prompt")] = (
        False
    )

    def prompts(self) -> list[Prompt]:
        """Return one or several prompts, each a text or token ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return [*self.prompt] if several else [self.prompt]

    def requested_logprobs(self) -> int | None:
        return self.logprobs

    def requested_prompt_logprobs(self) -> int | None:
        counts = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in counts if count is not None), default=None)

    @property
    def returns_prompt(self) -> bool:
        return self.echo or super().returns_prompt


class CompletionFormatter(OpenAIFormatter):
    """Formats the response to one completion request."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self, head: ResponseHead, samples: int, tokenizer: Tokenizer, body: CompletionRequest
    ) -> None:
        super().__init__(head, samples, tokenizer, body)
        self._logprobs = CompletionLogprobs(tokenizer)
        self._body = body
        self._begun: set[int] = set()  # choices whose first chunk was sent

    def choice(self, index: int, sample: CompletionOutput, prompt: PromptLogprobs | None) -> Json:
        return {
            "index": index,
            "text": self._prompt_text(index) + sample.text,
            "reasoning": sample.reasoning,
            "logprobs": self._format_logprobs(index, sample.logprobs, prompt),
            "finish_reason": shown_reason(sample.finish_reason),
            "stop_reason": sample.stop_reason,
            "thinking": thinking_total([sample.thinking]) if sample.thinking else None,
            **self.prompt_fields(prompt),
            **(token_fields(sample) if self._token_ids else {}),
        }

    def delta(self, index: int, chunk: Chunk) -> Json:
        is_first = index not in self._begun
        self._begun.add(index)
        return {
            "index": index,
            "text": (self._prompt_text(index) if is_first else "") + chunk.text,
            **({"reasoning": chunk.reasoning} if chunk.reasoning else {}),
            "logprobs": self._format_logprobs(index, chunk.logprobs, chunk.prompt_logprobs),
            "finish_reason": shown_reason(chunk.finish_reason),
            **self.prompt_fields(chunk.prompt_logprobs),
            **(token_fields(chunk) if self._token_ids else {}),
        }

    def _prompt_text(self, index: int) -> str:
        """Return the beginning of a choice's text."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompts()[index // self._samples]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(cast("list[int]", prompt), skip_special_tokens=False)

    def _format_logprobs(
        self, index: int, entries: list[TokenLogprob] | None, prompt: PromptLogprobs | None
    ) -> Json | None:
        if not self._body.echo or prompt is None:
            return self._logprobs.format(index, entries)
        text, k = self._prompt_text(index), self._body.logprobs or 0
        return self._logprobs.format(index, entries, prompt, text, k)
