"""Other names of our fields: other engines', other APIs', and inside of other objects.

A request may use any of them, and several that agree. Two that differ are an error. Errors name the
field that was sent. Knows the names, not what they mean.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.sampling_params import UNLIMITED

Path = tuple[str, ...]
"""The names on the way from the body to a value: ``("thinking", "budget_tokens")``."""

NO_LIMIT = -1  # as vLLM, llama.cpp and others spell it
NO_THINKING = "none"
KWARGS = "chat_template_kwargs"
WORD = re.compile(r"(?<![\w.])\w+(?!\w|\.\w)")  # of a message, no part of a path

_THINKING: Mapping[str, str] = {
    "thinking_token_budget": "thinking_budget max_thinking_tokens max_tokens_thinking "
    "thinking_budget_tokens reasoning_budget_tokens reasoning_max_tokens thinking.budget_tokens "
    "reasoning.max_tokens custom_params.thinking_budget nvext.max_thinking_tokens",
    "min_thinking_tokens": "min_tokens_thinking nvext.min_thinking_tokens",
    "num_waits": "thinking_n_ignore",
    "wait_text": "thinking_n_ignore_str",
    "final_text": "",
    "answer_reserve": "",
    "thinking_deadline_ms": "",
    "thinking_early_exit": "",
    "thinking_loop_repeats": "",
    "enable_thinking": f"thinking.type reasoning.enabled think {KWARGS}.thinking",
    "reasoning_effort": "reasoning.effort",
}
_OTHERS: Mapping[str, str] = {
    "max_tokens": "max_completion_tokens max_output_tokens max_new_tokens n_predict num_predict",
    "seed": "random_seed",
    "stop": "stop_sequences stopping_strings",
    "json_schema": "structured_outputs.json_ guided_json",
    "regex": "structured_outputs.regex guided_regex",
    "choice": "structured_outputs.choice guided_choice",
    "grammar": "structured_outputs.grammar guided_grammar ebnf",
    "json_object": "structured_outputs.json_object guided_json_object",
}


def _paths(name: str, spellings: str) -> tuple[Path, ...]:
    return tuple(tuple(path.split(".")) for path in (name, *spellings.split()))


SPELLINGS: Mapping[str, tuple[Path, ...]] = {
    name: _paths(name, text) for name, text in _OTHERS.items()
} | {
    # What a template gets is meant for the thinking, if it has the name of a field of ours.
    name: (*_paths(name, text), *((KWARGS, *p) for p in _paths(name, text) if len(p) == 1))
    for name, text in _THINKING.items()
}
"""The places of each field, our own first."""
ROOTS = {name: frozenset(path[0] for path in paths) for name, paths in SPELLINGS.items()}

_MEANINGS: Mapping[str, Mapping[Any, Any]] = {
    "thinking_token_budget": {"auto": UNLIMITED, NO_LIMIT: UNLIMITED},
    "enable_thinking": {"enabled": True, "adaptive": True, "disabled": False},
}


def sent_fields(body: BaseModel, name: str) -> list[tuple[str, Any]]:
    """Return the spellings of a field that a body has, with their values."""
    given = body.model_fields_set
    if given.isdisjoint(ROOTS[name]):
        return []
    found = []
    for path in SPELLINGS[name]:
        if path[0] in given and (value := _value(body, path)) is not None:
            meanings = _MEANINGS.get(name, {})
            plain = isinstance(value, str | int) and not isinstance(value, bool)
            sent = ".".join(path).rstrip("_")
            found.append((sent, meanings.get(value, value) if plain else value))
    return found


def _value(body: BaseModel, path: Path) -> Any:
    value: Any = body
    for part in path:
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def resolve(body: BaseModel, name: str) -> Any:
    """Return the value of a field in whichever spelling, None if there is none. Raises
    RequestError naming two that differ."""
    given = sent_fields(body, name)
    for other, value in given[1:]:
        check_same(*given[0], other, value)
    return given[0][1] if given else None


def check_same(first: str, value: Any, second: str, other: Any) -> None:
    """Raises RequestError if two spellings of one field differ."""
    if value != other:
        raise RequestError(
            f"{first} ({shown(value)}) and {second} ({shown(other)}) differ; give one of them",
            param=second.partition(".")[0],
        )


def sent_names(body: BaseModel) -> dict[str, str]:
    """Return the spelling of each field that a body has in another one than ours."""
    first = {name: sent[0][0] for name in SPELLINGS if (sent := sent_fields(body, name))}
    return {name: sent for name, sent in first.items() if sent != name}


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """Return an error about our fields with the names that were sent instead."""
    text = WORD.sub(lambda word: names.get(word[0], word[0]), str(error))
    param = names.get(error.param or "", error.param)
    return RequestError(text, param=param and param.partition(".")[0], code=error.code)
