"""From what a user asks to a compiled request: validation, token ids, effective thinking budget.

Every user error is detected here, before the request enters a queue. Compiling changes no state, so
any thread may do it.
"""

import hashlib
import itertools
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from s1engine.chat_template import TURN_OPTIONS, resolve_turn
from s1engine.checks import check_bool, check_unicode
from s1engine.config import DEFAULT_ANSWER_RESERVE, EngineConfig
from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.model_text import ModelText
from s1engine.engine.prompts import chat_of, check_params, text_or_ids
from s1engine.engine.request import CompiledBudget, Request
from s1engine.engine.structured_output import with_grammar
from s1engine.engine.thinking_rule import AssistantTurn
from s1engine.errors import RequestError
from s1engine.options import Prompt, RequestOptions, check_request_options
from s1engine.reasoning import AnswerMarkers
from s1engine.sampling_params import UNLIMITED, SamplingParams, ThinkingBudget

MAX_NORMALIZED_CHARS = 4  # characters of a text that normalisation may merge into one

logger = logging.getLogger(__name__)
_numbers = itertools.count()


class RequestCompiler:
    """Compiles requests for one model.

    Args:
        max_model_len: prompt and output together, tokens.
        config: defaults and limits of thinking, and of sampling.
    """

    def __init__(self, text: ModelText, max_model_len: int, config: EngineConfig) -> None:
        self.text = text
        self.max_model_len = max_model_len
        self._config = config
        self._tokenizer = text.tokenizer
        self._reasoning = text.format
        self.grammars = GrammarCompiler(text.tokenizer, text.vocab_limit, text.eos_token_ids)

    def default_sampling(self) -> dict[str, Any]:
        """Sampling fields that the model's authors recommend: defaults of SamplingParams."""
        if self._config.generation_config == "none":
            return {}
        return dict(self.text.config.generation_defaults)

    def compile(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        stream: bool = False,
        arrival: float | None = None,
        try_grammar: bool = True,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Compiles a request, which arrived at the time ``arrival`` (monotonic, s; None: now).
        Raises RequestError naming the field.

        A grammar without a verdict is tried first, which takes up to two seconds; TryAgainError if
        an accident ends the trial. ``try_grammar`` False: UntriedGrammarError instead.

        A raw text gets the tokens that the tokenizer adds, such as the beginning of text; a chat
        gets what its template writes. Whether it thinks is ThinkingRule's decision.
        """
        arrival = time.monotonic() if arrival is None else arrival
        params, options = check_params(params), check_request_options(options)
        enable_thinking = options.get("enable_thinking")
        tools, salt = options.get("tools") or (), options.get("cache_salt")
        rule, messages = self.text.thinking, chat_of(prompt)
        if messages is not None:
            kwargs = options.get("template_kwargs") or {}
            ids, turn = self._encode_chat(messages, params.thinking, enable_thinking, kwargs, tools)
            num_given = len(ids)
            tokens_thought = rule.open_in_chat(ids, turn, params.thinking, enable_thinking)
        else:
            ids = self._encode_prompt(text_or_ids(prompt, self.text.config.vocab_size))
            num_given = len(ids)
            tokens_thought = rule.open_in_text(ids, params.thinking, enable_thinking)
        chat, thinks = messages is not None, tokens_thought is not None
        self._check_ids(params)
        params = self._with_grammar(params, try_grammar)
        available = self.max_model_len - len(ids)
        wanted = available if params.max_tokens is None else params.max_tokens
        if available < (0 if params.max_tokens == 0 else 1):
            raise self._too_long("messages" if chat else "prompt", f"{len(ids)} tokens")
        max_len = len(ids) + min(wanted, available)
        budget = None
        if tokens_thought is not None and max_len > len(ids):
            calls = bool(tools) and params.grammar is None
            budget = self._compile_budget(params, tokens_thought, len(ids), max_len, calls)
        elif params.thinking is not None and (
            params.thinking.min_tokens or params.thinking.checkpoints
        ):
            raise RequestError("max_tokens is 0, so nothing can be thought", param="max_tokens")
        ends = () if params.ignore_eos else self.text.eos_token_ids
        request = Request(
            request_id=options.get("request_id") or uuid.uuid4().hex,
            number=next(_numbers),
            prompt=np.array(ids, np.int32),
            params=params,
            max_len=max_len,
            stop_tokens=[*params.stop_token_ids, *ends],
            budget=budget,
            markers=self._hidden_markers(params, chat, thinks, bool(tools)),
            stream=check_bool("stream", stream),
            priority=options.get("priority", 0),
            salt=cache_salt_bytes(salt),
            num_given=num_given,
            arrival=arrival,
        )
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "request %s compiled: %d prompt tokens, max_len %d, max_thinking %s",
                request.request_id,
                len(ids),
                max_len,
                budget.max_thinking if budget else None,
            )
        return request

    def chat_token_ids(
        self,
        messages: list[dict[str, Any]],
        enable_thinking: bool | None,
        tools: Sequence[dict[str, Any]] = (),
        template_kwargs: dict[str, Any] | None = None,
        budget: ThinkingBudget | None = None,
    ) -> list[int]:
        """The prompt of a chat: template applied, thinking opened."""
        kwargs = template_kwargs or {}
        ids, turn = self._encode_chat(messages, budget, enable_thinking, kwargs, tools)
        self.text.thinking.open_in_chat(ids, turn, budget, enable_thinking)
        return ids

    def prefix_token_ids(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> list[int]:
        """The tokens with which later prompts begin that continue this one. A chat is rendered
        without the header of the assistant's next turn."""
        options, messages = check_request_options(options), chat_of(prompt)
        if messages is None:
            return self._encode_prompt(text_or_ids(prompt, self.text.config.vocab_size))
        kwargs = {**dict.fromkeys(TURN_OPTIONS, False), **(options.get("template_kwargs") or {})}
        tools, enable_thinking = options.get("tools") or (), options.get("enable_thinking")
        return self._encode_chat(messages, None, enable_thinking, kwargs, tools)[0]

    def _encode_chat(
        self,
        messages: list[dict[str, Any]],
        budget: ThinkingBudget | None,
        enable_thinking: bool | None,
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]],
    ) -> tuple[list[int], AssistantTurn]:
        """Ids of a rendered chat, and its assistant's turn."""
        rule = self.text.thinking
        header, continues = resolve_turn(messages, kwargs)
        options = {**rule.template_options(enable_thinking, budget is not None), **kwargs}
        render = self._tokenizer.render_chat
        text = render(
            messages,
            None,
            options,
            tools,
            add_generation_prompt=header,
            continue_final_message=continues,
        )
        self._check_text(text, "messages")
        ids = self._tokenizer.encode(text)
        if not ids:
            raise RequestError("messages is empty", param="messages")
        self._check_embedded(ids, "messages")
        earlier = messages[:-1] if continues else messages
        if rule.format is None or not earlier or not rule.format.spec.is_in(text):
            return ids, AssistantTurn(text, begun=not header)
        before = render(earlier, None, options, tools, add_generation_prompt=False)
        return ids, AssistantTurn(rule.assistant_part(text, before), begun=not header)

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_text(prompt, "prompt")
            ids = self._tokenizer.encode_prompt(prompt)
            self._check_embedded(ids, "prompt")
        else:
            ids = prompt
        if not ids:
            raise RequestError("prompt is empty", param="prompt")
        return ids

    def _check_text(self, text: str, param: str) -> None:
        """Rejects a text that is not Unicode or cannot fit, before it is tokenised."""
        check_unicode(param, text)
        max_chars = self.max_model_len * self._tokenizer.max_token_chars * MAX_NORMALIZED_CHARS
        if len(text) > max_chars:
            raise self._too_long(param, f"{len(text)} characters")

    def _check_embedded(self, ids: Sequence[int], param: str) -> None:
        """Rejects added tokens that the model does not embed."""
        size = self.text.config.vocab_size
        if self._tokenizer.num_tokens > size and max(ids, default=0) >= size:
            raise RequestError(
                f"{param} holds token {max(ids)}; the model embeds ids below {size}",
                param=param,
            )

    def _too_long(self, param: str, size: str) -> RequestError:
        return RequestError(
            f"{param} has {size}; with at least one token of output it exceeds the context of "
            f"{self.max_model_len}",
            param=param,
            code="context_length_exceeded",
        )

    def _with_grammar(self, params: SamplingParams, try_grammar: bool) -> SamplingParams:
        """The same with the structure of the answer as a grammar, which is validated."""
        if params.structure is None:
            return params
        compiled = with_grammar(params)
        assert compiled.grammar is not None
        validator = self.grammars.validator
        validator.validate(compiled.grammar, params.structure, wait=try_grammar)
        return compiled

    def _check_ids(self, params: SamplingParams) -> None:
        fields = {"stop_token_ids": params.stop_token_ids, "logit_bias": tuple(params.logit_bias)}
        for name, ids in fields.items():
            for token in ids:
                if token >= self.text.vocab_limit:
                    raise RequestError(
                        f"{name}: {token} is outside the vocabulary of {self.text.vocab_limit}",
                        param=name,
                    )

    def _hidden_markers(
        self, params: SamplingParams, chat: bool, thinks: bool, tools: bool
    ) -> AnswerMarkers | None:
        """What the answers do not show: markers of the format, where the model thinks or would. A
        grammar decides alone what an answer holds. ``tools``: they show the markers of calls."""
        fmt, rule = self._reasoning, self.text.thinking
        shown = tuple(self.text.tool_format.ids.values()) if tools else ()
        if fmt is None or params.grammar is not None or not (thinks or (chat and rule.by_default)):
            return AnswerMarkers(shown=shown) if shown else None
        return replace(fmt.answer_markers(tools and thinks, opens=not thinks), shown=shown)

    def _compile_budget(
        self,
        params: SamplingParams,
        tokens_thought: int,
        prompt_len: int,
        max_len: int,
        calls: bool,
    ) -> CompiledBudget:
        """``calls``: the answer may call tools. Then, and if it follows a grammar, the forced end
        leaves out the format's own final text."""
        assert self._reasoning is not None
        budget = params.thinking or ThinkingBudget()
        limit = self._thinking_limit(budget)
        num_waits = budget.num_waits
        if num_waits is None:
            num_waits = self._config.default_num_waits
        structured = calls or params.grammar is not None
        final_text = "" if structured and budget.final_text is None else budget.final_text
        forced_end = self._reasoning.forced_end(final_text, calls)
        end_len = max(
            len(self._reasoning.newline) + len(forced_end), len(self._reasoning.natural_end)
        )
        max_new = max_len - prompt_len
        available = max_new - end_len - answer_reserve(budget, max_new)
        min_remaining = max(budget.min_tokens - tokens_thought, 0)
        # max_tokens keeps a larger maximum, too.
        states_only_maximum = budget == ThinkingBudget(max_tokens=budget.max_tokens)
        may_cut = params.thinking is None or (states_only_maximum and limit > max_new)
        if available < min_remaining and may_cut:
            available, num_waits = max_new + 1, 0  # max_tokens cuts the thinking
            limit = max(limit, tokens_thought + 1)
        elif available < min_remaining:
            raise _no_room(params, budget, max_new, min_remaining, end_len)
        return CompiledBudget(
            wait=list(self._tokenizer.encode_phrase(budget.wait_text)),
            forced_end=list(forced_end),
            delimiter_len=self._reasoning.delimiter_len(forced_end),
            min_thinking=budget.min_tokens,
            num_waits=num_waits,
            tokens_thought=tokens_thought,
            max_thinking=min(tokens_thought + available, limit),
            checkpoints=tuple(budget.checkpoints),
            loop_repeats=budget.loop_repeats or 0,
            calls=calls,
            end_markers=self._reasoning.end_markers,
        )

    def _thinking_limit(self, budget: ThinkingBudget) -> int:
        """Most thinking tokens by the request's budget, the engine's default and its maximum."""
        config = self._config
        limit = UNLIMITED if budget.max_tokens is None else budget.max_tokens
        if budget.max_tokens is None and config.default_thinking_token_budget is not None:
            # A default must not contradict what the request asks for.
            asked = (budget.min_tokens, *budget.checkpoints)
            limit = max(config.default_thinking_token_budget, *asked)
        if config.max_thinking_token_budget is None:
            return limit
        if budget.min_tokens > config.max_thinking_token_budget:
            raise RequestError(
                f"min_thinking_tokens ({budget.min_tokens}) exceeds this engine's "
                f"max_thinking_token_budget ({config.max_thinking_token_budget})",
                param="min_thinking_tokens",
            )
        return min(limit, config.max_thinking_token_budget)


def _no_room(
    params: SamplingParams, budget: ThinkingBudget, max_new: int, min_remaining: int, end_len: int
) -> RequestError:
    """The error for too few tokens left; it names a field that the request has."""
    stated = {
        "min_thinking_tokens": min_remaining if max_new > end_len else 0,
        "max_tokens": params.max_tokens,
        "answer_reserve": budget.answer_reserve,
        "thinking_token_budget": budget.max_tokens is not None,
    }
    param = next((name for name, value in stated.items() if value), None)
    leave = "max_tokens and context leave" if params.max_tokens else "the context leaves"
    return RequestError(
        f"{leave} {max_new} tokens: too few for {min_remaining} of thinking, {end_len} to end it "
        "and the answer reserve",
        param=param,
    )


def answer_reserve(budget: ThinkingBudget, max_tokens: int) -> int:
    """Tokens reserved for the answer, at least one: ``budget.answer_reserve``, else the smaller of
    s1's 100 and a quarter of ``max_tokens``."""
    if budget.answer_reserve is not None:
        return max(budget.answer_reserve, 1)
    return max(min(DEFAULT_ANSWER_RESERVE, max_tokens // 4), 1)


def cache_salt_bytes(cache_salt: str | None) -> bytes:
    """The 16 bytes that stand for a salt; zeros for None, which all share."""
    return hashlib.sha256(cache_salt.encode()).digest()[:16] if cache_salt else bytes(16)
