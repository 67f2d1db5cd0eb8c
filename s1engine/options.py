"""Types of what a Python caller passes: prompts, and keyword options of engines and of requests.

Owns names and types. EngineConfig checks engine options; request options are checked here.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from s1engine.checks import (
    Check,
    check_bool,
    check_list,
    check_mapping,
    check_path,
    int_in,
    or_none,
    str_of,
)
from s1engine.config import (
    BUNDLED_MODEL,
    Device,
    DType,
    EngineConfig,
    GenerationConfig,
    KVCacheDType,
    LoadFormat,
    ModelImpl,
    Preset,
    Quantization,
)
from s1engine.errors import RequestError

MAX_ID_CHARS = 1024
MAX_TOOLS = 1024

Message = Mapping[str, Any]
"""One message of a chat: ``{"role": ..., "content": ...}``."""
TokenIds = Sequence[int] | NDArray[np.integer[Any]]
Prompt = str | TokenIds | Sequence[Message]
"""A text, token ids, or the messages of a chat."""


class RequestOptions(TypedDict, total=False):
    """Options of one request beside its SamplingParams."""

    request_id: str | None
    """Names the request in calls and logs; unique among live requests. None: a new one."""
    enable_thinking: bool | None
    """False: answer without thinking. None: as the chat template and the model have it."""
    template_kwargs: Mapping[str, Any] | None
    """Variables of the chat template, and ``add_generation_prompt`` and
    ``continue_final_message``."""
    tools: Sequence[Mapping[str, Any]] | None
    """Tools that the chat template shows to the model, in OpenAI's form. With tools the forced end
    of a thinking has no final text, because the answer may be a call."""
    priority: int
    """Lower runs first, and preempts running requests of a higher number where no row or memory is
    free; 0 by default."""
    cache_salt: str | None
    """Cached prefixes are shared only among requests with the same salt."""


class EngineOptions(TypedDict, total=False):
    """The fields of EngineConfig besides ``model``; EngineConfig describes them."""

    model_impl: ModelImpl
    dtype: DType
    quantization: Quantization | None
    load_format: LoadFormat
    device: Device
    preset: Preset | None
    num_threads: int | None
    tensor_parallel_size: int
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_step_ms: float | None
    block_size: int | None
    kv_cache_memory_gb: float | None
    kv_cache_dtype: KVCacheDType
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    enforce_eager: bool
    run_ahead: int | None
    num_speculative_tokens: int
    served_model_name: str | tuple[str, ...] | None
    generation_config: GenerationConfig
    chat_template: str | None
    reasoning_format: str
    reasoning_start: str | None
    reasoning_end: str | None
    tool_call_parser: str
    default_thinking_token_budget: int | None
    default_num_waits: int
    max_thinking_token_budget: int | None
    overload_thinking_floor: int | None
    seed: int
    profile: str | None


def check_option_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises RequestError for the first name that is not among ``known``, with the nearest one."""
    allowed = sorted(known)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(allowed)}"
            raise RequestError(f"unknown option {name}: {hint}", param=name)


def engine_config(model: str | os.PathLike[str] | None, options: EngineOptions) -> EngineConfig:
    """The configuration of an engine; ``model`` None: the bundled one. Raises RequestError."""
    check_option_names(options, EngineOptions.__annotations__)
    path = str(BUNDLED_MODEL) if model is None else check_path("model", model)
    return EngineConfig(model=path, **options)


def check_request_options(options: Mapping[str, object]) -> RequestOptions:
    """Returns options with checked names and values. Raises RequestError."""
    check_option_names(options, REQUEST_CHECKS)
    checked = {name: REQUEST_CHECKS[name](name, value) for name, value in options.items()}
    return cast(RequestOptions, checked)


def _check_tools(param: str, value: object) -> list[dict[str, Any]]:
    tools = check_list(param, value, "tools", MAX_TOOLS)
    return [check_mapping(f"{param}[{i}]", tool) for i, tool in enumerate(tools)]


REQUEST_CHECKS: dict[str, Check] = {
    "request_id": or_none(str_of(MAX_ID_CHARS, min_chars=1)),
    "enable_thinking": or_none(check_bool),
    "template_kwargs": or_none(check_mapping),
    "tools": or_none(_check_tools),
    "priority": int_in(-(2**31), 2**31 - 1),
    "cache_salt": or_none(str_of(MAX_ID_CHARS, min_chars=1)),
}
"""The check of each of RequestOptions."""
