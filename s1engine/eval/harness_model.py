"""The engine as a model of lm-evaluation-harness (package ``lm_eval``, which is optional).

Importing this module registers the name ``s1engine``. Generation kwargs of a request are the
harness's, ours, or s1's names for budget forcing; all others are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.sampling_params import MAX_STOP, SamplingParams, ThinkingBudget

DEFAULT_MAX_GEN_TOKS = 256  # the harness's default
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int}
IGNORED = {"do_sample"}  # if false, it only sets the temperature to 0
THINKING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "thinking_token_budget": ("max_tokens", int),
    "max_tokens_thinking": ("max_tokens", int),
    "min_thinking_tokens": ("min_tokens", int),
    "min_tokens_thinking": ("min_tokens", int),
    "num_waits": ("num_waits", int),
    "thinking_n_ignore": ("num_waits", int),
    "wait_text": ("wait_text", str),
    "thinking_n_ignore_str": ("wait_text", str),
    "final_text": ("final_text", str),
    "answer_reserve": ("answer_reserve", int),
}
"""Kwarg to field and type of ThinkingBudget; of two names of a field, the second is s1's."""
S1_AUTO = "auto"  # s1's value for: as long as the context allows


@register_model("s1engine")
class S1EngineLM(LM):  # type: ignore[misc]
    """Answers ``generate_until`` requests, all in one continuous batch.

    Args:
        pretrained: directory or hub id; None: the bundled s1-nano.
        think: open the thinking block of chats, if the model thinks by default.
        options: other fields of EngineConfig. The engine forms its own batches, so the harness's
            batch sizes have no effect.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        think: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device == "cpu":  # the harness's default is cuda, with and without a GPU
            options["device"] = device
        self._llm = LLM(pretrained, progress=False, **options)
        self._think = think and self._llm.engine.compiler.text.thinking.by_default
        self._is_chat = False

    @property
    def tokenizer_name(self) -> str:
        return self._llm.engine.config.model_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Part of the harness's cache key. Templates by name are not supported."""
        if isinstance(chat_template, str) and chat_template:
            raise RequestError("choose a template by --model_args chat_template=FILE")
        return self.tokenizer_name if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text: up to the header of the assistant's turn, or without
        ``add_generation_prompt`` up to the end of an answer that it has begun."""
        self._is_chat = add_generation_prompt  # else it is too late to open thinking
        return self._llm.engine.tokenizer.render_chat(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, without their thinking."""
        prompts = [str(request.args[0]) for request in requests]
        params = [sampling_params(request.args[1]) for request in requests]
        enable_thinking = True if self._think and self._is_chat else None
        outputs = self._llm.generate(
            prompts, params, progress=not disable_tqdm, enable_thinking=enable_thinking
        )
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported: the engine reports log-probabilities of generated tokens only."""
        raise NotImplementedError("s1engine scores no given text: choose tasks that generate")

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Not supported, see ``loglikelihood``."""
        raise NotImplementedError("s1engine scores no given text: choose tasks that generate")


def sampling_params(kwargs: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from generation kwargs. ``max_gen_toks`` bounds the answer if there is a
    thinking budget, else thinking and answer together. Raises RequestError."""
    rest = dict(kwargs)
    until = rest.pop("until", None) or []
    stops = [until] if isinstance(until, str) else list(until)
    sampled = rest.get("do_sample", True) is not False
    fields = {name: kind(rest.pop(name)) for name, kind in SAMPLING.items() if name in rest}
    answer = int(rest.pop("max_gen_toks", DEFAULT_MAX_GEN_TOKS))
    thinking = _pop_thinking(rest)
    unknown = rest.keys() - IGNORED
    if unknown:
        name = sorted(unknown)[0]
        raise RequestError(f"generation kwarg {name} is not supported", param=name)
    fields["temperature"] = fields.get("temperature", 0.0) if sampled else 0.0
    budget = thinking.max_tokens if thinking else None
    return SamplingParams(
        max_tokens=answer + (budget or 0),
        stop=tuple(stop for stop in stops if stop)[:MAX_STOP],
        thinking=thinking,
        **fields,
    )


def _pop_thinking(rest: dict[str, Any]) -> ThinkingBudget | None:
    """Removes the thinking kwargs from ``rest``; None if there are none."""
    fields: dict[str, Any] = {}
    for name, (field, kind) in THINKING.items():
        if name not in rest:
            continue
        value = rest.pop(name)
        value = None if value == S1_AUTO else _convert(name, value, kind)
        if fields.setdefault(field, value) != value:
            raise RequestError(f"{name} contradicts another name of it", param=name)
    values = {field: value for field, value in fields.items() if value is not None}
    return ThinkingBudget(**values) if fields else None


def _convert(name: str, value: object, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{name}: {value!r} is not of type {kind.__name__}", param=name
        ) from error
