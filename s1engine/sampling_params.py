"""The parameters of a request: how to sample, and how long to think.

Owns the user-facing dataclasses and their bounds. Knows no tokenizer and no model: RequestCompiler
turns texts into token ids and budgets into effective budgets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from s1engine.checks import (
    Check,
    check_bool,
    check_fields,
    check_float,
    check_int,
    check_list,
    check_mapping,
    check_str,
    float_in,
    int_in,
    shown,
    str_of,
)
from s1engine.config import MAX_TOKENS, MAX_WAITS
from s1engine.errors import RequestError

MAX_N = 128
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGPROBS = 20
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_FORCED_CHARS = 4096
MAX_GRAMMAR_CHARS = 2**16
MAX_CHOICES = 1024
MAX_CHECKPOINTS = 64
STRUCTURES = ("json_schema", "regex", "choice", "grammar")  # of an answer
UNLIMITED = MAX_TOKENS  # a thinking budget that only max_tokens and the context bound
MAX_LOGITS_PROCESSORS = 16
NO_PENALTIES = (1.0, 0.0, 0.0)  # neutral values of ``SamplingParams.penalties``


class LogitsProcessor(Protocol):
    """A callable that edits the logits of one sequence before each token that it samples."""

    def __call__(
        self, token_ids: NDArray[np.int32], logits: NDArray[np.float32], /
    ) -> NDArray[np.float32] | None:
        """Edits ``logits`` [V] float32 in place and returns None, or returns new ones.

        ``token_ids`` [n] int32 are the sequence so far, prompt, thinking and forced tokens
        included; read-only. Both arrays are valid during the call only. -infinity bans a token; the
        largest logit must be finite. Logit bias, penalties and the rules of thinking and grammar
        come afterwards, so they hold in any case; log-probabilities are of the logits before.

        The stepping thread calls it for each sequence and each step, so all requests wait for it:
        a call of Python, three passes over V floats, and the interpreter's lock. It must not call
        the engine. What it raises fails its own request (RequestFailedError with the cause).
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingBudget:
    """How long to think. Names in parentheses are the flat field names of the HTTP API.

    A *thinking token* lies between the start and the end delimiter; injected wait tokens count.
    Raises RequestError for a wrong value; it names the field as in parentheses.
    """

    max_tokens: int | None = None
    """(thinking_token_budget) Maximum; 0 answers at once. None: the engine's
    default_thinking_token_budget, else as many as max_tokens and the context allow, without the
    answer reserve. UNLIMITED: as many in any case."""
    min_tokens: int = 0
    """(min_thinking_tokens) ``wait_text`` replaces an end that the model writes earlier."""
    num_waits: int | None = None
    """(num_waits) Number of the model's own ends that ``wait_text`` replaces. None: the engine's
    default_num_waits."""
    wait_text: str = "Wait"
    """(wait_text) Replaces an end. Empty: the end is only suppressed."""
    final_text: str | None = None
    """(final_text) Opens the answer after a forced end. None: the format's own, for s1
    ``Final Answer:``."""
    answer_reserve: int | None = None
    """(answer_reserve) Tokens of max_tokens reserved for the answer. None: 100, or a quarter of
    max_tokens if that is less."""
    deadline_ms: int | None = None
    """(thinking_deadline_ms) Wall-clock limit of thinking, counted from arrival."""
    checkpoints: Sequence[int] = ()
    """(thinking_checkpoints) Smaller budgets, ascending. At each, a branch of the trace answers as
    a separate request with this budget would."""
    early_exit: int | None = None
    """(thinking_early_exit) Stop thinking once this many checkpoints in a row give one answer."""
    loop_repeats: int | None = None
    """(thinking_loop_repeats) Stop thinking once a phrase of at most 64 tokens repeats this many
    times in a row."""

    def __post_init__(self) -> None:
        check_fields(self, BUDGET_CHECKS, HTTP_NAMES)
        self._check_order()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_thinking_tokens ({self.min_tokens}) must not exceed "
                f"thinking_token_budget ({self.max_tokens})",
                param="min_thinking_tokens",
            )

    def _check_order(self) -> None:
        param = HTTP_NAMES["checkpoints"]
        least = self.min_tokens
        most = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        for checkpoint in self.checkpoints:
            check_int(param, checkpoint, least, most)
            least = checkpoint + 1
        if self.early_exit is not None and len(self.checkpoints) < self.early_exit:
            raise RequestError(
                f"thinking_early_exit needs at least {self.early_exit} thinking_checkpoints",
                param="thinking_early_exit",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample. A neutral value switches a rule off; ``temperature=0`` is greedy.

    Numbers of numpy, and any sequence or array for a sequence, are accepted; a single string is one
    ``stop``. Raises RequestError for a wrong value; it names the field.
    """

    n: int = 1
    """Independent samples of the same prompt."""
    max_tokens: int | None = None
    """Maximum of generated tokens, including forced ones. None: what the context leaves. 0: only
    the prompt is computed."""
    min_tokens: int = 0
    """Generated tokens, thinking and forced ones included, before an end-of-text or stop id may be
    sampled and stop strings are looked for. Excludes a structured answer, whose grammar decides
    where it ends."""
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from logits times the token's count in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to a number in [-100, 100] added to its logit."""
    stop: Sequence[str] = ()
    """Strings that end the answer and are not part of it. They do not apply to thinking."""
    stop_token_ids: Sequence[int] = ()
    """Ids that end the answer, in addition to the model's own end-of-text ids."""
    ignore_eos: bool = False
    """Continue the answer to max_tokens past the model's end-of-text ids (for benchmarks)."""
    seed: int | None = None
    """The noise depends on (seed, sample index, position) alone. None: the engine draws a seed."""
    logprobs: int | None = None
    """Report the log-probability of each token and of the k likeliest ones (0: no others)."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first, once for all samples. The whole prompt
    is computed then: it hits no cached prefix."""
    json_schema: Mapping[str, Any] | str | None = None
    """JSON schema, as a mapping or a text, that the answer must satisfy; ``{}`` is any JSON value.
    At most one of json_schema, regex, choice and grammar may be set; thinking stays free."""
    regex: str | None = None
    """Regular expression that the whole answer must match."""
    choice: Sequence[str] | None = None
    """Texts, one of which the answer must be."""
    grammar: str | None = None
    """Grammar that the answer must follow: in Lark's syntax as llguidance reads it, or in GBNF of
    llama.cpp."""
    logits_processors: Sequence[LogitsProcessor] = ()
    """Edit the logits of each sequence, in this order. For an embedded engine only: a server's
    engine runs in another process. Such a request drafts no tokens, and on a GPU its batch decodes
    in single steps."""
    thinking: ThinkingBudget | None = None
    """None: the model decides, up to the effective budget."""
    deadline_ms: int | None = None
    """Wall-clock limit of the request, counted from its arrival: then it ends with the output so
    far and the finish reason ``deadline``. Thinking ends so early that the answer reserve fits, at
    the measured time per token."""
    first_token_deadline_ms: int | None = None
    """The same, for a request that has no token until then."""

    def __post_init__(self) -> None:
        check_fields(self, CHECKS)
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            message = f"{given[0]} and {given[1]} exclude one another: an answer has one structure"
            raise RequestError(message, param=given[1])
        self._check_min_tokens()

    def _check_min_tokens(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        if self.min_tokens and self.structure is not None:
            message = (
                f"min_tokens and {self.structure} exclude one another: "
                "the structure decides where the answer ends"
            )
            raise RequestError(message, param="min_tokens")

    @property
    def structure(self) -> str | None:
        """The field that gives the answer a structure; None: the answer is free."""
        return next((name for name in STRUCTURES if getattr(self, name) is not None), None)

    @property
    def penalties(self) -> tuple[float, float, float]:
        """The repetition, presence and frequency penalty."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty


def _check_stop(param: str, value: object) -> tuple[str, ...]:
    """A single string counts as a list of one."""
    texts = [value] if isinstance(value, str) else check_list(param, value, "strings", MAX_STOP)
    return tuple(check_str(param, text, MAX_STOP_CHARS, min_chars=1) for text in texts)


def _check_token_ids(param: str, value: object) -> tuple[int, ...]:
    ids = check_list(param, value, "token ids", MAX_STOP)
    return tuple(check_int(param, token, 0, MAX_TOKEN_ID) for token in ids)


def _check_checkpoints(param: str, value: object) -> tuple[int, ...]:
    counts = check_list(param, value, "token counts", MAX_CHECKPOINTS)
    return tuple(check_int(param, count, 0, MAX_TOKENS) for count in counts)


def _check_logit_bias(param: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        message = f"{param} must be a mapping from token id to number; got {shown(value)}"
        raise RequestError(message, param=param)
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"{param} takes at most {MAX_LOGIT_BIAS} ids", param=param)
    return {
        check_int(param, token, 0, MAX_TOKEN_ID): check_float(param, bias, -100.0, 100.0)
        for token, bias in value.items()
    }


def _check_logits_processors(param: str, value: object) -> tuple[Any, ...]:
    """A single callable counts as a list of one."""
    processors: Sequence[object] = (
        [value] if callable(value) else check_list(param, value, "callables", MAX_LOGITS_PROCESSORS)
    )
    for processor in processors:
        if not callable(processor):
            raise RequestError(f"{param}: {shown(processor)} is not callable", param=param)
    return tuple(processors)


def _check_thinking(param: str, value: object) -> ThinkingBudget:
    if not isinstance(value, ThinkingBudget):
        hint = ": write ThinkingBudget(**thinking)" if isinstance(value, Mapping) else ""
        message = f"{param} must be a ThinkingBudget, got {type(value).__name__}{hint}"
        raise RequestError(message, param=param)
    return value


def _check_schema(param: str, value: object) -> dict[str, Any] | str:
    if isinstance(value, Mapping):
        return check_mapping(param, value)
    if not isinstance(value, str):
        message = f"{param} must be a mapping or a JSON text; got {shown(value)}"
        raise RequestError(message, param=param)
    return check_str(param, value, MAX_GRAMMAR_CHARS)


def _check_choice(param: str, value: object) -> tuple[str, ...]:
    texts = check_list(param, value, "strings", MAX_CHOICES)
    if not texts:
        raise RequestError(f"{param} is empty", param=param)
    return tuple(check_str(param, text, MAX_GRAMMAR_CHARS) for text in texts)


BUDGET_CHECKS: dict[str, Check] = {
    "max_tokens": int_in(0, MAX_TOKENS),
    "min_tokens": int_in(0, MAX_TOKENS),
    "num_waits": int_in(0, MAX_WAITS),
    "wait_text": str_of(MAX_FORCED_CHARS),
    "final_text": str_of(MAX_FORCED_CHARS),
    "answer_reserve": int_in(0, MAX_TOKENS),
    "deadline_ms": int_in(0, 2**31),
    "checkpoints": _check_checkpoints,
    "early_exit": int_in(2, MAX_CHECKPOINTS),
    "loop_repeats": int_in(2, 1024),
}
"""The check of each field of ThinkingBudget."""
HTTP_NAMES = {
    "max_tokens": "thinking_token_budget",
    "min_tokens": "min_thinking_tokens",
    "deadline_ms": "thinking_deadline_ms",
    "checkpoints": "thinking_checkpoints",
    "early_exit": "thinking_early_exit",
    "loop_repeats": "thinking_loop_repeats",
}
"""Flat names of ThinkingBudget's fields, where they differ."""
CHECKS: dict[str, Check] = {
    "n": int_in(1, MAX_N),
    "max_tokens": int_in(0, MAX_TOKENS),
    "min_tokens": int_in(0, MAX_TOKENS),
    "temperature": float_in(0.0, 100.0),
    "top_k": int_in(-1, 2**31 - 1),
    "top_p": float_in(1e-9, 1.0),
    "min_p": float_in(0.0, 1.0),
    "repetition_penalty": float_in(1e-3, 1e3),
    "presence_penalty": float_in(-2.0, 2.0),
    "frequency_penalty": float_in(-2.0, 2.0),
    "logit_bias": _check_logit_bias,
    "stop": _check_stop,
    "stop_token_ids": _check_token_ids,
    "ignore_eos": check_bool,
    "seed": int_in(-(2**63), 2**64 - 1),
    "logprobs": int_in(0, MAX_LOGPROBS),
    "prompt_logprobs": int_in(0, MAX_LOGPROBS),
    "json_schema": _check_schema,
    "regex": str_of(MAX_GRAMMAR_CHARS),
    "choice": _check_choice,
    "grammar": str_of(MAX_GRAMMAR_CHARS),
    "logits_processors": _check_logits_processors,
    "thinking": _check_thinking,
    "deadline_ms": int_in(0, 2**31),
    "first_token_deadline_ms": int_in(0, 2**31),
}
"""The check of each field of SamplingParams."""
