"""Requests of lm-evaluation-harness in our words: generation kwargs to sampling parameters.

Understands the harness's own kwargs, ours, and s1's spellings for budget forcing; refuses any
other, so that none is silently ignored. The harness itself is imported by ``harness_model`` only.

This package declares the model under the entry point ``lm_eval.models``, where the harness looks
from the release after 0.4.13 on: there ``lm_eval --model s1engine`` is enough. Earlier ones know
their own models only, so their command line starts from here, with the name registered:

    python -m s1engine.eval.harness run --model s1engine --tasks ... --apply_chat_template \\
        --model_args pretrained=DIR,max_num_seqs=64 \\
        --gen_kwargs thinking_token_budget=4096,num_waits=2
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from s1engine.errors import ModelError, RequestError
from s1engine.sampling_params import MAX_STOP, SamplingParams, ThinkingBudget

DEFAULT_MAX_GEN_TOKS = 256  # the harness's own
SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int}
IGNORED = {"do_sample"}  # says no more than the temperature, which it sets to 0 if false
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
"""Spelling to field and type of ThinkingBudget; the second of each pair is s1's."""
S1_AUTO = "auto"  # s1's word for: as long as the context allows


def sampling_params(kwargs: Mapping[str, Any]) -> SamplingParams:
    """What a request's generation kwargs ask for. ``max_gen_toks`` bounds the answer where a
    thinking budget is given, else thinking and answer together. Raises RequestError."""
    rest = dict(kwargs)
    until = rest.pop("until", None) or []
    stops = [until] if isinstance(until, str) else list(until)
    sampled = rest.get("do_sample", True) is not False
    fields = {name: kind(rest.pop(name)) for name, kind in SAMPLING.items() if name in rest}
    answer = int(rest.pop("max_gen_toks", DEFAULT_MAX_GEN_TOKS))
    thinking = _thinking(rest)
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


def _thinking(rest: dict[str, Any]) -> ThinkingBudget | None:
    """Takes the thinking kwargs out of ``rest``; None if there are none."""
    fields: dict[str, Any] = {}
    found = False
    for spelling, (field, kind) in THINKING.items():
        if spelling not in rest:
            continue
        found = True
        value = rest.pop(spelling)
        value = None if value == S1_AUTO else _converted(spelling, value, kind)
        if fields.setdefault(field, value) != value:
            raise RequestError(f"{spelling} contradicts another spelling of it", param=spelling)
    given = {field: value for field, value in fields.items() if value is not None}
    return ThinkingBudget(**given) if found else None


def _converted(spelling: str, value: object, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{spelling}: {value!r} does not fit", param=spelling) from error


def main() -> int:
    """The harness's command line, with this engine among its models."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from s1engine.eval import harness_model  # noqa: F401 (registers the name)
    except ImportError as error:
        print(
            f"error: {error}; it needs the package lm_eval (pip install lm_eval)", file=sys.stderr
        )
        return 1
    try:
        cli_evaluate()
    except (ModelError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
