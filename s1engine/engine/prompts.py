"""Prompts and parameters as callers pass them, in the forms that RequestCompiler reads.

A prompt becomes a text, a list of token ids, or a list of messages; whatever is meant by one of
them is accepted, anything else is a RequestError. Knows no tokenizer.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from s1engine.checks import check_data, check_int, check_unicode, plain_list, shown
from s1engine.errors import RequestError
from s1engine.sampling_params import SamplingParams

Messages = list[dict[str, Any]]


def chat_of(prompt: object) -> Messages | None:
    """The messages of a prompt that is a chat; None for any other. Raises RequestError."""
    items = plain_list(prompt)
    if items is None or not any(issubclass(kind, Mapping) for kind in set(map(type, items))):
        return None  # asked by type: a prompt may have a million token ids
    return plain_messages(items)


def plain_messages(messages: object) -> Messages:
    """The messages of one chat as plain data; check_messages reads their fields. Raises
    RequestError."""
    items = plain_list(messages)
    if items is None or not all(isinstance(item, Mapping) for item in items):
        text = f"messages must be a list of mappings with role and content; got {shown(messages)}"
        raise RequestError(text, param="messages")
    data: Messages = check_data("messages", items)
    return data


def text_or_ids(prompt: object, vocab_size: int) -> str | list[int]:
    """A prompt that is no chat: a text, or a list or an array of token ids. Raises RequestError."""
    if isinstance(prompt, str):
        return str.__str__(check_unicode("prompt", prompt))
    items = plain_list(prompt)
    if items is None:
        message = f"prompt must be text, token ids or messages; got {shown(prompt)}"
        raise RequestError(message, param="prompt")
    plain = set(map(type, items)) <= {int}
    if plain and min(items, default=0) >= 0 and max(items, default=0) < vocab_size:
        return items
    return [_token_id(item, vocab_size) for item in items]


def _token_id(item: object, vocab_size: int) -> int:
    try:
        return check_int("prompt", item, 0, vocab_size - 1)
    except RequestError as error:
        message = f"prompt: {shown(item)} is no token id below {vocab_size}"
        raise RequestError(message, param="prompt") from error


def split_prompts(prompts: object, param: str = "prompt") -> list[Any]:
    """One prompt, or an iterable of prompts, as a list of prompts. Raises RequestError."""
    if isinstance(prompts, str):
        return [prompts]
    items = plain_list(prompts)
    if items is None:
        items = list(_iterator(prompts, param))
    single = bool(items) and not isinstance(items[0], str) and plain_list(items[0]) is None
    return [items] if single else items


def _iterator(prompts: object, param: str) -> Iterator[Any]:
    if isinstance(prompts, Iterable) and not isinstance(prompts, bytes | Mapping | Set):
        with contextlib.suppress(TypeError):  # an array without dimensions
            return iter(prompts)
    message = f"{param} must be text, token ids, messages or several of them"
    raise RequestError(f"{message}; got {shown(prompts)}", param=param)


def split_conversations(conversations: object) -> list[Messages]:
    """One chat, or an iterable of chats, as a list of chats. Raises RequestError."""
    return [plain_messages(messages) for messages in split_prompts(conversations, "messages")]


@contextlib.contextmanager
def numbered_errors(index: int, count: int) -> Iterator[None]:
    """Within it, errors of a prompt among several say which one it is."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        text = f"number {index}: {error}"
        raise RequestError(text, param=error.param, code=error.code) from error


def check_params(params: object) -> SamplingParams:
    """Returns SamplingParams; raises RequestError for anything else."""
    if isinstance(params, SamplingParams):
        return params
    hint = ": write SamplingParams(**params)" if isinstance(params, Mapping) else ""
    message = f"params must be SamplingParams, got {type(params).__name__}{hint}"
    raise RequestError(message, param="params")


def params_of_each(params: object, count: int) -> Sequence[SamplingParams | None]:
    """The parameters of ``count`` prompts: one or None for all, or a list with one for each. Raises
    RequestError."""
    if params is None:
        return [None] * count
    items = plain_list(params)
    if items is None:
        return [check_params(params)] * count
    if len(items) != count:
        raise RequestError(f"{len(items)} params for {count} prompts", param="params")
    return [check_params(item) for item in items]
