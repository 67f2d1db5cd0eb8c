"""From what a user asks to a compiled request: validation, token ids, effective thinking budget.

Every user error is detected here, before the request enters a queue. Compiling changes no state, so
any thread may do it.
"""

import hashlib
import itertools
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s1engine import _core
from s1engine.chat_template import resolve_turn
from s1engine.config import DEFAULT_ANSWER_RESERVE, EngineConfig, check_int, check_unicode
from s1engine.engine.end_markers import make_core_format
from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.request import CompiledBudget, Prompt, Request
from s1engine.errors import ModelError, RequestError
from s1engine.models.generation_config import read_generation_config, refuse_unsupported
from s1engine.models.model_config import ModelConfig
from s1engine.reasoning import ReasoningFormat, detect_format, find_open_thinking
from s1engine.sampling_params import UNLIMITED, SamplingParams, ThinkingBudget
from s1engine.tokenizer import Tokenizer

MAX_SALT_CHARS = 1024
MAX_NORMALIZED_CHARS = 4  # characters of a text that normalisation may merge into one

logger = logging.getLogger(__name__)
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class ModelText:
    """What a model directory holds besides weights: enough to turn requests into integers and
    integers into text, in a process that does not load the weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    format: ReasoningFormat | None
    eos_token_ids: tuple[int, ...]  # end a turn: those of both configs and of the tokenizer
    vocab_limit: int  # ids below it may be sampled; a prompt may use every row of the embedding

    @classmethod
    def load(cls, config: EngineConfig, path: Path) -> "ModelText":
        """Raises ModelError or RequestError."""
        model = ModelConfig.from_dir(path)
        if config.generation_config != "none":
            refuse_unsupported(read_generation_config(path))
        tokenizer = Tokenizer.from_dir(path, config.chat_template)
        ends = _end_token_ids(path, model, tokenizer)
        reasoning = detect_format(tokenizer, ends, config.reasoning_format)
        return cls(model, tokenizer, reasoning, ends, min(tokenizer.num_tokens, model.vocab_size))

    def core_format(self) -> _core.BudgetFormat | None:
        """The reasoning format as the scheduler needs it; None for a model without one."""
        if self.format is None:
            return None
        return make_core_format(self.format, self.tokenizer, self.vocab_limit)


def _end_token_ids(path: Path, model: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a turn: the model's and the tokenizer's own. Raises ModelError."""
    own = tokenizer.eos_token_id
    if own is None or own in model.eos_token_ids:
        return model.eos_token_ids
    if own >= model.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer's eos_token has id {own}, outside of vocab_size "
            f"({model.vocab_size})"
        )
    return (*model.eos_token_ids, own)


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
        request_id: str | None = None,
        enable_thinking: bool | None = None,
        template_kwargs: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """Compiles a request. Raises RequestError naming the field.

        A raw text gets the tokens that the tokenizer adds, such as the beginning of text; a chat
        gets what its template writes. ``enable_thinking`` None: a chat thinks; a raw prompt, or a
        chat whose last message is continued, thinks if it already contains open thinking; a raw
        prompt also if it comes with a thinking budget. ``template_kwargs`` are variables of the
        template, and the options of ``resolve_turn``. ``tools`` are rendered by the chat template;
        with tools the forced end has no final text, because the answer may be a call.
        """
        check_int("priority", priority, -(2**31), 2**31 - 1)
        if cache_salt is not None and not 0 < len(cache_salt) <= MAX_SALT_CHARS:
            raise RequestError(
                f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", param="cache_salt"
            )
        chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        ids = self._encode(prompt, chat, enable_thinking, template_kwargs, tools)
        begun = chat and not resolve_turn(prompt, template_kwargs or {})[0]
        self._check_ids(params)
        if params.grammar is not None:
            self.grammars.validate(params.grammar)
        tokens_thought = self._open_thinking(ids, params, chat, enable_thinking, begun)
        available = self.max_model_len - len(ids)
        if available < 1:
            raise self._too_long("messages" if chat else "prompt", f"{len(ids)} tokens")
        max_len = len(ids) + min(params.max_tokens or available, available)
        budget = None
        if tokens_thought is not None:
            structured = params.grammar is not None or bool(tools)
            budget = self._compile_budget(params, tokens_thought, len(ids), max_len, structured)
        stop_tokens = [*params.stop_token_ids]
        if not params.ignore_eos:
            stop_tokens += self.text.eos_token_ids
        request = Request(
            request_id=request_id or uuid.uuid4().hex,
            number=next(_numbers),
            prompt=np.array(ids, np.int32),
            params=params,
            max_len=max_len,
            stop_tokens=stop_tokens,
            budget=budget,
            stream=stream,
            priority=priority,
            salt=hashlib.sha256(cache_salt.encode()).digest()[:16] if cache_salt else bytes(16),
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
    ) -> list[int]:
        """The prompt of a chat: template applied, thinking opened."""
        ids = self._encode(messages, True, enable_thinking, template_kwargs, tools)
        begun = not resolve_turn(messages, template_kwargs or {})[0]
        self._open_thinking(ids, SamplingParams(), True, enable_thinking, begun)
        return ids

    def _encode(
        self,
        prompt: Prompt,
        chat: bool,
        enable_thinking: bool | None,
        template_kwargs: dict[str, Any] | None,
        tools: Sequence[dict[str, Any]],
    ) -> list[int]:
        param = "messages" if chat else "prompt"
        if chat:
            messages: Any = prompt
            kwargs = template_kwargs or {}
            header, continues = resolve_turn(messages, kwargs)
            prompt = self._tokenizer.render_chat(
                messages,
                enable_thinking,
                kwargs,
                tools,
                add_generation_prompt=header,
                continue_final_message=continues,
            )
        if isinstance(prompt, str):
            self._check_text(prompt, param)
            encode = self._tokenizer.encode if chat else self._tokenizer.encode_prompt
            ids = encode(prompt)
        else:
            ids = self._check_prompt_ids(prompt)
        if not ids:
            raise RequestError(f"{param} is empty", param=param)
        return ids

    def _check_text(self, text: str, param: str) -> None:
        """Rejects a text that is not Unicode or cannot fit, before it is tokenised."""
        check_unicode(param, text)
        max_chars = self.max_model_len * self._tokenizer.max_token_chars * MAX_NORMALIZED_CHARS
        if len(text) > max_chars:
            raise self._too_long(param, f"{len(text)} characters")

    def _too_long(self, param: str, size: str) -> RequestError:
        return RequestError(
            f"{param} has {size}; with at least one token of output it exceeds the context of "
            f"{self.max_model_len}",
            param=param,
            code="context_length_exceeded",
        )

    def _check_prompt_ids(self, prompt: object) -> list[int]:
        limit = self.text.config.vocab_size
        if not isinstance(prompt, list):
            raise RequestError("prompt must be text, token ids or messages", param="prompt")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < limit:
                raise RequestError(
                    f"prompt: {token!r} is no token id below {limit}", param="prompt"
                )
        return list(prompt)

    def _check_ids(self, params: SamplingParams) -> None:
        fields = {"stop_token_ids": params.stop_token_ids, "logit_bias": tuple(params.logit_bias)}
        for name, ids in fields.items():
            for token in ids:
                if token >= self.text.vocab_limit:
                    raise RequestError(
                        f"{name}: {token} is outside the vocabulary of {self.text.vocab_limit}",
                        param=name,
                    )

    def _open_thinking(
        self,
        ids: list[int],
        params: SamplingParams,
        chat: bool,
        enable_thinking: bool | None,
        begun: bool,
    ) -> int | None:
        """Appends the start marker to ``ids`` if the request thinks and the marker is missing.
        ``begun``: the chat ends within the assistant's turn, too late to open thinking.

        Returns the number of thinking tokens that ``ids`` already contains; None if the request
        does not think."""
        wanted = params.thinking is not None or enable_thinking is True
        if self._reasoning is None:
            if wanted:
                raise RequestError(
                    "this model has no reasoning format, so no thinking field applies",
                    param="thinking_token_budget" if params.thinking else "enable_thinking",
                )
            return None
        if enable_thinking is False:
            if params.thinking is not None:
                raise RequestError(
                    "enable_thinking is false but a thinking budget is given",
                    param="enable_thinking",
                )
            return None
        begin = find_open_thinking(ids, self._reasoning)
        if begin is not None:
            return len(ids) - begin
        if begun and wanted:
            raise RequestError(
                "the last message is continued and contains no open thinking, so no thinking field "
                "applies",
                param="thinking_token_budget" if params.thinking else "enable_thinking",
            )
        if begun or not (chat or wanted):
            return None
        ids.extend(self._reasoning.start)
        return 0

    def _compile_budget(
        self,
        params: SamplingParams,
        tokens_thought: int,
        prompt_len: int,
        max_len: int,
        structured: bool,
    ) -> CompiledBudget:
        """``structured``: a grammar or a tool call begins the answer, so the format's own final
        text is left out of the forced end."""
        assert self._reasoning is not None
        budget = params.thinking or ThinkingBudget()
        limit = self._thinking_limit(budget)
        num_waits = budget.num_waits
        if num_waits is None:
            num_waits = self._config.default_num_waits
        final_text = "" if structured and budget.final_text is None else budget.final_text
        forced_end = self._reasoning.forced_end(final_text)
        end_len = max(
            len(self._reasoning.newline) + len(forced_end), len(self._reasoning.natural_end)
        )
        max_new = max_len - prompt_len
        available = max_new - end_len - answer_reserve(budget, max_new)
        min_remaining = max(budget.min_tokens - tokens_thought, 0)
        if available < min_remaining and params.thinking is None:
            available, num_waits = max_new + 1, 0  # max_tokens cuts the thinking
            limit = max(limit, tokens_thought + 1)
        elif available < min_remaining:
            raise RequestError(
                f"max_tokens and context leave {max_new} tokens: too few for "
                f"{min_remaining} of thinking, {end_len} to end it and the answer reserve",
                param="min_thinking_tokens" if available >= 0 else "max_tokens",
            )
        return CompiledBudget(
            wait=self._tokenizer.encode(budget.wait_text),
            forced_end=list(forced_end),
            delimiter_len=_delimiter_len(forced_end, self._reasoning.natural_end),
            min_thinking=budget.min_tokens,
            num_waits=num_waits,
            tokens_thought=tokens_thought,
            max_thinking=min(tokens_thought + available, limit),
            checkpoints=budget.checkpoints,
            loop_repeats=budget.loop_repeats or 0,
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


def answer_reserve(budget: ThinkingBudget, max_tokens: int) -> int:
    """Tokens reserved for the answer, at least one: ``budget.answer_reserve``, else the smaller of
    s1's 100 and a quarter of ``max_tokens``."""
    if budget.answer_reserve is not None:
        return max(budget.answer_reserve, 1)
    return max(min(DEFAULT_ANSWER_RESERVE, max_tokens // 4), 1)


def _delimiter_len(forced_end: tuple[int, ...], natural_end: tuple[int, ...]) -> int:
    """Number of leading tokens of a forced end that are the delimiter; the rest begins the
    answer."""
    n = len(natural_end)
    return n if forced_end[:n] == natural_end else len(forced_end)
