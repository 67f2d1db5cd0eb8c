"""The parameters of a request: how to sample, and how long to think.

Owns the user-facing dataclasses and their bounds. Knows no tokenizer and no model: RequestCompiler
turns texts into token ids and budgets into effective budgets.
"""

from dataclasses import dataclass, field

from s1engine.config import MAX_TOKENS, MAX_WAITS, check_float, check_int, check_unicode
from s1engine.errors import RequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_FORCED_CHARS = 4096
MAX_GRAMMAR_CHARS = 2**16
MAX_CHECKPOINTS = 64
UNLIMITED = MAX_TOKENS  # a thinking budget that only max_tokens and the context bound
NO_PENALTIES = (1.0, 0.0, 0.0)  # neutral values of ``SamplingParams.penalties``


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingBudget:
    """How long to think. Names in parentheses are the flat field names of the HTTP API.

    A *thinking token* lies between the start and the end delimiter; injected wait tokens count.
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
    checkpoints: tuple[int, ...] = ()
    """(thinking_checkpoints) Smaller budgets, ascending. At each, a branch of the trace answers as
    a separate request with this budget would."""
    early_exit: int | None = None
    """(thinking_early_exit) Stop thinking once this many checkpoints in a row give one answer."""
    loop_repeats: int | None = None
    """(thinking_loop_repeats) Stop thinking once a phrase of at most 64 tokens repeats this many
    times in a row."""

    def __post_init__(self) -> None:
        _optional_int("thinking_token_budget", self.max_tokens, 0, MAX_TOKENS)
        check_int("min_thinking_tokens", self.min_tokens, 0, MAX_TOKENS)
        _optional_int("num_waits", self.num_waits, 0, MAX_WAITS)
        _optional_int("answer_reserve", self.answer_reserve, 0, MAX_TOKENS)
        _optional_int("thinking_deadline_ms", self.deadline_ms, 0, 2**31)
        _optional_int("thinking_early_exit", self.early_exit, 2, MAX_CHECKPOINTS)
        _optional_int("thinking_loop_repeats", self.loop_repeats, 2, 1024)
        self._check_checkpoints()
        _text("wait_text", self.wait_text)
        if self.final_text is not None:
            _text("final_text", self.final_text)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_thinking_tokens ({self.min_tokens}) must not exceed "
                f"thinking_token_budget ({self.max_tokens})",
                param="min_thinking_tokens",
            )

    def _check_checkpoints(self) -> None:
        param = "thinking_checkpoints"
        if len(self.checkpoints) > MAX_CHECKPOINTS:
            raise RequestError(f"{param} takes at most {MAX_CHECKPOINTS}", param=param)
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
    """How to sample. A neutral value switches a rule off; ``temperature=0`` is greedy."""

    n: int = 1
    """Independent samples of the same prompt."""
    max_tokens: int | None = None
    """Maximum of generated tokens, including forced ones. None: what the context leaves."""
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
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id to a number in [-100, 100] added to its logit."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it. They do not apply to thinking."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the answer, in addition to the model's own end-of-text ids."""
    ignore_eos: bool = False
    """Continue the answer to max_tokens past the model's end-of-text ids (for benchmarks)."""
    seed: int | None = None
    """The noise depends on (seed, sample index, position) alone. None: the engine draws a seed."""
    logprobs: int | None = None
    """Report the log-probability of each token and of the k likeliest ones (0: no others)."""
    grammar: str | None = None
    """Grammar in llguidance's syntax that the answer must follow; thinking is free."""
    thinking: ThinkingBudget | None = None
    """None: the model decides, up to the effective budget."""

    def __post_init__(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        _optional_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_int("top_k", self.top_k, -1, 2**31 - 1)
        check_float("top_p", self.top_p, 1e-9, 1.0)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _optional_int("seed", self.seed, -(2**63), 2**64 - 1)
        _optional_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None and len(self.grammar) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"the grammar has more than {MAX_GRAMMAR_CHARS} characters", param="response_format"
            )
        self._check_stops()
        self._check_logit_bias()

    @property
    def penalties(self) -> tuple[float, float, float]:
        """The repetition, presence and frequency penalty."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP:
            raise RequestError(f"stop takes at most {MAX_STOP} strings", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"each stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop"
                )
        if len(self.stop_token_ids) > MAX_STOP:
            raise RequestError(
                f"stop_token_ids takes at most {MAX_STOP} ids", param="stop_token_ids"
            )
        for token in self.stop_token_ids:
            check_int("stop_token_ids", token, 0, 2**31 - 1)

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias takes at most {MAX_LOGIT_BIAS} ids", param="logit_bias")
        for token, bias in self.logit_bias.items():
            check_int("logit_bias", token, 0, 2**31 - 1)
            check_float("logit_bias", bias, -100.0, 100.0)


def _optional_int(param: str, value: object, low: int, high: int) -> None:
    if value is not None:
        check_int(param, value, low, high)


def _text(param: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > MAX_FORCED_CHARS:
        raise RequestError(
            f"{param} must be a string of at most {MAX_FORCED_CHARS} characters", param=param
        )
    check_unicode(param, value)
