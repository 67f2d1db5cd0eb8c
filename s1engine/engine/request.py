"""From what a user asks to what the scheduler runs: validation, token ids, effective budget.

Everything a user can get wrong is found here, before the request touches a queue; afterwards only
integers are left. Pure: compiling changes no state, so any thread may do it.
"""

import hashlib
import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s1engine.config import DEFAULT_ANSWER_RESERVE, check_int, check_unicode
from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.model_text import ModelText
from s1engine.errors import RequestError
from s1engine.reasoning import find_open_thinking
from s1engine.sampling_params import SamplingParams, ThinkingBudget

MAX_SALT_CHARS = 1024
_numbers = itertools.count()
MAX_NORMALIZED_CHARS = 4  # characters of a text that normalisation may make one

Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CompiledBudget:
    """A thinking budget in token ids, fitted into what the request and the context leave."""

    wait: list[int]  # replaces an ignored end
    forced_end: list[int]
    delimiter_len: int  # leading tokens of forced_end that are delimiter
    min_thinking: int
    num_waits: int
    tokens_thought: int  # thinking tokens that already stand in the prompt
    max_thinking: int  # effective maximum, those included
    checkpoints: tuple[int, ...]
    loop_repeats: int  # 0: loops are not looked for


@dataclass(slots=True)
class Request:
    """A validated request, ready for the scheduler."""

    request_id: str
    number: int  # no other request that this process compiles has it
    prompt: np.ndarray  # [prompt_len] int32, thinking opened
    params: SamplingParams
    max_len: int  # prompt and output together
    stop_tokens: list[int]
    budget: CompiledBudget | None
    stream: bool
    priority: int
    salt: bytes  # 16 bytes
    order: int = 0  # lower runs first among those of one priority
    arrival: float = field(default_factory=time.monotonic)

    @property
    def needs_output_processing(self) -> bool:
        """Does its own text decide when it ends?"""
        budget = self.params.thinking
        if self.params.stop or self.params.grammar is not None:
            return True
        return budget is not None and budget.early_exit is not None

    @property
    def deadline(self) -> float | None:
        """Time (monotonic, s) at which thinking must end."""
        budget = self.params.thinking
        if self.budget is None or budget is None or budget.deadline_ms is None:
            return None
        return self.arrival + budget.deadline_ms / 1000


class RequestCompiler:
    """Compiles requests for one model.

    Args:
        max_model_len: prompt and output together, tokens.
    """

    def __init__(self, text: ModelText, max_model_len: int) -> None:
        self.text = text
        self.max_model_len = max_model_len
        self._tokenizer = text.tokenizer
        self._reasoning = text.format
        self.grammars = GrammarCompiler(text)

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
        """Raises RequestError naming the field. ``enable_thinking`` None: a chat thinks, a raw
        prompt thinks if it brings a thinking budget or has its thinking open already. ``tools`` go
        to the chat template; after a forced end the answer, which may be a call, begins itself."""
        check_int("priority", priority, -(2**31), 2**31 - 1)
        if cache_salt is not None and not 0 < len(cache_salt) <= MAX_SALT_CHARS:
            raise RequestError(
                f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", param="cache_salt"
            )
        chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        param = "messages" if chat else "prompt"
        ids = self._encode(prompt, chat, enable_thinking, template_kwargs, tools)
        self._check_ids(params)
        if params.grammar is not None:
            self.grammars.validate(params.grammar)
        thought = self._open_thinking(ids, params, chat, enable_thinking)
        room = self.max_model_len - len(ids)
        if room < 1:
            raise self._too_long(param, f"{len(ids)} tokens")
        max_len = len(ids) + min(params.max_tokens or room, room)
        bare = params.grammar is not None or bool(tools)
        thinking = None if thought is None else self._plan(params, thought, len(ids), max_len, bare)
        stops = [*params.stop_token_ids]
        if not params.ignore_eos:
            stops += self.text.config.eos_token_ids
        return Request(
            request_id=request_id or uuid.uuid4().hex,
            number=next(_numbers),
            prompt=np.array(ids, np.int32),
            params=params,
            max_len=max_len,
            stop_tokens=stops,
            budget=thinking,
            stream=stream,
            priority=priority,
            salt=hashlib.sha256(cache_salt.encode()).digest()[:16] if cache_salt else bytes(16),
        )

    def chat_token_ids(
        self,
        messages: list[dict[str, Any]],
        enable_thinking: bool | None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """A chat as it would be computed: template applied, thinking opened."""
        ids = self._encode(messages, True, enable_thinking, None, tools)
        self._open_thinking(ids, SamplingParams(), True, enable_thinking)
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
            prompt = self._tokenizer.render_chat(messages, enable_thinking, kwargs, tools)
        if isinstance(prompt, str):
            self._check_text(prompt, param)
            ids = self._tokenizer.encode(prompt)
        else:
            ids = self._check_prompt_ids(prompt)
        if not ids:
            raise RequestError(f"{param} is empty", param=param)
        return ids

    def _check_text(self, text: str, param: str) -> None:
        """Refuses a text that is not Unicode, or cannot fit, before the work of tokenising it."""
        check_unicode(param, text)
        most = self.max_model_len * self._tokenizer.max_token_chars * MAX_NORMALIZED_CHARS
        if len(text) > most:
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
        self, ids: list[int], params: SamplingParams, chat: bool, enable_thinking: bool | None
    ) -> int | None:
        """Thinking tokens already in ``ids``, which gains the start marker if it lacks one; None
        if the request does not think."""
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
        if not (chat or wanted):
            return None
        ids.extend(self._reasoning.start)
        return 0

    def _plan(
        self, params: SamplingParams, thought: int, prompt_len: int, max_len: int, bare: bool
    ) -> CompiledBudget:
        """``bare``: nothing opens the answer after a forced end, unless the budget says what."""
        assert self._reasoning is not None
        budget = params.thinking or ThinkingBudget()
        bare = bare and budget.final_text is None
        forced_end = self._reasoning.forced_end("" if bare else budget.final_text)
        end_len = max(
            len(self._reasoning.newline) + len(forced_end), len(self._reasoning.natural_end)
        )
        room = max_len - prompt_len - end_len - answer_reserve(budget, max_len - prompt_len)
        least = max(budget.min_tokens - thought, 0)
        if room < least:
            raise RequestError(
                f"max_tokens and context leave {max_len - prompt_len} tokens: too few for "
                f"{least} of thinking, {end_len} to end it and the answer reserve",
                param="min_thinking_tokens" if room >= 0 else "max_tokens",
            )
        maximum = thought + room
        if budget.max_tokens is not None:
            maximum = min(maximum, budget.max_tokens)
        return CompiledBudget(
            wait=self._tokenizer.encode(budget.wait_text),
            forced_end=list(forced_end),
            delimiter_len=_delimiter_len(forced_end, self._reasoning.natural_end),
            min_thinking=budget.min_tokens,
            num_waits=budget.num_waits,
            tokens_thought=thought,
            max_thinking=maximum,
            checkpoints=budget.checkpoints,
            loop_repeats=budget.loop_repeats or 0,
        )


def answer_reserve(budget: ThinkingBudget, max_tokens: int) -> int:
    """Tokens kept for the answer, at least one: the asked number, else s1's 100 or a quarter of
    ``max_tokens``, whichever is less."""
    if budget.answer_reserve is not None:
        return max(budget.answer_reserve, 1)
    return max(min(DEFAULT_ANSWER_RESERVE, max_tokens // 4), 1)


def _delimiter_len(forced_end: tuple[int, ...], natural_end: tuple[int, ...]) -> int:
    """Leading tokens of a forced end that are the delimiter; the rest opens the answer."""
    n = len(natural_end)
    return n if forced_end[:n] == natural_end else len(forced_end)
