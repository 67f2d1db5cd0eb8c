"""``POST /v1/chat/completions``: its body, and its responses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from s1engine.chat_template import TURN_OPTIONS
from s1engine.checks import check_int, shown
from s1engine.engine.structured_output import build_grammar
from s1engine.errors import RequestError
from s1engine.options import Prompt
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput
from s1engine.prompt_logprobs import PromptLogprobs
from s1engine.sampling_params import MAX_LOGPROBS, SamplingParams
from s1engine.server.api.body import JsonObjects
from s1engine.server.api.call_syntax import SYNTAXES
from s1engine.server.api.field_rules import SAMPLING, THINKING, nearest
from s1engine.server.api.logprobs import ChatLogprobs
from s1engine.server.api.openai import OpenAIFormatter, shown_reason, token_fields
from s1engine.server.api.request_fields import HttpFields
from s1engine.server.api.response_formatter import Json, ResponseHead, call_id, thinking_total
from s1engine.server.api.spellings import KWARGS, check_same
from s1engine.server.api.thinking_fields import EFFORTS
from s1engine.server.api.tool_call_parser import (
    CallBegin,
    ToolCallParser,
    parse_answer,
)
from s1engine.server.api.tools import ToolFields
from s1engine.server.request_notes import current_notes
from s1engine.tokenizer import Tokenizer
from s1engine.tool_formats import ToolFormat

MAX_TEMPLATE_KWARGS = 32
SWITCHES = ("enable_thinking", "thinking")  # of templates, which get the request's choice


class ChatRequest(ToolFields, HttpFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[JsonObjects, Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Annotated[
        bool | None, Field(description="Begin a new turn; default: unless the last one is open")
    ] = None
    continue_final_message: Annotated[
        bool | None, Field(description="Continue the last message; default: if an assistant's")
    ] = None

    def prompts(self) -> list[Prompt]:
        """Return the chat as the only prompt."""
        return [self.messages]

    def requested_logprobs(self) -> int | None:
        if self.top_logprobs is not None:
            check_int("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
            if not self.logprobs:
                raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def structure(self) -> dict[str, Any]:
        fields = super().structure()
        if self.must_call:
            return {"grammar": self.calls_grammar()}
        if not fields:
            return self._strict_structure() if self.is_strict else {}
        if not self.offered:
            return fields
        ((name, value),) = fields.items()
        return {"grammar": self.calls_grammar(build_grammar(name, value))}

    def use_tool_format(self, fmt: ToolFormat) -> None:
        """See ToolFields. Free calls of gpt-oss are no text of the answer, so they cannot be held
        to their schemas: the response says so."""
        super().use_tool_format(fmt)
        if fmt.name == "openai" and not self.must_call and self.structure_field == "tools":
            current_notes().ignored["tools.strict"] = None

    def _strict_structure(self) -> dict[str, Any]:
        """Text with calls that keep to their schemas."""
        if self._tool_format.name == "openai":
            return {}
        return {"grammar": self.calls_grammar(free=True)}

    def create_parser(self) -> ToolCallParser | None:
        """Return a parser of one answer; None if it cannot call tools, and all of it is text."""
        if not self.offered:
            return None
        return ToolCallParser(self.once, self.parameters, self._tool_format.name)

    def sampling_params(
        self, defaults: Mapping[str, Any], efforts: Mapping[str, int | None] = EFFORTS
    ) -> SamplingParams:
        params = super().sampling_params(defaults, efforts)
        closer = SYNTAXES[self._tool_format.name].closer
        if not (self.once and self.offered and closer) or params.structure is not None:
            return params
        return replace(params, stop=(*params.stop, closer))

    @property
    def structure_field(self) -> str | None:
        own = super().structure_field
        return "tools" if self.must_call or (own is None and self.is_strict) else own

    def options(self, efforts: Mapping[str, int | None] = EFFORTS) -> dict[str, Any]:
        options = super().options(efforts)
        kwargs = _template_kwargs(self.chat_template_kwargs or {}) | options["template_kwargs"]
        for name in TURN_OPTIONS:
            if (value := getattr(self, name)) is not None:
                check_same(name, value, f"{KWARGS}.{name}", kwargs.get(name, value))
                kwargs[name] = value
        return options | {"template_kwargs": kwargs, "tools": self.offered}


class ChatFormatter(OpenAIFormatter):
    """Formats the response to one chat."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, head: ResponseHead, samples: int, tokenizer: Tokenizer, body: ChatRequest
    ) -> None:
        super().__init__(head, samples, tokenizer, body)
        self._logprobs = ChatLogprobs(tokenizer)
        self._begun: set[int] = set()  # choices whose first chunk was sent
        self._create_parser = body.create_parser
        self._parsers: dict[int, ToolCallParser | None] = {}  # of streamed choices
        self._called: set[int] = set()  # choices that have called a tool

    def choice(
        self, index: int, sample: CompletionOutput, prompt: PromptLogprobs | None = None
    ) -> Json:
        answer = parse_answer(self._create_parser(), sample.text)
        message: Json = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.calls else None,
            "reasoning": sample.reasoning,
            "reasoning_content": sample.reasoning,
        }
        if answer.calls:
            message["tool_calls"] = [
                self._call(index, i, call.name, call.arguments)
                for i, call in enumerate(answer.calls)
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs.format(sample.logprobs),
            "finish_reason": _reason(sample.finish_reason, bool(answer.calls)),
            "stop_reason": None if answer.calls else sample.stop_reason,
            "thinking": thinking_total([sample.thinking]) if sample.thinking else None,
            **(token_fields(sample) if self._token_ids else {}),
        }

    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        return super().format_response(outputs) | self.prompt_fields(outputs[0].prompt_logprobs)

    def delta(self, index: int, chunk: Chunk) -> Json:
        delta: Json = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if chunk.reasoning:
            delta |= {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
        text = self._parse_chunk(index, chunk, delta)
        if text or "role" in delta:
            delta["content"] = text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs.format(chunk.logprobs),
            "finish_reason": _reason(chunk.finish_reason, index in self._called),
            **self.prompt_fields(chunk.prompt_logprobs),
            **(token_fields(chunk) if self._token_ids else {}),
        }

    def _parse_chunk(self, index: int, chunk: Chunk, delta: Json) -> str:
        """Return the text of a chunk and add its tool calls to the delta."""
        if index not in self._parsers:
            self._parsers[index] = self._create_parser()
        parser = self._parsers[index]
        if parser is None:
            return chunk.text
        text, calls = "", []
        for piece in parser.push(chunk.text, last=chunk.finish_reason is not None):
            if isinstance(piece, str):
                text += piece
            elif isinstance(piece, CallBegin):
                call = self._call(index, piece.index, piece.name, "")
                calls.append({"index": piece.index, **call})
            elif calls and calls[-1]["index"] == piece.index:
                calls[-1]["function"]["arguments"] += piece.text
            else:
                calls.append({"index": piece.index, "function": {"arguments": piece.text}})
        if calls:
            self._called.add(index)
            delta["tool_calls"] = calls
        return text

    def _call(self, choice: int, index: int, name: str, arguments: str) -> Json:
        function = {"name": name, "arguments": arguments}
        return {"id": call_id(self.head, choice, index), "type": "function", "function": function}


def _reason(finish_reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and finish_reason == "stop" else shown_reason(finish_reason)


def _template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check that names and values are plain: a template must get nothing that it could execute."""
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise RequestError(
            f"chat_template_kwargs takes at most {MAX_TEMPLATE_KWARGS} entries",
            param="chat_template_kwargs",
        )
    for name, value in kwargs.items():
        plain = value is None or isinstance(value, str | int | float)
        if not name.isidentifier() or name.startswith("_") or not plain:
            raise RequestError(
                f"chat_template_kwargs: {shown(name)} must be a plain name with a plain value",
                param="chat_template_kwargs",
            )
        meant = nearest(name, THINKING)
        if name in SAMPLING or (meant is not None and meant != name):
            hint = f"; did you mean {meant}?" if meant else ": it is a field of the body"
            message = f"chat_template_kwargs: {shown(name)} has no effect here{hint}"
            raise RequestError(message, param="chat_template_kwargs")
    return {name: value for name, value in kwargs.items() if name not in SWITCHES}
